"""What an operator may set for the mobility agent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field

from mobility_agent.core.tracking_choice import WantedSource
from mobility_agent.io_priority import IoPriority
from mobility_agent.service import AgentLimits
from protocol.vocabulary import CHANGE_SET_RAW_BYTES_MAX, FRAME_RAW_BYTES_MAX
from runtime.logs import LogSettings
from runtime.observability import ObservabilitySettings
from runtime.settings import Settings
from runtime.units import Bytes, Seconds

DEFAULT_STATE_DIRECTORY: Final = Path("/var/lib/farpoint/mobility-agent")
DEFAULT_TRACKING_DIRECTORY: Final = Path("/sys/fs/bpf/farpoint")
DEFAULT_OBSERVABILITY_ADDRESS: Final = "127.0.0.1:9464"


class FreezeSettings(BaseModel):
    """The `freeze` section: what holding file systems still for a moment may cost, and who is told of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds_max: Annotated[Seconds, Field(ge=0.05, le=60)] = 1.0
    """They are thawed after so long, whatever becomes of the agent."""
    scripts_directory: Path = Path("/etc/farpoint/scripts.d")
    """Executables of root's alone, run with `freeze` before and with `thaw` after."""
    script_seconds_max: Annotated[Seconds, Field(ge=1, le=3600)] = 30.0
    """For each of them, each time."""


class AgentSettings(Settings):
    """Seconds and bytes where the name says so."""

    state_directory: Path = DEFAULT_STATE_DIRECTORY
    change_set_bytes: Annotated[Bytes, Field(ge=FRAME_RAW_BYTES_MAX, le=CHANGE_SET_RAW_BYTES_MAX)] = 8 * 2**20
    """Raw data per change set of a copy-in."""
    frame_buffers: Annotated[int, Field(ge=2, le=256)] = 8
    """Of 1 MiB each: what the agent holds of its disks' data in memory, over all disks."""
    worker_threads: Annotated[int, Field(ge=1, le=64)] = 2
    tracking: WantedSource = WantedSource.AUTO
    """auto: the best source that the machine allows; bitmap: nothing less; scan: nothing more."""
    tracking_directory: Path = DEFAULT_TRACKING_DIRECTORY
    """In a BPF file system; each agent has a directory of its own in it."""
    freeze: FreezeSettings = FreezeSettings()
    copy_read_bytes_per_second: Annotated[Bytes, Field(ge=0)] = 0
    """Of initial replication and resynchronization, over all disks; 0: as fast as it goes."""
    copy_io_priority: IoPriority = IoPriority.LOW
    """Of the same reads, in the kernel's I/O scheduler."""
    compress: bool = False
    """Compress with zstd here rather than at the process server: less network, more CPU on the source."""
    reconnect_seconds_max: Annotated[Seconds, Field(ge=1, le=600)] = 30.0
    progress_seconds_max: Annotated[Seconds, Field(ge=1, le=3600)] = 120.0
    renew_after_seconds: Annotated[Seconds, Field(ge=1, le=13 * 86400)] = 86400.0
    """The age at which the agent renews its certificate."""
    log: LogSettings = LogSettings()
    observability: ObservabilitySettings = ObservabilitySettings(address=DEFAULT_OBSERVABILITY_ADDRESS)

    @property
    def pin_directory(self) -> Path:
        """Of the agent with this state directory, for it alone."""
        return self.tracking_directory / f"agent_{blake3(str(self.state_directory.resolve()).encode()).hexdigest(8)}"

    def limits(self) -> AgentLimits:
        return AgentLimits(
            change_set_raw_bytes=self.change_set_bytes,
            frame_buffers=self.frame_buffers,
            reconnect_seconds_max=self.reconnect_seconds_max,
            progress_seconds_max=self.progress_seconds_max,
            compress_at_agent=self.compress,
            copy_read_bytes_per_second=self.copy_read_bytes_per_second,
            copy_io_priority=self.copy_io_priority,
        )
