"""The agent's heart: keeps every protected disk replicating, and tells the configuration server how it goes.

Everything it touches is a constructor argument. It starts tasks by TaskGroup only, blocks in the executor only, and
takes time from the running loop and the clock. One disk's error never ends the others.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from mobility_agent.ports import Connect, DrawRandom, OpenSource
from protocol.control import AgentControl
from protocol.vocabulary import FRAME_RAW_BYTES_MAX
from runtime.clock import Clock
from runtime.directory import DurableDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLimits:
    """What bounds the agent's memory and pace. Defaults are production's; the simulation makes them small."""

    change_set_raw_bytes: int = 8 * FRAME_RAW_BYTES_MAX
    frame_buffers: int = 12
    """Frames that may be read, packed or sent at once over all disks; each holds FRAME_RAW_BYTES_MAX."""
    reconnect_seconds_min: float = 0.5
    reconnect_seconds_max: float = 30.0
    progress_seconds_max: float = 120.0
    """A connection on which frames wait so long for credit or acknowledgement is given up and made anew."""
    heartbeat_seconds: float = 10.0
    compress_at_agent: bool = False


class AgentService:
    """One agent. `run()` until cancelled or `stop()`ped."""

    def __init__(
        self,
        *,
        directory: DurableDirectory,
        open_source: OpenSource,
        connect: Connect,
        control: AgentControl,
        clock: Clock,
        draw_random: DrawRandom,
        executor: Executor,
        limits: AgentLimits | None = None,
    ) -> None:
        """directory holds all of the agent's durable state, for this service alone."""
        raise NotImplementedError

    async def run(self) -> None:
        """Replicates until stop() or cancellation. Raises only what ends the whole agent (its state failed)."""
        raise NotImplementedError

    def stop(self) -> None:
        """Begins an orderly end: sends what is in work, says goodbye, run() returns."""
        raise NotImplementedError

    async def protect(self, path: str) -> None:
        """Durably intends to protect the disk at `path`. Raises the typed disk errors of opening it."""
        raise NotImplementedError

    async def unprotect(self, path: str, *, keep: bool) -> None:
        """Durably intends to end the protection of `path`; keep: its recovery points stay."""
        raise NotImplementedError

    def scan_now(self) -> None:
        """Begins the next round of every disk at once, without waiting for its interval."""
        raise NotImplementedError
