"""What all disks of one agent share."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from mobility_agent.core.read_pace import ReadPace
from mobility_agent.frame_buffers import FrameBuffers
from mobility_agent.io_priority import IoPriority
from mobility_agent.ports import DrawRandom, OpenSource, Tracking
from protocol.vocabulary import CHANGE_SET_RAW_BYTES_MAX, check_range
from runtime.clock import Clock
from runtime.directory import DurableDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPorts:
    """The ports and limits of AgentService, as its disks use them."""

    directory: DurableDirectory
    open_source: OpenSource
    tracking: Tracking
    clock: Clock
    draw_random: DrawRandom
    executor: Executor
    held_executor: Executor
    """For reads while file systems are frozen: where all other work may wait for their thaw."""
    held_seconds_max: float
    """How long they are frozen at most."""
    buffers: FrameBuffers
    change_set_raw_bytes: int
    compress: bool
    copy_pace: ReadPace
    copy_priority: IoPriority
    """Of the reads of copy-ins."""

    def __post_init__(self) -> None:
        check_range(self.change_set_raw_bytes, "change_set_raw_bytes", low=1, high=CHANGE_SET_RAW_BYTES_MAX)
