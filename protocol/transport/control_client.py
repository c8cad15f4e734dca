"""The HTTPS side of the control plane for those who call: agents, process servers, operators, newcomers.

TLS 1.3 to the vault's own certificate authority only; the system's authorities are never trusted. Every request has a
deadline, every answer a size limit. A request that got no answer may have been carried out; all can be repeated.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self, TypeVar
from urllib.parse import urlsplit

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from pydantic import BaseModel, ValidationError

from protocol.control import (
    BODY_BYTES_MAX,
    AgentOrders,
    AgentReport,
    CertificateBundle,
    CertificateRequest,
    DiskAssignment,
    DiskRegistration,
    ProcessServerOrders,
    ProcessServerReport,
    reason_of,
)
from protocol.control_errors import (
    REFUSALS,
    AnswerMalformed,
    CertificateTimeInvalid,
    RefusedByServer,
    ServerNotTrusted,
    ServerUnreachable,
    ServerUnwell,
)
from protocol.enrollment import (
    EnrolledIdentity,
    EnrollmentBundle,
    EnrollmentReply,
    EnrollmentRequest,
    credentials_pem,
    make_certificate_key,
    make_signing_key,
    proof_key,
    prove,
    public_key_hash,
    signing_key_pem,
    transcript,
)
from protocol.errors import CertificateRefused, CertificateUnusable, InvalidValue, ReplicationError
from protocol.join_token import JoinToken
from protocol.operator_messages import (
    Problem,
    ServerDescription,
)
from protocol.vocabulary import DiskId, PeerIdentity, Role, VaultId

REQUEST_SECONDS_MAX: Final = 30.0
"""How long any request may take, beyond the wait that a long poll asks for."""
CONNECT_SECONDS_MAX: Final = 10.0
CONNECTIONS_MAX: Final = 4
DEFAULT_PORT: Final = 443
VERDICT_SECONDS_MAX: Final = 1.0
"""How soon a server that refuses our certificate has cut the connection."""
ENROLLMENT_ATTEMPTS_MAX: Final = 3

_PROBLEM_TYPE = "application/problem+json"
_CERTIFICATE_NOT_YET_VALID = 9
_CERTIFICATE_HAS_EXPIRED = 10
"""X509_V_ERR_… of OpenSSL."""
_REFUSING_ALERTS = ("ALERT_UNKNOWN_CA", "ALERT_CERTIFICATE", "ALERT_BAD_CERTIFICATE", "ALERT_ACCESS_DENIED")

_Reply = TypeVar("_Reply", bound=BaseModel)


def client_context(*, authority_pem: bytes, credentials_path: str | None = None) -> ssl.SSLContext:
    """TLS 1.3, host name checked, trusting `authority_pem` alone; blocks shortly to read the credentials file.

    Raises CertificateUnusable.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # why: a member's common name is what it called itself; OpenSSL takes it for a host name where there is no other
    context.hostname_checks_common_name = False
    try:
        context.load_verify_locations(cadata=authority_pem.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
        raise CertificateUnusable(path="the authority's certificate", reason=str(error)) from error
    try:
        if credentials_path is not None:
            context.load_cert_chain(credentials_path)
    except OSError as error:
        raise CertificateUnusable(path=credentials_path, reason=str(error)) from error
    return context


class ControlConnection:
    """Requests to one configuration server; typed replies, typed errors. Opens connections when first needed.

    anonymous_context: as `context` but without its certificate; tells a refused certificate from an outage.
    Raises from every request: ServerUnreachable, ServerUnwell (retryable), ServerNotTrusted, CertificateTimeInvalid,
    CertificateRefused, AnswerMalformed, or the refusal's own type.
    """

    def __init__(
        self,
        *,
        server_url: str,
        context: ssl.SSLContext,
        bearer_token: str | None = None,
        anonymous_context: ssl.SSLContext | None = None,
        request_seconds_max: float = REQUEST_SECONDS_MAX,
    ) -> None:
        self._url = check_server_url(server_url)
        self._anonymous_context = anonymous_context
        self._context = context
        self._headers = {} if bearer_token is None else {"Authorization": f"Bearer {bearer_token}"}
        self._request_seconds_max = request_seconds_max
        self._session: aiohttp.ClientSession | None = None

    async def replace_contexts(self, context: ssl.SSLContext, anonymous_context: ssl.SSLContext) -> None:
        """Requests made from now on use new credentials. Requests in flight are cut off; they can be repeated."""
        self._context, self._anonymous_context = context, anonymous_context
        await self.close()

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def request(
        self,
        method: str,
        path: str,
        reply: type[_Reply],
        *,
        body: BaseModel | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        wait_seconds: float = 0.0,
    ) -> _Reply:
        """Sends one request and returns its validated reply."""
        status, content_type, data = await self._exchange(method, path, body, query or {}, headers or {}, wait_seconds)
        if status >= 400:
            raise self._refusal(status, content_type, data)
        try:
            return reply.model_validate_json(data)
        except ValidationError as error:
            raise AnswerMalformed(server=self._url, reason=reason_of(error)) from error

    async def _exchange(
        self,
        method: str,
        path: str,
        body: BaseModel | None,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        wait_seconds: float,
    ) -> tuple[int, str, bytes]:
        headers = dict(headers) | ({} if body is None else {"Content-Type": "application/json"})
        data = None if body is None else body.model_dump_json().encode()
        try:
            async with asyncio.timeout(self._request_seconds_max + wait_seconds):
                async with self._open_session().request(
                    method, self._url + path, data=data, params=query, headers=headers, allow_redirects=False
                ) as response:
                    return response.status, response.content_type, await self._read(response)
        except TimeoutError as error:
            raise ServerUnreachable(server=self._url, reason="no answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            failure = self._translate(error)
            if isinstance(failure, ServerUnreachable):
                failure = await self._find_refusal() or failure
            raise failure from error

    async def _find_refusal(self) -> ReplicationError | None:
        """Whether connections are cut because of our certificate.

        With TLS 1.3 the server judges it after our handshake has ended; its alert is lost if a request is under way by
        then, and servers on asyncio do not send one. But then every connection that shows the certificate is cut, and
        one that shows none is not.
        """
        if self._anonymous_context is None or await self._is_left_open(self._context):
            return None
        if not await self._is_left_open(self._anonymous_context):
            return None
        reason = "it is of another authority, or no longer valid by the server's clock"
        return CertificateRefused(subject="this program", reason=reason)

    async def _is_left_open(self, context: ssl.SSLContext) -> bool:
        """Whether the server keeps a connection on which nothing is sent, for as long as a verdict takes."""
        parts = urlsplit(self._url)
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port or DEFAULT_PORT, ssl=context)
        except OSError:
            return False
        try:
            async with asyncio.timeout(VERDICT_SECONDS_MAX):
                return bool(await reader.read(1))
        except TimeoutError:
            return True
        except OSError:
            return False
        finally:
            writer.transport.abort()

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._context, limit=CONNECTIONS_MAX)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS_MAX)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, headers=self._headers, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        received = bytearray()
        async for chunk in response.content.iter_any():
            received += chunk
            if len(received) > BODY_BYTES_MAX:
                raise AnswerMalformed(server=self._url, reason=f"it is larger than {BODY_BYTES_MAX} bytes")
        return bytes(received)

    def _translate(self, error: Exception) -> ReplicationError:
        cause = _ssl_cause(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = cause.verify_message
            if cause.verify_code in (_CERTIFICATE_NOT_YET_VALID, _CERTIFICATE_HAS_EXPIRED):
                return CertificateTimeInvalid(server=self._url, reason=reason)
            return ServerNotTrusted(server=self._url, reason=reason)
        if cause is not None and any(alert in (cause.reason or "") for alert in _REFUSING_ALERTS):
            reason = (cause.reason or "").lower().replace("_", " ")
            return CertificateRefused(subject="this program", reason=f"{self._url} answers: {reason}")
        return ServerUnreachable(server=self._url, reason=str(error) or type(error).__name__)

    def _refusal(self, status: int, content_type: str, data: bytes) -> ReplicationError:
        if content_type != _PROBLEM_TYPE:
            return AnswerMalformed(server=self._url, reason=f"status {status} without a problem description")
        try:
            return refusal_of(Problem.model_validate_json(data), status=status)
        except ValidationError as error:
            return AnswerMalformed(server=self._url, reason=reason_of(error))


def refusal_of(problem: Problem, *, status: int) -> ReplicationError:
    """The error that a problem description stands for."""
    kind = REFUSALS.get(problem.code)
    if kind is not None:
        try:
            return kind(**problem.fields)
        except KeyError:
            pass  # another version's fields: shown as an unknown refusal
    if status >= 500:
        return ServerUnwell(reason=problem.detail)
    return RefusedByServer(
        peer_code=problem.code,
        detail=problem.detail,
        peer_hint=problem.hint,
        retryable=problem.is_retryable,
        status=status,
    )


def check_server_url(url: str) -> str:
    """Returns it without a trailing slash. Raises InvalidValue unless it is https://host[:port]."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme == "https" and bool(parts.hostname) and parts.path in ("", "/") and parts.port != 0
        is_good = is_good and not parts.query and not parts.fragment and parts.username is None
    except ValueError:
        is_good = False
    if not is_good:
        raise InvalidValue(what="configuration server URL", value=url, rule="must be https://host:port")
    return f"https://{parts.netloc}"


def _ssl_cause(error: BaseException) -> ssl.SSLError | None:
    """What the ssl module said. aiohttp's own errors derive from it too, but carry it inside."""
    inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None)
    if isinstance(inner, BaseException) and inner is not error:
        return _ssl_cause(inner)
    for candidate in (error, error.__cause__):
        if isinstance(candidate, ssl.SSLError) and not isinstance(candidate, aiohttp.ClientError):
            return candidate
    return None


class ControlClient:
    """What the three clients share: a connection that is closed at the end of `async with`."""

    def __init__(self, connection: ControlConnection) -> None:
        self._connection = connection

    async def close(self) -> None:
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _EnrolledClient(ControlClient):
    """For holders of a certificate."""

    def __init__(
        self,
        *,
        server_url: str,
        authority_pem: bytes,
        credentials_path: str,
        request_seconds_max: float = REQUEST_SECONDS_MAX,
    ) -> None:
        self._credentials_path = credentials_path
        super().__init__(
            ControlConnection(
                server_url=server_url,
                context=client_context(authority_pem=authority_pem, credentials_path=credentials_path),
                anonymous_context=client_context(authority_pem=authority_pem),
                request_seconds_max=request_seconds_max,
            )
        )

    async def reload_credentials(self, authority_pem: bytes) -> None:
        """After a renewal was written: the next request presents the new certificate."""
        await self._connection.replace_contexts(
            client_context(authority_pem=authority_pem, credentials_path=self._credentials_path),
            client_context(authority_pem=authority_pem),
        )

    async def renew(self, request_pem: str) -> CertificateBundle:
        """A new certificate for the same identity. Write credentials_pem(bundle, key) durably, then reload."""
        return await self._connection.request(
            "POST", "/v1/certificates", CertificateBundle, body=CertificateRequest(request_pem=request_pem)
        )


class AgentControlClient(_EnrolledClient):
    """`protocol.control.AgentControl` over HTTPS with an agent's certificate."""

    async def register_disk(self, registration: DiskRegistration) -> DiskAssignment:
        return await self._connection.request("POST", "/v1/agent/disks", DiskAssignment, body=registration)

    async def unregister_disk(self, disk: DiskId, *, keep_data: bool) -> None:
        query = {"keep_data": "true" if keep_data else "false"}
        await self._connection.request("DELETE", f"/v1/agent/disks/{disk}", Nothing, query=query)

    async def report(self, report: AgentReport) -> AgentOrders:
        return await self._connection.request("POST", "/v1/agent/report", AgentOrders, body=report)

    async def wait_for_orders(self, revision: str, wait_seconds: float) -> AgentOrders:
        query = {"revision": revision, "wait_seconds": str(wait_seconds)}
        return await self._connection.request(
            "GET", "/v1/agent/orders", AgentOrders, query=query, wait_seconds=wait_seconds
        )


class ProcessServerControlClient(_EnrolledClient):
    """`protocol.control.ProcessServerControl` over HTTPS with a process server's certificate."""

    async def report(self, report: ProcessServerReport) -> ProcessServerOrders:
        return await self._connection.request("POST", "/v1/process-server/report", ProcessServerOrders, body=report)

    async def wait_for_orders(self, revision: str, wait_seconds: float) -> ProcessServerOrders:
        query = {"revision": revision, "wait_seconds": str(wait_seconds)}
        return await self._connection.request(
            "GET", "/v1/process-server/orders", ProcessServerOrders, query=query, wait_seconds=wait_seconds
        )


class Nothing(BaseModel):
    """The empty reply `{}`."""


async def enroll(*, server_url: str, token: JoinToken, role: Role, name: str) -> EnrollmentBundle:
    """Becomes a member of the server's vault. Keys are made here and never leave; the caller writes `bundle.files()`.

    First the authority's certificate is fetched from whoever answers and compared with the token's hash; only then, and
    only over TLS that this authority vouches for, is anything else said. A lost answer is asked for again with the same
    keys.

    Raises ServerUnreachable, ServerNotTrusted (another authority), CertificateTimeInvalid (the clocks differ),
    JoinTokenWrong, JoinTokenExpired, JoinTokenUsed, JoinTokenForAnotherRole, and what ControlConnection raises.
    """
    if role is Role.CONFIGURATION_SERVER:
        raise InvalidValue(what="role", value=role.value, rule="must be that of an agent, process server or worker")
    authority_pem, vault = await _pin_authority(server_url, token)
    key = make_certificate_key(name)
    signing_key = make_signing_key() if role is Role.PROCESS_SERVER else None
    signing_public_key = None if signing_key is None else signing_key.public_key().public_bytes_raw()
    statement = transcript(
        token=token.identifier,
        role=role,
        name=name,
        request_pem=key.request_pem,
        signing_public_key=signing_public_key,
        authority_key_hash=token.authority_key_hash,
    )
    request = EnrollmentRequest(
        token=token.identifier,
        role=role,
        name=name,
        request_pem=key.request_pem,
        signing_public_key=signing_public_key,
        signing_proof=None if signing_key is None else signing_key.sign(statement),
        proof=prove(proof_key(token.secret), statement),
    )
    reply = await _send_enrollment(server_url, authority_pem, request)
    if reply.vault != vault or reply.role is not role:
        raise AnswerMalformed(server=server_url, reason="it enrols into another vault or role than was asked for")
    identity = EnrolledIdentity(
        peer=PeerIdentity(vault=reply.vault, role=role, identifier=reply.identifier),
        name=name,
        server_url=check_server_url(server_url),
        vault_authority_public_key=reply.vault_authority_public_key,
    )
    return EnrollmentBundle(
        identity=identity,
        credentials_pem=credentials_pem(reply.certificate, key),
        authority_pem=reply.certificate.authority_pem.encode(),
        signing_key_pem=None if signing_key is None else signing_key_pem(signing_key),
    )


async def _pin_authority(server_url: str, token: JoinToken) -> tuple[bytes, VaultId]:
    """The authority's certificate, if its key is the one in the token."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # why: nothing is known to verify with yet. What comes back is believed only if its hash is the token's.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = ControlConnection(server_url=server_url, context=context)
    try:
        description = await connection.request("GET", "/v1/authority", ServerDescription)
    finally:
        await connection.close()
    try:
        certificates = x509.load_pem_x509_certificates(description.authority_pem.encode())
    except (ValueError, x509.InvalidVersion) as error:
        raise AnswerMalformed(server=server_url, reason="its authority's certificate cannot be read") from error
    pinned = [one for one in certificates if public_key_hash(one) == token.authority_key_hash]
    if not pinned:
        raise ServerNotTrusted(server=server_url, reason="its authority's key is not the one in the join token")
    return pinned[0].public_bytes(serialization.Encoding.PEM), description.vault


async def _send_enrollment(server_url: str, authority_pem: bytes, request: EnrollmentRequest) -> EnrollmentReply:
    connection = ControlConnection(server_url=server_url, context=client_context(authority_pem=authority_pem))
    try:
        for attempt in range(1, ENROLLMENT_ATTEMPTS_MAX + 1):
            try:
                return await connection.request("POST", "/v1/enrollments", EnrollmentReply, body=request)
            except ServerUnreachable:
                if attempt == ENROLLMENT_ATTEMPTS_MAX:
                    raise
        raise AssertionError("the last attempt returns or raises")
    finally:
        await connection.close()
