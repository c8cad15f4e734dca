"""The control plane's language: what agents and process servers report, and the orders that they get back.

Reports are cumulative and idempotent: the same report twice changes nothing, so a lost reply costs only the repeat.
Whoever sends a message is known from its certificate; no field here names the sender, and none is trusted for it.
Every string and list is bounded; an unknown field is refused. Over HTTPS the bytes are JSON, binary values in base64.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final, Literal, Protocol, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationError,
)

from protocol.vocabulary import (
    DISK_SIZE_BYTES_MAX,
    EPOCH_MAX,
    SEQUENCE_MAX,
    Consistency,
    DiskId,
    MachineId,
    PointId,
    ProcessServerId,
    VaultId,
)

NAME_LENGTH_MAX: Final = 255
PATH_LENGTH_MAX: Final = 4096
DETAIL_LENGTH_MAX: Final = 2048
PEM_LENGTH_MAX: Final = 65536
RECORD_BYTES_MAX: Final = 2**18
FILE_SYSTEMS_PER_DISK_MAX: Final = 128
DISKS_PER_MACHINE_MAX: Final = 256
DISKS_PER_PROCESS_SERVER_MAX: Final = 4096
COMMITTED_POINTS_PER_REPORT_MAX: Final = 4096
ORDERS_PER_REPLY_MAX: Final = 1024
REVOKED_MAX: Final = 65536
FAULTS_PER_REPORT_MAX: Final = 64
WAIT_SECONDS_MAX: Final = 60.0
"""The longest that a long poll may ask to be held."""
BODY_BYTES_MAX: Final = 8 * 2**20
"""The largest body of a request or a reply."""
BODY_VALUES_MAX: Final = 2**18
"""The most values of a body: of the largest report it leaves three quarters for commas and brackets in texts.

Half a KiB is kept for each value while it is validated, and as much for each fault: 8 MiB of `{}` once took ten GiB and
a minute.
"""
FAULTS_TOLD_MAX: Final = 64
NO_REVISION: Final = ""
"""What a program that has no orders yet waits from: answered at once."""

_IDENTIFIER_PATTERN: Final = r"^[0-9a-f]{32}$"

Machine: TypeAlias = Annotated[MachineId, StringConstraints(pattern=_IDENTIFIER_PATTERN)]
Disk: TypeAlias = Annotated[DiskId, StringConstraints(pattern=_IDENTIFIER_PATTERN)]
Vault: TypeAlias = Annotated[VaultId, StringConstraints(pattern=_IDENTIFIER_PATTERN)]
ProcessServer: TypeAlias = Annotated[ProcessServerId, StringConstraints(pattern=_IDENTIFIER_PATTERN)]
Point: TypeAlias = Annotated[PointId, StringConstraints(pattern=_IDENTIFIER_PATTERN)]
Identifier: TypeAlias = Annotated[str, StringConstraints(pattern=_IDENTIFIER_PATTERN)]
CertificateSerial: TypeAlias = Annotated[str, StringConstraints(pattern=r"^([0-9A-F]{2}){1,20}$")]
"""A certificate's serial number as the ssl module and transport.tls give it: whole bytes in upper-case hexadecimal."""
Name: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=NAME_LENGTH_MAX)]
Text: TypeAlias = Annotated[str, StringConstraints(max_length=NAME_LENGTH_MAX)]
Path: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=PATH_LENGTH_MAX)]
Detail: TypeAlias = Annotated[str, StringConstraints(max_length=DETAIL_LENGTH_MAX)]
ErrorCode: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,64}$")]
Pem: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=PEM_LENGTH_MAX)]
Revision: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{0,32}$")]
"""Opaque: names one state of the receiver's orders. Equal revisions mean equal orders, over restarts too."""
Record: TypeAlias = Annotated[bytes, Field(min_length=1, max_length=RECORD_BYTES_MAX)]
"""A signed record of protocol.signed_records, byte for byte."""
SizeBytes: TypeAlias = Annotated[int, Field(ge=0, le=DISK_SIZE_BYTES_MAX)]
CountBytes: TypeAlias = Annotated[int, Field(ge=0, le=2**63 - 1)]
InstantNs: TypeAlias = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""Nanoseconds since the Unix epoch by the configuration server's clock."""
Epoch: TypeAlias = Annotated[int, Field(ge=1, le=EPOCH_MAX)]
Sequence: TypeAlias = Annotated[int, Field(ge=0, le=SEQUENCE_MAX)]
Port: TypeAlias = Annotated[int, Field(ge=1, le=65535)]
Seconds: TypeAlias = Annotated[float, Field(ge=0.01, le=86400 * 31, allow_inf_nan=False)]
SecondsOrNever: TypeAlias = Annotated[float, Field(ge=0.0, le=86400 * 31, allow_inf_nan=False)]
"""0: never."""


def _check_settled(value: Consistency) -> Consistency:
    if not value.is_settled:
        raise ValueError("an unsettled position is no recovery point")
    return value


SettledConsistency: TypeAlias = Annotated[Consistency, AfterValidator(_check_settled)]


def has_too_many_values(body: bytes) -> bool:
    """Whether a body may pass BODY_VALUES_MAX, and must not be parsed. Takes no memory."""
    return sum(body.count(mark) for mark in (b",", b"{", b"[")) > BODY_VALUES_MAX


def reason_of(error: ValidationError) -> str:
    """The first rule that was broken, in at most DETAIL_LENGTH_MAX characters and without any value of the input."""
    if error.error_count() > FAULTS_TOLD_MAX:
        return f"{error.error_count()} of its fields break the rules of their message"
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = ".".join(str(part)[:NAME_LENGTH_MAX] for part in first["loc"])
    return f"{place or 'it'}: {first['msg']}"[:DETAIL_LENGTH_MAX]


class ControlMessage(BaseModel):
    """What all control messages share: frozen, strict, and no field beyond the declared ones."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        ser_json_bytes="base64",
        val_json_bytes="base64",
        hide_input_in_errors=True,
    )


class DiskState(enum.Enum):
    """What an agent is doing for one disk."""

    WAITING = "waiting"
    """Registered; no process server is assigned or reachable yet, nothing was ever sent."""
    INITIAL_REPLICATION = "initial_replication"
    DELTA_REPLICATION = "delta_replication"
    RESYNCHRONIZATION = "resynchronization"
    PAUSED = "paused"
    """By order of an operator; changes are tracked and nothing is sent."""
    DISCONNECTED = "disconnected"
    """The process server cannot be reached; changes are tracked, the backlog grows."""
    STOPPED = "stopped"
    """An error that somebody must mend; see the report's error."""


class DiskKind(enum.Enum):
    BLOCK_DEVICE = "block_device"
    IMAGE_FILE = "image_file"


class ImageFileIdentity(ControlMessage):
    """What identifies an image file: where it lies, never its path."""

    file_system: Name
    """UUID of the file system that holds it; where it has none, another stable name of that file system."""
    inode: Annotated[int, Field(ge=1, le=2**64 - 1)]
    generation: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    """The inode's generation, where the file system tells it: a reused inode number is another file."""


class DiskIdentity(ControlMessage):
    """By what a disk is known, strongest first; None or empty where the disk has no such mark."""

    kind: DiskKind
    size_bytes: Annotated[int, Field(ge=1, le=DISK_SIZE_BYTES_MAX)]
    logical_sector_bytes: Literal[512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
    """512 for an image file."""
    wwn: Name | None = None
    serial: Name | None = None
    partition_table: Name | None = None
    """UUID of the partition table (GPT) or the signature (MBR)."""
    file_systems: Annotated[tuple[Name, ...], FailFast(), Field(max_length=FILE_SYSTEMS_PER_DISK_MAX)] = ()
    """UUIDs of the file systems on it, sorted."""
    image_file: ImageFileIdentity | None = None


class DiskRegistration(ControlMessage):
    """Agent → server: protect this disk. The same identity again gives the same disk again."""

    path: Path
    identity: DiskIdentity
    disk: Disk | None = None
    """The disk that the agent already knows it as, None for a newcomer."""


class ProcessServerAddress(ControlMessage):
    """Where agents find a process server's data port. Its certificate must carry `process_server`."""

    process_server: ProcessServer
    host: Name
    port: Port


class DiskAssignment(ControlMessage):
    """Server → agent, the answer to a registration. The registration is durable."""

    disk: Disk
    machine: Machine
    vault: Vault
    process_server: ProcessServerAddress | None
    """None until a process server has joined: the orders will bring it."""


class FaultReport(ControlMessage):
    """An error of protocol.errors as it is shown to operators."""

    code: ErrorCode
    detail: Detail
    hint: Detail = ""


class HostDescription(ControlMessage):
    """The machine as far as somebody who has to start it elsewhere must know."""

    name: Name
    processors: Annotated[int, Field(ge=1, le=65536)]
    memory_bytes: SizeBytes
    firmware: Literal["bios", "uefi"]


class DiskReport(ControlMessage):
    """Agent → server, as of now. Positions are what the process server told the agent."""

    disk: Disk
    path: Path
    state: DiskState
    source: Text
    """The change source in use: scan, bitmap or capture."""
    size_bytes: SizeBytes
    copied_bytes: SizeBytes = 0
    """Of the running copy-in."""
    copy_total_bytes: SizeBytes = 0
    """0 when no copy-in runs."""
    backlog_bytes: CountBytes = 0
    """Not yet committed."""
    epoch: Annotated[int, Field(ge=0, le=EPOCH_MAX)] = 0
    """0 before the first."""
    durable_sequence: Sequence = 0
    committed_sequence: Sequence = 0
    is_settled: bool = False
    error: FaultReport | None = None


class AgentReport(ControlMessage):
    """Agent → server, the heartbeat: everything about the machine, each time."""

    boot_id: Text
    agent_version: Text
    host: HostDescription
    disks: Annotated[tuple[DiskReport, ...], FailFast(), Field(max_length=DISKS_PER_MACHINE_MAX)] = ()


class DiskOrder(ControlMessage):
    """How one disk is to be protected now."""

    disk: Disk
    process_server: ProcessServerAddress | None
    is_paused: bool
    copy_interval_seconds: Seconds
    """How often a source that cannot capture looks for changes."""
    point_interval_seconds: Seconds
    """The crash-consistent point frequency."""


class RevocationList(ControlMessage):
    """The certificates that are no longer good. A receiver keeps the highest number it ever saw and never goes back."""

    number: Annotated[int, Field(ge=0, le=2**63 - 1)]
    serials: Annotated[tuple[CertificateSerial, ...], FailFast(), Field(max_length=REVOKED_MAX)] = ()


class AgentOrders(ControlMessage):
    """Server → agent: all that holds now; it replaces what was ordered before."""

    revision: Revision
    now_ns: InstantNs
    """The tick of the server's clock. An agent marks a point with the last one that it received, unchanged."""
    heartbeat_seconds: Seconds
    renew_certificate: bool
    freeze_interval_seconds: SecondsOrNever = 0.0
    """A live disk of which no round settled for so long makes its machine's file systems be frozen for a moment."""
    application_interval_seconds: SecondsOrNever = 0.0
    """The application-consistent point frequency, where the machine has scripts for it."""
    disks: Annotated[tuple[DiskOrder, ...], FailFast(), Field(max_length=DISKS_PER_MACHINE_MAX)]
    """Every disk of the machine that is to be protected. One that is missing here is no longer protected."""
    revoked: RevocationList


class DiskPosition(ControlMessage):
    """Process server → server: where a disk's newest epoch stands here; bytes count since the program began."""

    disk: Disk
    epoch: Epoch
    durable_sequence: Sequence
    committed_sequence: Sequence
    cached_bytes: CountBytes
    received_bytes: CountBytes
    stored_bytes: CountBytes


class CommittedPoint(ControlMessage):
    """Process server → server: the bookmark of a change set that can now be read in storage."""

    disk: Disk
    epoch: Epoch
    sequence: Annotated[int, Field(ge=1, le=SEQUENCE_MAX)]
    point: Point
    instant_ns: InstantNs
    """As the bookmark states it."""
    consistency: SettledConsistency


class ProcessServerReport(ControlMessage):
    """Process server → server, the heartbeat.

    When the answer has arrived, committed_points and completed_orders are durable at the configuration server and need
    not be sent again. Until then they are repeated: after a restart a process server reports the points of its newest
    segments once more rather than not at all.
    """

    version: Text
    host: Name
    """Where agents reach the data port."""
    port: Port
    cache_bytes: CountBytes
    cache_limit_bytes: CountBytes
    positions: Annotated[tuple[DiskPosition, ...], FailFast(), Field(max_length=DISKS_PER_PROCESS_SERVER_MAX)] = ()
    committed_points: Annotated[
        tuple[CommittedPoint, ...], FailFast(), Field(max_length=COMMITTED_POINTS_PER_REPORT_MAX)
    ] = ()
    completed_orders: Annotated[tuple[Identifier, ...], FailFast(), Field(max_length=ORDERS_PER_REPLY_MAX)] = ()
    faults: Annotated[tuple[FaultReport, ...], FailFast(), Field(max_length=FAULTS_PER_REPORT_MAX)] = ()


class PublishPoint(ControlMessage):
    """Server → process server: create this point's object in storage. An identical one there already is success."""

    kind: Literal["publish-point"] = "publish-point"
    order: Identifier
    point: Point
    record: Record


class PublishMachineDescription(ControlMessage):
    """Server → process server: create this version of a machine's description. An identical one is success."""

    kind: Literal["publish-machine-description"] = "publish-machine-description"
    order: Identifier
    machine: Machine
    version: Annotated[int, Field(ge=1, le=2**63 - 1)]
    record: Record


ProcessServerOrder: TypeAlias = Annotated[PublishPoint | PublishMachineDescription, Field(discriminator="kind")]


class ProcessServerOrders(ControlMessage):
    """Server → process server: all that holds now. An order is repeated until its completion was reported."""

    revision: Revision
    now_ns: InstantNs
    heartbeat_seconds: Seconds
    renew_certificate: bool
    grants: Annotated[tuple[Record, ...], FailFast(), Field(max_length=2 * DISKS_PER_PROCESS_SERVER_MAX)]
    """Signed grants: per disk of this process server the current epoch's and one spare, the next epoch's."""
    revoked: RevocationList
    orders: Annotated[tuple[ProcessServerOrder, ...], FailFast(), Field(max_length=ORDERS_PER_REPLY_MAX)]


class CertificateRequest(ControlMessage):
    """Any certificate holder → server: renew, with a new key."""

    request_pem: Pem


class CertificateBundle(ControlMessage):
    """Server → certificate holder."""

    certificate_pem: Pem
    """The leaf first, then what leads to the authority, if anything."""
    authority_pem: Pem
    """Every certificate authority to trust, one behind the other."""


class AgentControl(Protocol):
    """What an agent may ask of the configuration server.

    Every call raises protocol.control_errors.ControlFault: ServerUnreachable is retryable, a refusal is typed by its
    reason (RefusedByServer if by none that is known here). On return what the call states is durable at the server.
    """

    async def register_disk(self, registration: DiskRegistration) -> DiskAssignment:
        """Idempotent by the disk's identity."""
        ...

    async def unregister_disk(self, disk: DiskId, *, keep_data: bool) -> None:
        """Ends the protection; idempotent. keep_data=False: its history may be deleted by retention."""
        ...

    async def report(self, report: AgentReport) -> AgentOrders: ...

    async def wait_for_orders(self, revision: str, wait_seconds: float) -> AgentOrders:
        """Returns as soon as the orders' revision differs from `revision`, at the latest after `wait_seconds`."""
        ...

    async def renew(self, request_pem: str) -> CertificateBundle:
        """A new certificate for the same identity; the request carries the new key."""
        ...


class ProcessServerControl(Protocol):
    """What a process server may ask of the configuration server. Errors as in AgentControl."""

    async def report(self, report: ProcessServerReport) -> ProcessServerOrders: ...

    async def wait_for_orders(self, revision: str, wait_seconds: float) -> ProcessServerOrders:
        """Returns as soon as the orders' revision differs from `revision`, at the latest after `wait_seconds`."""
        ...

    async def renew(self, request_pem: str) -> CertificateBundle: ...
