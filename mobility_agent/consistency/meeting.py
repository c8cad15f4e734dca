"""Where the disks of a machine meet for one freeze: they arrive drained, begin their rounds while all is frozen, say
when they have read, and hear at the end what their points may be called.

Whoever fails leaves, and nobody waits for those who left. A meeting that was called off opens every gate: whoever comes
through one looks whether it is.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from mobility_agent.core.freeze_point import FreezeLabel
from protocol.vocabulary import DiskId

LABEL_SECONDS_MAX: Final = 90.0
"""No disk stands still longer than this for what others, or scripts, still have to do."""


class Stage(enum.IntEnum):
    """How far one disk has come."""

    CALLED = 0
    DRAINED = 1
    """Little is left to be read."""
    READY = 2
    """As little as there will be: it waits for the freeze."""
    BEGUN = 3
    """Its round has begun, while all was frozen."""
    READ = 4
    """What belongs to its round was read."""
    JUDGED = 5
    """All was sent but for the end: whether it settled is known."""


class Gate(enum.Enum):
    """What the disks wait for."""

    DRAIN_AGAIN = "drain_again"
    FROZEN = "frozen"
    LABELLED = "labelled"


@dataclass(slots=True, kw_only=True)
class Member:
    """One disk that takes part."""

    stage: Stage = Stage.CALLED
    begun_seconds: float = 0.0
    """Of the monotonic clock; its round had begun by then."""
    unsettled_reason: str = ""
    """Why its copy is not of one instant; empty if it is."""
    label: FreezeLabel | None = None


class FreezeMeeting:
    """For one event loop."""

    def __init__(self, disks: Collection[DiskId], *, monotonic_seconds: Callable[[], float]) -> None:
        self.instant_ns: int | None = None
        """The tick that all points carry; known when the gate FROZEN opens."""
        self.is_called_off = False
        self.members = {disk: Member() for disk in disks}
        self.left: dict[DiskId, str] = {}
        self._monotonic_seconds = monotonic_seconds
        self._gates = {gate: asyncio.Event() for gate in Gate}
        self._stages = {stage: asyncio.Event() for stage in Stage}
        self._look()

    # for a disk

    def reach(self, disk: DiskId, stage: Stage) -> None:
        """No effect for one that has left."""
        member = self.members.get(disk)
        if member is None:
            return
        if stage is Stage.BEGUN:
            member.begun_seconds = self._monotonic_seconds()
        member.stage = stage
        self._look()

    async def passed(self, disk: DiskId, gate: Gate) -> bool:
        """Waits for the gate; whether the disk still takes part then."""
        await self._gates[gate].wait()
        return not self.is_called_off and disk in self.members

    async def label(self, disk: DiskId, *, unsettled_reason: str) -> FreezeLabel | None:
        """What its position may be called, which is settled if there is no reason why not; None if the meeting says
        nothing of it."""
        member = self.members.get(disk)
        if member is None:
            return None
        member.unsettled_reason = unsettled_reason
        self.reach(disk, Stage.JUDGED)
        try:
            async with asyncio.timeout(LABEL_SECONDS_MAX):
                await self.passed(disk, Gate.LABELLED)
        except TimeoutError:
            self.leave(disk, f"it waited {LABEL_SECONDS_MAX:g} s for its label")
        return member.label

    def leave(self, disk: DiskId, reason: str) -> None:
        """It takes part no more. No effect for one that has left, or got its label."""
        member = self.members.get(disk)
        if member is not None and member.label is None:
            del self.members[disk]
            self.left[disk] = reason
            self._look()

    # for who called it

    async def all_reach(self, stage: Stage, *, seconds_max: float) -> None:
        """Until all that take part have come so far; those that have not in time are dismissed."""
        try:
            async with asyncio.timeout(seconds_max):
                await self._stages[stage].wait()
        except TimeoutError:
            for disk in [disk for disk, member in self.members.items() if member.stage < stage]:
                self.leave(disk, f"it was not {stage.name.lower()} within {seconds_max:g} s")

    async def all_read(self, *, seconds_max: float) -> None:
        """Until all that take part have read, or the time is up: nobody is dismissed, for their rounds may settle
        nevertheless."""
        try:
            async with asyncio.timeout(seconds_max):
                await self._stages[Stage.READ].wait()
        except TimeoutError:
            return

    def open(self, gate: Gate) -> None:
        self._gates[gate].set()

    def conclude(self, label: Callable[[DiskId], FreezeLabel]) -> None:
        """Everybody who still takes part hears it."""
        for disk, member in self.members.items():
            member.label = label(disk)
        self.open(Gate.LABELLED)

    def call_off(self) -> None:
        """Whoever waits goes on without a freeze. No effect on labels that were given."""
        self.is_called_off = True
        for gate in self._gates.values():
            gate.set()

    def _look(self) -> None:
        for stage, event in self._stages.items():
            if all(member.stage >= stage for member in self.members.values()):
                event.set()
