"""The routes of operators, and of recovery workers who look things up."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, Field, field_validator

from config_server.api.route import (
    STAFF,
    Access,
    Call,
    DiskPath,
    Nothing,
    Parameters,
    Rooms,
    Route,
    answer_nothing,
)
from config_server.operator_views import Page
from protocol.control import (
    CertificateSerial,
    Disk,
    Identifier,
    Machine,
)
from protocol.operator_messages import (
    AUDIT_ENTRIES_PER_PAGE_MAX,
    POINTS_PER_PAGE_MAX,
    ROWS_PER_PAGE_MAX,
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
)
from protocol.vocabulary import DiskId


class SerialPath(Parameters):
    serial: CertificateSerial


class PolicyPath(Parameters):
    policy: Identifier


class MachinePath(Parameters):
    machine: Machine


class OperatorTokenPath(Parameters):
    token: Identifier


class PageQuery(Parameters):
    """By identifier; after: `next` of the page before."""

    after: Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")] = ""
    limit: Annotated[int, Field(ge=1, le=ROWS_PER_PAGE_MAX)] = ROWS_PER_PAGE_MAX

    @property
    def page(self) -> Page:
        return Page(after=self.after, limit=self.limit)


class SerialPageQuery(PageQuery):
    """By serial."""

    after: Annotated[str, Field(pattern=r"^([0-9A-F]{2}){0,20}$")] = ""


class PointsQuery(Parameters):
    """The newest `limit` points, of one disk or of all; after: `next` of the page before."""

    disk: Disk | None = None
    after: Annotated[str, Field(pattern=r"^(([0-9]{1,19}\.){3}[0-9a-f]{32})?$")] = ""
    limit: Annotated[int, Field(ge=1, le=POINTS_PER_PAGE_MAX)] = POINTS_PER_PAGE_MAX

    @field_validator("after")
    @classmethod
    def _check_numbers(cls, value: str) -> str:
        if any(int(number) >= 2**63 for number in value.split(".")[:-1]):
            raise ValueError("holds a number that no point has")
        return value

    @property
    def position(self) -> tuple[int, int, int, str] | None:
        """(instant, epoch, sequence, disk); None: from the newest on."""
        if not self.after:
            return None
        instant_ns, epoch, sequence, disk = self.after.split(".")
        return int(instant_ns), int(epoch), int(sequence), disk


class AuditQuery(Parameters):
    """Entries with numbers above `after`."""

    after: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    limit: Annotated[int, Field(ge=1, le=AUDIT_ENTRIES_PER_PAGE_MAX)] = AUDIT_ENTRIES_PER_PAGE_MAX


async def _create_token(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.admission.create_token(call.body, call.caller.actor)


async def _machines(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.views.machines(call.query.page)


async def _disks(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.views.disks(call.query.page)


async def _disk(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.views.disk(call.path.disk)


async def _pause_disk(rooms: Rooms, call: Call) -> BaseModel:
    await rooms.control_plane.pause_disk(call.path.disk, call.caller.actor, is_paused=call.body.is_paused)
    return await rooms.views.disk(call.path.disk)


async def _points(rooms: Rooms, call: Call) -> BaseModel:
    query: PointsQuery = call.query
    return await rooms.views.points(disk=query.disk, after=query.position, limit=query.limit)


async def _process_servers(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.views.process_servers()


async def _certificates(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.views.certificates(call.query.page)


async def _revoke(rooms: Rooms, call: Call) -> BaseModel:
    await rooms.admission.revoke(call.path.serial, call.caller.actor)
    return Nothing()


async def _create_policy(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.policies.create(call.body, call.caller.actor)


async def _policies(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.policies.policies()


async def _policy(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.policies.policy(call.path.policy)


async def _edit_policy(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.policies.edit(call.path.policy, call.body, call.caller.actor, version=call.version)


async def _delete_policy(rooms: Rooms, call: Call) -> BaseModel:
    await rooms.policies.delete(call.path.policy, call.caller.actor, version=call.version)
    return Nothing()


async def _set_policy(rooms: Rooms, call: Call) -> BaseModel:
    await rooms.policies.assign(call.path.machine, call.body.policy, call.caller.actor)
    return Nothing()


async def _release_machine(rooms: Rooms, call: Call) -> BaseModel:
    await rooms.control_plane.release_machine(call.path.machine, call.caller.actor)
    return Nothing()


async def _create_operator_token(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.operators.create_token(call.body, call.caller.actor)


async def _operator_tokens(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.operators.tokens()


async def _revoke_operator_token(rooms: Rooms, call: Call) -> BaseModel:
    await rooms.operators.revoke_token(call.path.token, call.caller.actor)
    return Nothing()


async def _audit(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.operators.audit_page(after=call.query.after, limit=call.query.limit)


async def _disk_again(rooms: Rooms, subject: str) -> BaseModel:
    return await rooms.views.disk(DiskId(subject))


async def _policy_again(rooms: Rooms, subject: str) -> BaseModel:
    return await rooms.policies.policy(subject)


_OPERATORS = frozenset({Access.OPERATOR, Access.ADMINISTRATOR})
_ADMINISTRATORS = frozenset({Access.ADMINISTRATOR})
_AUDITORS = frozenset({Access.AUDITOR, Access.ADMINISTRATOR})
_READERS = STAFF | {Access.RECOVERY_WORKER}

STAFF_ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="POST",
        template="/v1/join-tokens",
        summary="Make a join token; the only time that it is shown",
        handler=_create_token,
        reply=JoinTokenCreated,
        serves=_OPERATORS,
        body=JoinTokenRequest,
    ),
    Route(
        method="GET",
        template="/v1/machines",
        summary="All machines",
        handler=_machines,
        query=PageQuery,
        reply=MachineList,
        serves=_READERS,
    ),
    Route(
        method="GET",
        template="/v1/disks",
        summary="All disks with their progress and RPO",
        handler=_disks,
        query=PageQuery,
        reply=DiskList,
        serves=_READERS,
    ),
    Route(
        method="GET",
        template="/v1/disks/{disk}",
        summary="One disk with its progress and RPO",
        handler=_disk,
        reply=DiskStatus,
        serves=_READERS,
        path=DiskPath,
    ),
    Route(
        method="PUT",
        template="/v1/disks/{disk}/pause",
        summary="Hold back or resume the replication of a disk",
        handler=_pause_disk,
        repeat=_disk_again,
        reply=DiskStatus,
        serves=_OPERATORS,
        path=DiskPath,
        body=PauseRequest,
    ),
    Route(
        method="GET",
        template="/v1/points",
        summary="Recovery points, newest first",
        handler=_points,
        reply=RecoveryPointList,
        serves=_READERS,
        query=PointsQuery,
    ),
    Route(
        method="GET",
        template="/v1/process-servers",
        summary="All process servers",
        handler=_process_servers,
        reply=ProcessServerList,
        serves=STAFF,
    ),
    Route(
        method="GET",
        template="/v1/certificates",
        summary="All certificates that have not expired",
        handler=_certificates,
        query=SerialPageQuery,
        reply=CertificateList,
        serves=_OPERATORS | _AUDITORS,
    ),
    Route(
        method="PUT",
        template="/v1/certificates/{serial}/revocation",
        summary="Revoke a certificate and all others of its holder",
        handler=_revoke,
        repeat=answer_nothing,
        reply=Nothing,
        serves=_OPERATORS,
        path=SerialPath,
    ),
    Route(
        method="POST",
        template="/v1/policies",
        summary="Make a replication policy",
        handler=_create_policy,
        repeat=_policy_again,
        reply=PolicyStatus,
        serves=_OPERATORS,
        body=ReplicationPolicy,
    ),
    Route(
        method="GET",
        template="/v1/policies",
        summary="All replication policies",
        handler=_policies,
        reply=PolicyList,
        serves=STAFF,
    ),
    Route(
        method="GET",
        template="/v1/policies/{policy}",
        summary="One replication policy; its version is the ETag",
        handler=_policy,
        reply=PolicyStatus,
        serves=STAFF,
        path=PolicyPath,
    ),
    Route(
        method="PUT",
        template="/v1/policies/{policy}",
        summary="Edit a replication policy, of the version in If-Match if that is given",
        handler=_edit_policy,
        takes_version=True,
        repeat=_policy_again,
        reply=PolicyStatus,
        serves=_OPERATORS,
        path=PolicyPath,
        body=ReplicationPolicy,
    ),
    Route(
        method="DELETE",
        template="/v1/policies/{policy}",
        summary="Delete a replication policy that holds for no machine, of the version in If-Match if that is given",
        handler=_delete_policy,
        takes_version=True,
        repeat=answer_nothing,
        reply=Nothing,
        serves=_OPERATORS,
        path=PolicyPath,
    ),
    Route(
        method="PUT",
        template="/v1/machines/{machine}/policy",
        summary="Give a machine a replication policy, or take it away",
        handler=_set_policy,
        repeat=answer_nothing,
        reply=Nothing,
        serves=_OPERATORS,
        path=MachinePath,
        body=PolicyAssignment,
    ),
    Route(
        method="PUT",
        template="/v1/machines/{machine}/release",
        summary="End a machine's quarantine: whoever reports first is taken for it",
        handler=_release_machine,
        repeat=answer_nothing,
        reply=Nothing,
        serves=_OPERATORS,
        path=MachinePath,
    ),
    Route(
        method="POST",
        template="/v1/operator-tokens",
        summary="Make an operator token; the only time that it is shown",
        handler=_create_operator_token,
        reply=OperatorTokenCreated,
        serves=_ADMINISTRATORS,
        body=OperatorTokenRequest,
    ),
    Route(
        method="GET",
        template="/v1/operator-tokens",
        summary="All operator tokens that were ever made, without their secrets",
        handler=_operator_tokens,
        reply=OperatorTokenList,
        serves=_AUDITORS,
    ),
    Route(
        method="PUT",
        template="/v1/operator-tokens/{token}/revocation",
        summary="Revoke an operator token",
        handler=_revoke_operator_token,
        repeat=answer_nothing,
        reply=Nothing,
        serves=_ADMINISTRATORS,
        path=OperatorTokenPath,
    ),
    Route(
        method="GET",
        template="/v1/audit",
        summary="The audit log, oldest first",
        handler=_audit,
        reply=AuditPage,
        serves=_AUDITORS,
        query=AuditQuery,
    ),
)
