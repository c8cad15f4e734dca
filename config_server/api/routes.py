"""The table of all routes: what each takes, gives, and whom it serves. A route that names nobody serves nobody."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from config_server.admission import AdmissionOffice
from config_server.audit import Actor
from config_server.control_plane import ControlPlane
from config_server.database.members import StoredCertificate
from config_server.operator_views import OperatorViews
from config_server.operators import Operator, OperatorOffice
from protocol.control import (
    BODY_BYTES_MAX,
    NO_REVISION,
    WAIT_SECONDS_MAX,
    AgentOrders,
    AgentReport,
    CertificateBundle,
    CertificateRequest,
    CertificateSerial,
    Disk,
    DiskAssignment,
    DiskRegistration,
    Identifier,
    ProcessServerOrders,
    ProcessServerReport,
    Revision,
)
from protocol.enrollment import EnrollmentReply, EnrollmentRequest
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
    OperatorRole,
    OperatorTokenCreated,
    OperatorTokenList,
    OperatorTokenRequest,
    PauseRequest,
    ProcessServerList,
    RecoveryPointList,
    ServerDescription,
)
from protocol.vocabulary import MachineId, ProcessServerId, Role

SMALL_BODY_BYTES_MAX: Final = 128 * 1024
"""For whoever is not yet a member, and for short requests."""


class Access(enum.Enum):
    """As whom somebody calls."""

    ANYONE = "anyone"
    """No credential: what is public, and enrolment, which proves a join token in its body."""
    AGENT = "agent"
    PROCESS_SERVER = "process-server"
    RECOVERY_WORKER = "recovery-worker"
    VIEWER = "viewer"
    OPERATOR = "operator"
    RECOVERY = "recovery"
    AUDITOR = "auditor"
    """These four: the bearer of an operator token with that role."""
    ADMINISTRATOR = "administrator"
    """The bearer of the admin token."""


ACCESS_OF_ROLE: Final = {
    Role.AGENT: Access.AGENT,
    Role.PROCESS_SERVER: Access.PROCESS_SERVER,
    Role.RECOVERY_WORKER: Access.RECOVERY_WORKER,
}
ACCESS_OF_OPERATOR: Final = {
    OperatorRole.VIEWER: Access.VIEWER,
    OperatorRole.OPERATOR: Access.OPERATOR,
    OperatorRole.RECOVERY: Access.RECOVERY,
    OperatorRole.AUDITOR: Access.AUDITOR,
}
MEMBERS: Final = frozenset(ACCESS_OF_ROLE.values())
STAFF: Final = frozenset({*ACCESS_OF_OPERATOR.values(), Access.ADMINISTRATOR})
NOBODY: Final[frozenset[Access]] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls. certificate: of a member; operator: of one of the staff."""

    access: Access
    certificate: StoredCertificate | None = None
    operator: Operator | None = None

    @property
    def member(self) -> StoredCertificate:
        """Of a route that serves members only."""
        if self.certificate is None:
            raise AssertionError("a route for members was entered without a certificate")
        return self.certificate

    @property
    def actor(self) -> Actor:
        """Of a route that serves staff only."""
        if self.operator is None:
            raise AssertionError("a route for staff was entered without a token")
        return self.operator.actor


class Parameters(BaseModel):
    """Of a path or a query: texts, so that numbers are read from them."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Nothing(Parameters):
    """No parameters, no body, or the empty reply `{}`."""


class DiskPath(Parameters):
    disk: Disk


class SerialPath(Parameters):
    serial: CertificateSerial


class OperatorTokenPath(Parameters):
    token: Identifier


class OrdersQuery(Parameters):
    """revision: of the orders that the caller has; wait_seconds: how long to hold the request while it is current."""

    revision: Revision = NO_REVISION
    wait_seconds: Annotated[float, Field(ge=0, le=WAIT_SECONDS_MAX, allow_inf_nan=False)] = 0.0


class KeepDataQuery(Parameters):
    keep_data: bool


class PointsQuery(Parameters):
    """The newest `limit` points, of one disk or of all."""

    disk: Disk | None = None
    limit: Annotated[int, Field(ge=1, le=POINTS_PER_PAGE_MAX)] = POINTS_PER_PAGE_MAX


class AuditQuery(Parameters):
    """Entries with numbers above `after`."""

    after: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    limit: Annotated[int, Field(ge=1, le=AUDIT_ENTRIES_PER_PAGE_MAX)] = AUDIT_ENTRIES_PER_PAGE_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """What the handlers work with."""

    control_plane: ControlPlane
    admission: AdmissionOffice
    operators: OperatorOffice
    views: OperatorViews


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that was let in and validated. path, query and body are of the route's types."""

    caller: Caller
    address: str
    """Where it comes from; of whoever stands in between, if somebody does."""
    path: Any
    query: Any
    body: Any

    @property
    def machine(self) -> MachineId:
        return MachineId(self.caller.member.identifier)

    @property
    def process_server(self) -> ProcessServerId:
        return ProcessServerId(self.caller.member.identifier)


Handler = Callable[[Rooms, Call], Awaitable[BaseModel]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One row of the table."""

    method: str
    template: str
    summary: str
    handler: Handler
    reply: type[BaseModel]
    serves: frozenset[Access] = NOBODY
    path: type[Parameters] = Nothing
    query: type[Parameters] = Nothing
    body: type[BaseModel] | None = None
    body_bytes_max: int = SMALL_BODY_BYTES_MAX


async def _describe(rooms: Rooms, call: Call) -> BaseModel:
    return rooms.admission.describe()


async def _enroll(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.admission.enroll(call.body, call.address)


async def _renew(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.admission.renew(call.caller.member, call.body.request_pem)


async def _register_disk(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.control_plane.register_disk(call.machine, call.body)


async def _unregister_disk(rooms: Rooms, call: Call) -> BaseModel:
    await rooms.control_plane.unregister_disk(call.machine, call.path.disk, keep_data=call.query.keep_data)
    return Nothing()


async def _agent_report(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.control_plane.agent_report(call.machine, call.body, call.caller.member)


async def _agent_orders(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.control_plane.wait_for_agent_orders(
        call.machine, call.caller.member, revision=call.query.revision, wait_seconds=call.query.wait_seconds
    )


async def _process_server_report(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.control_plane.process_server_report(call.process_server, call.body, call.caller.member)


async def _process_server_orders(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.control_plane.wait_for_process_server_orders(
        call.process_server,
        call.caller.member,
        revision=call.query.revision,
        wait_seconds=call.query.wait_seconds,
    )


async def _create_token(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.admission.create_token(call.body, call.caller.actor)


async def _machines(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.views.machines()


async def _disks(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.views.disks()


async def _disk(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.views.disk(call.path.disk)


async def _pause_disk(rooms: Rooms, call: Call) -> BaseModel:
    await rooms.control_plane.pause_disk(call.path.disk, call.caller.actor, is_paused=call.body.is_paused)
    return await rooms.views.disk(call.path.disk)


async def _points(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.views.points(disk=call.query.disk, limit=call.query.limit)


async def _process_servers(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.views.process_servers()


async def _certificates(rooms: Rooms, call: Call) -> BaseModel:
    return await rooms.views.certificates()


async def _revoke(rooms: Rooms, call: Call) -> BaseModel:
    await rooms.admission.revoke(call.path.serial, call.caller.actor)
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


_ANYONE = frozenset({Access.ANYONE})
_AGENT = frozenset({Access.AGENT})
_PROCESS_SERVER = frozenset({Access.PROCESS_SERVER})
_OPERATORS = frozenset({Access.OPERATOR, Access.ADMINISTRATOR})
_ADMINISTRATORS = frozenset({Access.ADMINISTRATOR})
_AUDITORS = frozenset({Access.AUDITOR, Access.ADMINISTRATOR})
_READERS = STAFF | {Access.RECOVERY_WORKER}

ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="GET",
        template="/v1/authority",
        summary="The certificate authority, to be compared with a join token's hash before it is believed",
        handler=_describe,
        reply=ServerDescription,
        serves=_ANYONE,
    ),
    Route(
        method="POST",
        template="/v1/enrollments",
        summary="Become a member by proving a join token",
        handler=_enroll,
        reply=EnrollmentReply,
        serves=_ANYONE,
        body=EnrollmentRequest,
    ),
    Route(
        method="POST",
        template="/v1/certificates",
        summary="Renew the caller's certificate with a new key",
        handler=_renew,
        reply=CertificateBundle,
        serves=MEMBERS,
        body=CertificateRequest,
    ),
    Route(
        method="POST",
        template="/v1/agent/disks",
        summary="Protect a disk of the calling machine",
        handler=_register_disk,
        reply=DiskAssignment,
        serves=_AGENT,
        body=DiskRegistration,
    ),
    Route(
        method="DELETE",
        template="/v1/agent/disks/{disk}",
        summary="End the protection of a disk of the calling machine",
        handler=_unregister_disk,
        reply=Nothing,
        serves=_AGENT,
        path=DiskPath,
        query=KeepDataQuery,
    ),
    Route(
        method="POST",
        template="/v1/agent/report",
        summary="An agent's heartbeat; answers with its orders",
        handler=_agent_report,
        reply=AgentOrders,
        serves=_AGENT,
        body=AgentReport,
        body_bytes_max=BODY_BYTES_MAX,
    ),
    Route(
        method="GET",
        template="/v1/agent/orders",
        summary="An agent's orders, held until they change",
        handler=_agent_orders,
        reply=AgentOrders,
        serves=_AGENT,
        query=OrdersQuery,
    ),
    Route(
        method="POST",
        template="/v1/process-server/report",
        summary="A process server's heartbeat; answers with its orders",
        handler=_process_server_report,
        reply=ProcessServerOrders,
        serves=_PROCESS_SERVER,
        body=ProcessServerReport,
        body_bytes_max=BODY_BYTES_MAX,
    ),
    Route(
        method="GET",
        template="/v1/process-server/orders",
        summary="A process server's orders, held until they change",
        handler=_process_server_orders,
        reply=ProcessServerOrders,
        serves=_PROCESS_SERVER,
        query=OrdersQuery,
    ),
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
        reply=MachineList,
        serves=_READERS,
    ),
    Route(
        method="GET",
        template="/v1/disks",
        summary="All disks with their progress and RPO",
        handler=_disks,
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
        reply=CertificateList,
        serves=_OPERATORS | _AUDITORS,
    ),
    Route(
        method="PUT",
        template="/v1/certificates/{serial}/revocation",
        summary="Revoke a certificate and all others of its holder",
        handler=_revoke,
        reply=Nothing,
        serves=_OPERATORS,
        path=SerialPath,
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
