"""Who is let in and stays in: join tokens, enrolment, renewal, revocation, and whose certificate a caller shows.

A token is used up in the same transaction that admits its holder. Whoever is revoked is refused from the next request
on, whatever the certificate says.
"""

from __future__ import annotations

import secrets

from sqlalchemy.ext.asyncio import AsyncConnection

from config_server.announcements import Announcements
from config_server.audit import NEWCOMER, Actor, AuditLog
from config_server.clock import ServerClock
from config_server.core.join_tokens import Admission, StoredJoinToken, decide_admission, is_token_proved
from config_server.database.engine import Database
from config_server.database.members import (
    StoredCertificate,
    add_certificate,
    add_join_token,
    add_machine,
    add_process_server,
    find_certificate,
    find_join_token,
    find_machine,
    forget_join_tokens,
    revoke_certificates,
    use_join_token,
)
from config_server.installation import Installation
from config_server.wrong_secrets import WrongSecrets
from protocol.control import CertificateBundle
from protocol.control_errors import JoinTokenWrong, MachineQuarantined, ResourceNotFound
from protocol.enrollment import EnrollmentReply, EnrollmentRequest, proof_key
from protocol.errors import CertificateRefused
from protocol.join_token import SECRET_BYTES, JoinToken
from protocol.operator_messages import JOIN_TOKEN_SECONDS_MAX, JoinTokenCreated, JoinTokenRequest, ServerDescription
from protocol.vocabulary import MachineId, PeerIdentity, ProcessServerId, Role

_TOKEN_REMEMBERED_NS = JOIN_TOKEN_SECONDS_MAX * 10**9
"""How long after its expiry a token is still known, so that its holder hears the true reason."""


class AdmissionOffice:
    """All methods: what they state is durable on return."""

    def __init__(
        self,
        *,
        installation: Installation,
        database: Database,
        clock: ServerClock,
        announcements: Announcements,
        audit: AuditLog,
        wrong_secrets: WrongSecrets,
    ) -> None:
        self._installation = installation
        self._authority = installation.authority
        self._database = database
        self._clock = clock
        self._announcements = announcements
        self._audit = audit
        self._wrong_secrets = wrong_secrets

    def describe(self) -> ServerDescription:
        return ServerDescription(vault=self._installation.vault, authority_pem=self._authority.certificate_pem.decode())

    async def create_token(self, request: JoinTokenRequest, actor: Actor) -> JoinTokenCreated:
        """The secret is not kept, only what a proof of it is checked with."""
        now_ns = (await self._clock.tick()).tick_ns
        token = JoinToken(
            identifier=secrets.token_hex(16),
            secret=secrets.token_bytes(SECRET_BYTES),
            authority_key_hash=self._authority.public_key_hash,
        )
        stored = StoredJoinToken(
            token=token.identifier,
            role=request.role,
            proof_key=proof_key(token.secret),
            expires_ns=now_ns + request.lifetime_seconds * 10**9,
            used_by=None,
        )
        async with self._database.writing() as connection:
            await self._audit.check_new(connection, actor)
            await forget_join_tokens(connection, expired_before_ns=now_ns - _TOKEN_REMEMBERED_NS)
            await add_join_token(connection, stored)
            await self._audit.record(
                connection,
                actor,
                "create join token",
                stored.token,
                now_ns=now_ns,
                role=stored.role.value,
                expires_at_ns=str(stored.expires_ns),
            )
        return JoinTokenCreated(token=token.format(), role=request.role, expires_at_ns=stored.expires_ns)

    async def enroll(self, request: EnrollmentRequest, address: str) -> EnrollmentReply:
        """address: where the newcomer is. Raises JoinTokenWrong, JoinTokenForAnotherRole, JoinTokenUsed,
        JoinTokenExpired, RequestInvalid, CertificateRequestInvalid, TooManyAttempts."""
        # why before all else: who does not prove a token keeps nobody from writing, and is slowed down
        async with self._database.reading() as connection:
            stored, _ = await find_join_token(connection, request.token) or (None, None)
        if not is_token_proved(request, stored, authority_key_hash=self._authority.public_key_hash):
            self._wrong_secrets.note(address)
            raise JoinTokenWrong(token=request.token)
        return await self._enroll(request)

    async def _enroll(self, request: EnrollmentRequest) -> EnrollmentReply:
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.writing() as connection:
            stored, earlier_reply = await find_join_token(connection, request.token) or (None, None)
            decision = decide_admission(
                request, stored, authority_key_hash=self._authority.public_key_hash, now_ns=now_ns
            )
            if decision.admission is Admission.REPEAT and earlier_reply is not None:
                return EnrollmentReply.model_validate_json(earlier_reply)
            identity = PeerIdentity(vault=self._installation.vault, role=request.role, identifier=secrets.token_hex(16))
            certificate = await self._issue(connection, request.request_pem, identity, name=request.name, now_ns=now_ns)
            await _add_member(connection, identity, request, now_ns=now_ns)
            reply = EnrollmentReply(
                vault=identity.vault,
                role=request.role,
                identifier=identity.identifier,
                certificate=certificate,
                vault_authority_public_key=self._installation.vault_authority.public_key.public_bytes_raw(),
            )
            await use_join_token(
                connection, request.token, used_by=decision.request_hash, reply=reply.model_dump_json()
            )
            await self._audit.record(
                connection,
                Actor(kind=NEWCOMER, identifier=request.token, name=request.name),
                "enrol",
                identity.identifier,
                now_ns=now_ns,
                role=request.role.value,
            )
        return reply

    async def authenticate(self, identity: PeerIdentity, serial: str) -> StoredCertificate:
        """The certificate that a caller has shown. Raises CertificateRefused, MachineQuarantined."""
        async with self._database.reading() as connection:
            stored = await find_certificate(connection, serial)
            machine = None
            if identity.role is Role.AGENT:
                machine = await find_machine(connection, MachineId(identity.identifier))
        if stored is None or (stored.role, stored.identifier) != (identity.role, identity.identifier):
            raise CertificateRefused(subject=identity.uri, reason="this server has not issued it")
        if identity.vault != self._installation.vault:
            raise CertificateRefused(subject=identity.uri, reason="it is another vault's")
        if stored.is_revoked:
            raise CertificateRefused(subject=identity.uri, reason="it has been revoked")
        if machine is not None and machine.is_quarantined:
            raise MachineQuarantined(machine=machine.machine)
        # why: the handshake looked at the validity, but a connection can outlive it
        if (await self._clock.tick()).tick_ns >= stored.valid_until_ns:
            raise CertificateRefused(subject=identity.uri, reason="it has expired, by this server's clock")
        return stored

    async def renew(self, holder: StoredCertificate, request_pem: str) -> CertificateBundle:
        """Raises CertificateRequestInvalid, CertificateRefused (revoked meanwhile)."""
        now_ns = (await self._clock.tick()).tick_ns
        identity = PeerIdentity(vault=self._installation.vault, role=holder.role, identifier=holder.identifier)
        async with self._database.writing() as connection:
            stored = await find_certificate(connection, holder.serial)
            if stored is None or stored.is_revoked:
                raise CertificateRefused(subject=identity.uri, reason="it has been revoked")
            bundle = await self._issue(connection, request_pem, identity, name=holder.name, now_ns=now_ns)
            actor = Actor(kind=holder.role.value, identifier=holder.identifier, name=holder.name)
            await self._audit.record(
                connection, actor, "renew certificate", holder.identifier, now_ns=now_ns, serial=holder.serial
            )
        return bundle

    async def revoke(self, serial: str, actor: Actor) -> None:
        """All certificates of this one's holder: a thief may have renewed it. Raises ResourceNotFound."""
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.writing() as connection:
            await self._audit.check_new(connection, actor)
            stored = await find_certificate(connection, serial)
            if stored is None:
                raise ResourceNotFound(what="certificate", identifier=serial)
            if stored.is_revoked:
                return
            await revoke_certificates(connection, role=stored.role, identifier=stored.identifier)
            await self._audit.record(
                connection, actor, "revoke certificates", stored.identifier, now_ns=now_ns, role=stored.role.value
            )
        self._announcements.announce_to_all()

    async def _issue(
        self, connection: AsyncConnection, request_pem: str, identity: PeerIdentity, *, name: str, now_ns: int
    ) -> CertificateBundle:
        issued = self._authority.issue(request_pem, identity, name=name, now_ns=now_ns)
        stored = StoredCertificate(
            serial=issued.serial,
            role=identity.role,
            identifier=identity.identifier,
            name=name,
            valid_from_ns=issued.valid_from_ns,
            valid_until_ns=issued.valid_until_ns,
            revocation_number=None,
        )
        await add_certificate(connection, stored)
        return self._authority.bundle(issued)


async def _add_member(
    connection: AsyncConnection, identity: PeerIdentity, request: EnrollmentRequest, *, now_ns: int
) -> None:
    match request.role:
        case Role.AGENT:
            await add_machine(connection, MachineId(identity.identifier), name=request.name, now_ns=now_ns)
        case Role.PROCESS_SERVER:
            await add_process_server(
                connection,
                ProcessServerId(identity.identifier),
                name=request.name,
                signing_public_key=request.signing_public_key or b"",
                now_ns=now_ns,
            )
        case Role.RECOVERY_WORKER:
            pass  # its certificate is all there is to it
