"""What a route is: what it takes, gives, and whom it serves. One that names nobody serves nobody."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from config_server.admission import AdmissionOffice
from config_server.audit import Actor
from config_server.control_plane import ControlPlane
from config_server.database.members import StoredCertificate
from config_server.operator_views import OperatorViews
from config_server.operators import Operator, OperatorOffice
from config_server.policies import PolicyOffice
from protocol.control import (
    Disk,
)
from protocol.operator_messages import (
    OperatorRole,
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


async def answer_nothing(rooms: Rooms, subject: str) -> BaseModel:
    """The Repeat of what answers nothing."""
    return Nothing()


class DiskPath(Parameters):
    disk: Disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """What the handlers work with."""

    control_plane: ControlPlane
    admission: AdmissionOffice
    operators: OperatorOffice
    policies: PolicyOffice
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
    version: int | None = None
    """The one in If-Match, of a resource that has versions; None: it does not matter."""

    @property
    def machine(self) -> MachineId:
        return MachineId(self.caller.member.identifier)

    @property
    def process_server(self) -> ProcessServerId:
        return ProcessServerId(self.caller.member.identifier)


Handler = Callable[[Rooms, Call], Awaitable[BaseModel]]
Repeat = Callable[[Rooms, str], Awaitable[BaseModel]]
"""The answer to a request that was carried out before, from the identifier of what it changed."""


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
    repeat: Repeat | None = None
    """None: the answer cannot be given again."""
    takes_version: bool = False
    """Whether If-Match counts."""

    @property
    def has_version(self) -> bool:
        """Whether the reply is of a resource with versions: they are its ETags."""
        return "version" in self.reply.model_fields
