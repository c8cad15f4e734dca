"""What operators see of the configuration server and may change there: the JSON of its operator routes.

Statements about recoverability are made by the server's clock at `now_ns` of the reply; unknown is never shown as good.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from protocol.control import (
    CertificateSerial,
    ControlMessage,
    CountBytes,
    Detail,
    Disk,
    DiskIdentity,
    DiskPosition,
    DiskState,
    FaultReport,
    HostDescription,
    Identifier,
    InstantNs,
    Machine,
    Name,
    Path,
    Point,
    Port,
    ProcessServer,
    SettledConsistency,
    SizeBytes,
    Text,
    Vault,
)
from protocol.enrollment import EnrollableRole
from protocol.vocabulary import Role

POINTS_PER_PAGE_MAX: Final = 1000
ROWS_PER_PAGE_MAX: Final = 1000
"""Of machines, disks and certificates."""
JOIN_TOKEN_SECONDS_MAX: Final = 7 * 86400
JOIN_TOKEN_SECONDS_DEFAULT: Final = 3600
OPERATOR_TOKEN_SECONDS_MAX: Final = 366 * 86400
OPERATOR_TOKEN_SECONDS_DEFAULT: Final = 90 * 86400
AUDIT_ENTRIES_PER_PAGE_MAX: Final = 1000
COPY_INTERVALS_SECONDS: Final = (30.0, 300.0, 900.0)

PolicyName: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,63}$")]


def _check_readable(name: str) -> str:
    if not name.isprintable() or name != name.strip() or name.startswith("-"):
        raise ValueError("must be printable, without blanks at its ends or a hyphen at its beginning")
    return name


OperatorName: TypeAlias = Annotated[
    str, StringConstraints(min_length=1, max_length=64), AfterValidator(_check_readable)
]


class OperatorReply(BaseModel):
    """What replies to operators share. They may grow fields, unlike control messages: an older reader ignores them."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class RpoStatus(enum.Enum):
    UNKNOWN = "unknown"
    OK = "ok"
    MISSED = "missed"


class RpoReason(enum.Enum):
    """Why the status is what it is."""

    WITHIN_THRESHOLD = "within-threshold"
    BEYOND_THRESHOLD = "beyond-threshold"
    SILENT = "silent"
    """No recovery point yet and nothing heard for longer than the threshold."""
    NO_POINT = "no-point"
    CLOCK_JUMPED = "clock-jumped"
    """The newest point was marked before the server's clock was set; its age is known again from the next point on."""
    INSTANT_IMPLAUSIBLE = "instant-implausible"
    """The newest point states an instant that the server's clock never showed."""


class Rpo(OperatorReply):
    """How old the newest committed recovery point of one disk is."""

    status: RpoStatus
    reason: RpoReason
    age_seconds: Annotated[float, Field(ge=0)] | None
    """None where it is not known."""
    threshold_seconds: float


class DiskStatus(OperatorReply):
    """One disk: intent, what its agent and process server last reported, and its RPO."""

    disk: Disk
    machine: Machine
    machine_name: Text
    path: Path
    identity: DiskIdentity
    is_protected: bool
    is_paused: bool
    state: DiskState | None
    """None: its agent has not reported it yet."""
    source: Text
    is_settled: bool
    copied_bytes: SizeBytes
    copy_total_bytes: SizeBytes
    backlog_bytes: CountBytes
    reported_at_ns: InstantNs | None
    process_server: ProcessServer | None
    position: DiskPosition | None
    """As the process server reported it; None before the first."""
    newest_point: Point | None
    newest_point_instant_ns: InstantNs | None
    rpo: Rpo
    error: FaultReport | None


class MachineStatus(OperatorReply):
    machine: Machine
    name: Text
    host: HostDescription | None
    """None: its agent has enrolled and not reported yet."""
    agent_version: Text
    boot_id: Text
    last_heard_ns: InstantNs | None
    is_silent: bool
    """Nothing heard for three heartbeats."""
    disks: tuple[Disk, ...]
    is_quarantined: bool = False
    """Two agents have reported as this machine: nothing of either is taken until it is released."""
    policy: str | None = None
    """The replication policy's name; None: the server's settings."""


class ProcessServerStatus(OperatorReply):
    process_server: ProcessServer
    name: Text
    host: Text
    """Empty until its first report."""
    port: Port | None
    version: Text
    last_heard_ns: InstantNs | None
    is_silent: bool
    cache_bytes: CountBytes
    cache_limit_bytes: CountBytes
    disks: tuple[Disk, ...]
    open_orders: int
    faults: tuple[FaultReport, ...]


class RecoveryPointStatus(OperatorReply):
    point: Point
    disk: Disk
    machine: Machine
    epoch: int
    sequence: int
    instant_ns: InstantNs
    consistency: SettledConsistency
    recorded_at_ns: InstantNs
    is_published: bool
    """Its .point object is in storage."""


class CertificateStatus(OperatorReply):
    serial: CertificateSerial
    role: Role
    identifier: Identifier
    name: Text
    valid_from_ns: InstantNs
    valid_until_ns: InstantNs
    is_revoked: bool


class MachineList(OperatorReply):
    now_ns: InstantNs
    machines: tuple[MachineStatus, ...]
    next: str | None = None
    """What `after` has to be for the next page; None: there is none."""


class DiskList(OperatorReply):
    now_ns: InstantNs
    disks: tuple[DiskStatus, ...]
    next: str | None = None
    """What `after` has to be for the next page; None: there is none."""


class RecoveryPointList(OperatorReply):
    now_ns: InstantNs
    points: tuple[RecoveryPointStatus, ...]
    """Newest first."""
    next: str | None = None
    """What `after` has to be for the next page; None: there is none."""


class ProcessServerList(OperatorReply):
    now_ns: InstantNs
    process_servers: tuple[ProcessServerStatus, ...]


class CertificateList(OperatorReply):
    now_ns: InstantNs
    certificates: tuple[CertificateStatus, ...]
    next: str | None = None
    """What `after` has to be for the next page; None: there is none."""


class JoinTokenRequest(ControlMessage):
    """Operator → server: make one join token."""

    role: EnrollableRole
    lifetime_seconds: Annotated[int, Field(ge=1, le=JOIN_TOKEN_SECONDS_MAX)] = JOIN_TOKEN_SECONDS_DEFAULT


class JoinTokenCreated(OperatorReply):
    """The only time that the token's secret is shown."""

    token: Annotated[str, Field(max_length=256, repr=False)]
    role: Role
    expires_at_ns: InstantNs


class PauseRequest(ControlMessage):
    """Operator → server: hold back or resume the replication of one disk."""

    is_paused: bool


class ServerDescription(OperatorReply):
    """Anybody → server: whose authority this is. To be compared with a pinned hash before it is believed."""

    vault: Vault
    authority_pem: Annotated[str, Field(max_length=65536)]


class Problem(OperatorReply):
    """RFC 9457 problem+json: what every refusal looks like. `code` and `fields` are those of the error's type."""

    type: str
    title: str
    status: int
    code: Name
    detail: Detail
    hint: Detail = ""
    is_retryable: bool = False
    fields: dict[str, str | int | float | bool | None] = {}


class PolicyTerms(OperatorReply):
    """What a policy that was made says; see ReplicationPolicy."""

    name: str
    rpo_threshold_seconds: float
    point_interval_seconds: float
    application_interval_seconds: float
    freeze_interval_seconds: float
    copy_interval_seconds: float


class ReplicationPolicy(ControlMessage):
    """How machines are protected, as an operator asks for it. A validation error names the field and its rule."""

    name: PolicyName
    rpo_threshold_seconds: Annotated[float, Field(ge=30.0, le=31 * 86400.0, allow_inf_nan=False)]
    """An older newest point is a breach. It alerts only: replication goes as fast as it can anyway."""
    point_interval_seconds: Annotated[float, Field(ge=5.0, le=3600.0, allow_inf_nan=False)]
    """The crash-consistent point frequency while nothing changes; what changes is marked at once."""
    application_interval_seconds: Annotated[float, Field(allow_inf_nan=False)] = 3600.0
    """The application-consistent point frequency where machines have scripts for it: 1 to 12 h; 0: never."""
    freeze_interval_seconds: Annotated[float, Field(allow_inf_nan=False)] = 300.0
    """A live disk of which no round settled for so long makes its machine's file systems be frozen for a moment:
    30 s to 1 d; 0: never."""
    copy_interval_seconds: Annotated[float, Field(allow_inf_nan=False)] = 30.0
    """How often sources that cannot capture look for changes: every 30 s, 5 min or 15 min."""

    @field_validator("application_interval_seconds")
    @classmethod
    def _check_application(cls, value: float) -> float:
        return _never_or(value, 3600.0, 12 * 3600.0)

    @field_validator("freeze_interval_seconds")
    @classmethod
    def _check_freeze(cls, value: float) -> float:
        return _never_or(value, 30.0, 86400.0)

    @field_validator("copy_interval_seconds")
    @classmethod
    def _check_copy(cls, value: float) -> float:
        if value not in COPY_INTERVALS_SECONDS:
            raise ValueError("must be 30, 300 or 900")
        return value

    @model_validator(mode="after")
    def _check_threshold(self) -> Self:
        if self.rpo_threshold_seconds < 2 * self.point_interval_seconds:
            raise ValueError("rpo_threshold_seconds must be at least twice point_interval_seconds")
        if self.rpo_threshold_seconds < self.copy_interval_seconds:
            raise ValueError("rpo_threshold_seconds must not be below copy_interval_seconds")
        return self


def _never_or(value: float, low: float, high: float) -> float:
    if value == 0.0:
        return 0.0
    if not low <= value <= high:
        raise ValueError(f"must be 0, or from {low:g} to {high:g}")
    return value


class PolicyStatus(OperatorReply):
    """version: counts the edits; an edit that names another one is refused."""

    policy: Identifier
    version: Annotated[int, Field(ge=1)]
    content: PolicyTerms
    machines: tuple[Machine, ...]
    changed_at_ns: InstantNs


class PolicyList(OperatorReply):
    """Machines without a policy go by the server's settings."""

    now_ns: InstantNs
    policies: tuple[PolicyStatus, ...]


class PolicyAssignment(ControlMessage):
    """policy None: the server's settings count again."""

    policy: Identifier | None


class OperatorRole(enum.Enum):
    """What the holder of an operator token may do. Administrators, who alone make such tokens, hold the admin token."""

    VIEWER = "viewer"
    """See machines, disks, recovery points and process servers."""
    OPERATOR = "operator"
    """Change what is protected and how, besides: join tokens, pauses, revocations."""
    RECOVERY = "recovery"
    """See, and recover."""
    AUDITOR = "auditor"
    """See everything, the audit log and all tokens and certificates too; change nothing."""


class OperatorTokenRequest(ControlMessage):
    """name: of the person or program that will hold it, as the audit log will say."""

    name: OperatorName
    role: OperatorRole
    lifetime_seconds: Annotated[int, Field(ge=1, le=OPERATOR_TOKEN_SECONDS_MAX)] = OPERATOR_TOKEN_SECONDS_DEFAULT


class OperatorTokenCreated(OperatorReply):
    """secret_token: the bearer token, whose only appearance this is."""

    token: Identifier
    secret_token: Text = Field(repr=False)
    name: Name
    role: OperatorRole
    expires_at_ns: InstantNs


class OperatorTokenStatus(OperatorReply):
    """used_at_ns: when it was last seen, to within an hour; None: never."""

    token: Identifier
    name: Name
    role: OperatorRole
    created_at_ns: InstantNs
    expires_at_ns: InstantNs
    used_at_ns: InstantNs | None
    is_revoked: bool


class OperatorTokenList(OperatorReply):
    now_ns: InstantNs
    tokens: tuple[OperatorTokenStatus, ...]


class AuditEntry(OperatorReply):
    """One change, by whom, and what it was about, as it is stored: whether it is what was written, the chain says.

    hash: see protocol.audit_chain.
    """

    format: int
    number: int
    at_ns: int
    actor_kind: str
    """`administrator`, a role of operators or of members, or `newcomer`."""
    actor: str
    """The identifier of the token or member."""
    actor_name: str
    action: str
    subject: str
    """The identifier of what was changed."""
    details: dict[str, str]
    hash: str


class AuditPage(OperatorReply):
    """Entries by rising number. newest_number: of the last one that there is, on this page or later; 0: none."""

    now_ns: InstantNs
    entries: tuple[AuditEntry, ...]
    newest_number: Annotated[int, Field(ge=0)]
