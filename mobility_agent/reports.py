"""What the agent tells the configuration server of its machine and disks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from mobility_agent.core.replication import State
from mobility_agent.disk_status import DiskStatus
from protocol.control import (
    DETAIL_LENGTH_MAX,
    AgentReport,
    DiskReport,
    DiskState,
    FaultReport,
    HostDescription,
)
from protocol.errors import RefusedByPeer, ReplicationError

if TYPE_CHECKING:
    from mobility_agent.service import ProtectionStatus

_CODE: Final = re.compile(r"[a-z0-9-]{1,64}")
"""What the control plane takes as an error's code; a peer may have sent anything."""

_STATES: Final = {
    State.INITIAL_REPLICATION: DiskState.INITIAL_REPLICATION,
    State.DELTA_REPLICATION: DiskState.DELTA_REPLICATION,
    State.FREEZE: DiskState.DELTA_REPLICATION,
    State.RESYNCHRONIZATION: DiskState.RESYNCHRONIZATION,
    State.PAUSED: DiskState.PAUSED,
    State.STOPPED: DiskState.STOPPED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What somebody who has to start this machine elsewhere must know."""

    boot_id: str = ""
    agent_version: str = version("farpoint")
    host: HostDescription = field(
        default_factory=lambda: HostDescription(name="machine", processors=1, memory_bytes=0, firmware="bios")
    )


def agent_report(machine: MachineFacts, protection: Sequence[ProtectionStatus]) -> AgentReport:
    """The heartbeat. Disks that are not registered yet are left out."""
    return AgentReport(
        boot_id=machine.boot_id,
        agent_version=machine.agent_version,
        host=machine.host,
        disks=tuple(report for status in protection if (report := _disk_report(status)) is not None),
    )


def disk_state(status: DiskStatus) -> DiskState:
    """As operators are told: what is between two states counts as waiting, or disconnected if anything was ever
    sent."""
    return _STATES.get(status.state) or (DiskState.DISCONNECTED if status.epoch else DiskState.WAITING)


def fault_report(error: ReplicationError) -> FaultReport:
    code = error.code
    if isinstance(error, RefusedByPeer) and _CODE.fullmatch(str(error.fields["peer_code"])):
        code = str(error.fields["peer_code"])
    return FaultReport(code=code, detail=str(error)[:DETAIL_LENGTH_MAX], hint=error.hint[:DETAIL_LENGTH_MAX])


def _disk_report(status: ProtectionStatus) -> DiskReport | None:
    if status.disk is None or status.release is not None:
        return None
    now = status.replication
    if now is None:
        return DiskReport(
            disk=status.disk,
            path=status.path,
            state=DiskState.WAITING,
            source="scan",
            size_bytes=status.identity.size_bytes,
        )
    return DiskReport(
        disk=status.disk,
        path=status.path,
        state=disk_state(now),
        source=now.source,
        size_bytes=now.size_bytes,
        copied_bytes=now.copied_bytes,
        copy_total_bytes=now.copy_total_bytes,
        backlog_bytes=now.backlog_bytes,
        epoch=now.epoch,
        durable_sequence=now.durable_sequence,
        committed_sequence=min(now.committed_sequence, now.durable_sequence),
        is_settled=now.is_settled,
        error=None if now.error is None else fault_report(now.error),
    )
