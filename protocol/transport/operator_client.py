"""The HTTPS side of the control plane for operators: what the command line asks.

A change whose answer was lost is sent again under the same Idempotency-Key: it is not carried out twice.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Final, TypeVar

from pydantic import BaseModel

from protocol.control_errors import ServerUnreachable
from protocol.operator_messages import (
    AUDIT_ENTRIES_PER_PAGE_MAX,
    POINTS_PER_PAGE_MAX,
    AuditPage,
    CertificateList,
    DiskList,
    DiskStatus,
    JoinTokenCreated,
    JoinTokenRequest,
    MachineList,
    OperatorTokenCreated,
    OperatorTokenList,
    OperatorTokenRequest,
    PauseRequest,
    PolicyAssignment,
    PolicyList,
    PolicyStatus,
    ProcessServerList,
    RecoveryPointList,
    ReplicationPolicy,
    ServerDescription,
)
from protocol.transport.control_client import (
    REQUEST_SECONDS_MAX,
    ControlClient,
    ControlConnection,
    Nothing,
    client_context,
)
from protocol.vocabulary import DiskId, MachineId

CHANGE_ATTEMPTS_MAX: Final = 2

_Reply = TypeVar("_Reply", bound=BaseModel)
_List = TypeVar("_List", MachineList, DiskList, CertificateList)


class OperatorClient(ControlClient):
    """What the operator's command line may ask. token: an operator token, or the admin token."""

    def __init__(
        self,
        *,
        server_url: str,
        authority_pem: bytes,
        token: str,
        request_seconds_max: float = REQUEST_SECONDS_MAX,
    ) -> None:
        super().__init__(
            ControlConnection(
                server_url=server_url,
                context=client_context(authority_pem=authority_pem),
                bearer_token=token.strip(),
                request_seconds_max=request_seconds_max,
            )
        )

    async def _further(self, path: str, first: _List) -> AsyncIterator[_List]:
        """The pages behind this one. What is added or removed meanwhile may be there or not; nothing else is missed."""
        page = first
        while page.next is not None:
            page = await self._connection.request("GET", path, type(first), query={"after": page.next})
            yield page

    async def _change(
        self,
        method: str,
        path: str,
        reply: type[_Reply],
        *,
        body: BaseModel | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> _Reply:
        """Carried out once though its answer was lost and it is sent again."""
        marked = dict(headers or {}) | {"Idempotency-Key": secrets.token_hex(16)}
        for _ in range(CHANGE_ATTEMPTS_MAX - 1):
            with suppress(ServerUnreachable):
                return await self._connection.request(method, path, reply, body=body, headers=marked)
        return await self._connection.request(method, path, reply, body=body, headers=marked)

    async def create_token(self, request: JoinTokenRequest) -> JoinTokenCreated:
        """The reply is the only time that the token is shown."""
        return await self._change("POST", "/v1/join-tokens", JoinTokenCreated, body=request)

    async def machines(self) -> MachineList:
        """All, by name."""
        listed = await self._connection.request("GET", "/v1/machines", MachineList)
        machines = [*listed.machines]
        async for page in self._further("/v1/machines", listed):
            machines += page.machines
        machines.sort(key=lambda one: (one.name, one.machine))
        return listed.model_copy(update={"machines": tuple(machines), "next": None})

    async def disks(self) -> DiskList:
        """All, protected ones first, by machine and path."""
        listed = await self._connection.request("GET", "/v1/disks", DiskList)
        disks = [*listed.disks]
        async for page in self._further("/v1/disks", listed):
            disks += page.disks
        disks.sort(key=lambda one: (not one.is_protected, one.machine_name, one.path, one.disk))
        return listed.model_copy(update={"disks": tuple(disks), "next": None})

    async def disk(self, disk: DiskId) -> DiskStatus:
        """Raises ResourceNotFound."""
        return await self._connection.request("GET", f"/v1/disks/{disk}", DiskStatus)

    async def pause_disk(self, disk: DiskId, *, is_paused: bool) -> DiskStatus:
        """Raises ResourceNotFound."""
        return await self._change("PUT", f"/v1/disks/{disk}/pause", DiskStatus, body=PauseRequest(is_paused=is_paused))

    async def points(self, *, disk: DiskId | None = None, limit: int = POINTS_PER_PAGE_MAX) -> RecoveryPointList:
        """The newest `limit` recovery points, of one disk or of all."""
        query = {"limit": str(limit)} | ({} if disk is None else {"disk": disk})
        return await self._connection.request("GET", "/v1/points", RecoveryPointList, query=query)

    async def process_servers(self) -> ProcessServerList:
        return await self._connection.request("GET", "/v1/process-servers", ProcessServerList)

    async def certificates(self) -> CertificateList:
        """All that have not expired, newest first."""
        listed = await self._connection.request("GET", "/v1/certificates", CertificateList)
        certificates = [*listed.certificates]
        async for page in self._further("/v1/certificates", listed):
            certificates += page.certificates
        certificates.sort(key=lambda one: (-one.valid_from_ns, one.serial))
        return listed.model_copy(update={"certificates": tuple(certificates), "next": None})

    async def revoke_certificate(self, serial: str) -> None:
        """Idempotent. Raises ResourceNotFound."""
        await self._change("PUT", f"/v1/certificates/{serial}/revocation", Nothing)

    async def policies(self) -> PolicyList:
        return await self._connection.request("GET", "/v1/policies", PolicyList)

    async def create_policy(self, content: ReplicationPolicy) -> PolicyStatus:
        """Raises PolicyNameTaken."""
        return await self._change("POST", "/v1/policies", PolicyStatus, body=content)

    async def edit_policy(self, policy: str, content: ReplicationPolicy, *, version: int | None = None) -> PolicyStatus:
        """version: the one that the edit is based on. Raises ResourceNotFound, PolicyChanged, PolicyNameTaken."""
        return await self._change(
            "PUT", f"/v1/policies/{policy}", PolicyStatus, body=content, headers=_if_match(version)
        )

    async def delete_policy(self, policy: str, *, version: int | None = None) -> None:
        """version: the one that is meant. Raises ResourceNotFound, PolicyChanged, PolicyInUse."""
        await self._change("DELETE", f"/v1/policies/{policy}", Nothing, headers=_if_match(version))

    async def set_policy(self, machine: MachineId, policy: str | None) -> None:
        """None: the server's settings. Raises ResourceNotFound."""
        await self._change("PUT", f"/v1/machines/{machine}/policy", Nothing, body=PolicyAssignment(policy=policy))

    async def release_machine(self, machine: MachineId) -> None:
        """Idempotent. Raises ResourceNotFound."""
        await self._change("PUT", f"/v1/machines/{machine}/release", Nothing)

    async def describe(self) -> ServerDescription:
        return await self._connection.request("GET", "/v1/authority", ServerDescription)

    async def create_operator_token(self, request: OperatorTokenRequest) -> OperatorTokenCreated:
        """The reply is the only time that the token is shown."""
        return await self._change("POST", "/v1/operator-tokens", OperatorTokenCreated, body=request)

    async def operator_tokens(self) -> OperatorTokenList:
        return await self._connection.request("GET", "/v1/operator-tokens", OperatorTokenList)

    async def revoke_operator_token(self, token: str) -> None:
        """Idempotent. Raises ResourceNotFound."""
        await self._change("PUT", f"/v1/operator-tokens/{token}/revocation", Nothing)

    async def audit_page(self, *, after: int = 0, limit: int = AUDIT_ENTRIES_PER_PAGE_MAX) -> AuditPage:
        """The entries with numbers above `after`."""
        query = {"after": str(after), "limit": str(limit)}
        return await self._connection.request("GET", "/v1/audit", AuditPage, query=query)


def _if_match(version: int | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": f'"{version}"'}
