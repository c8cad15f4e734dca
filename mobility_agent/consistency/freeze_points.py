"""Makes the freeze points of one machine: calls its disks together, runs the scripts, freezes, lets them mark, thaws,
and says what their points may be called.

One freeze at a time. Nothing is logged between freeze and thaw: the log may lie on a frozen disk.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import structlog

from mobility_agent.consistency.freezer import FreezeProcess, Freezer, Thaw
from mobility_agent.consistency.meeting import FreezeMeeting, Gate, Stage
from mobility_agent.consistency.mount_table import freeze_plan
from mobility_agent.consistency.scripts import FreezeScripts
from mobility_agent.core.freeze_plan import FreezePlan
from mobility_agent.core.freeze_point import (
    DiskFreezeFacts,
    FreezeAges,
    FreezeFacts,
    FreezeFrequency,
    FreezeKind,
    FreezeLabel,
    choose_freeze,
    label_freeze,
)
from mobility_agent.errors import DefectMet, FreezeFailed, ScriptFailed
from protocol.errors import ReplicationError
from protocol.vocabulary import Consistency, DiskId
from runtime.blocking import blocking
from runtime.clock import Clock
from runtime.logs import held_logs

LOOK_SECONDS: Final = 1.0
"""How often it is looked whether a freeze is due."""
DRAIN_SECONDS_MAX: Final = 120.0
"""The disks have so long to send what they have until little is left."""
DRAIN_AGAIN_SECONDS_MAX: Final = 30.0
"""The same once more, after the scripts."""
SETTLE_SECONDS_MAX: Final = 60.0
"""After the thaw, for what had not been sent."""

log = structlog.get_logger(__name__)


class FreezableDisk(Protocol):
    """A protected disk, as its owner tells of it. Does not block."""

    disk: DiskId
    path: str

    @property
    def freezable_device(self) -> int | None: ...

    @property
    def why_not_freezable(self) -> str: ...

    @property
    def last_tick_ns(self) -> int | None: ...

    @property
    def last_settled_seconds(self) -> float | None: ...

    def meet(self, meeting: FreezeMeeting) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezePorts:
    """What freezes need of the machine. executor, held_executor: of the freezer and of the disks' reads meanwhile, used
    by nothing else, so that nobody who waits for a thaw is in the way. seconds_max: how long file systems are frozen at
    most."""

    freezer: Freezer
    scripts: FreezeScripts
    executor: Executor
    held_executor: Executor
    seconds_max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeOutcome:
    """How one freeze went. seconds: how long the machine was frozen. labels: of each disk that got one."""

    kind: FreezeKind
    seconds: float
    labels: Mapping[DiskId, FreezeLabel]
    left_out: Sequence[str]
    error: ReplicationError | None = None

    @property
    def result(self) -> str:
        """The least that any disk got: a consistency, or `failed`."""
        order = [Consistency.UNSETTLED, Consistency.CRASH, Consistency.FILE_SYSTEM, Consistency.APPLICATION]
        found = [label.consistency for label in self.labels.values()]
        return "failed" if self.error is not None or not found else min(found, key=order.index).value

    @property
    def reason(self) -> str:
        """Why it is no better; empty for the best."""
        if self.error is not None:
            return str(self.error)
        if not self.labels:
            return "; ".join(self.left_out)
        return "; ".join(sorted({label.reason for label in self.labels.values() if label.reason}))


@dataclass(slots=True, kw_only=True)
class FreezeTotals:
    """Since the program began."""

    results: Counter[str] = field(default_factory=Counter)
    frozen_seconds: float = 0.0
    longest_seconds: float = 0.0
    newest: FreezeOutcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What is known after the thaw."""

    plan: FreezePlan
    unfrozen: Mapping[str, str]
    held_elsewhere: Mapping[DiskId, Sequence[str]]
    mounts_changed: bool
    thaw: Thaw


class FreezePoints:
    """Of one agent."""

    def __init__(
        self,
        ports: FreezePorts,
        *,
        disks: Callable[[], Sequence[FreezableDisk]],
        others: Callable[[], Sequence[str]],
        clock: Clock,
    ) -> None:
        """disks: those that replicate. others: paths of those that are protected as well, and do not."""
        self.totals = FreezeTotals()
        self.frequency = FreezeFrequency()
        self._ports = ports
        self._disks = disks
        self._others = others
        self._clock = clock
        self._wanted: list[tuple[FreezeKind, asyncio.Future[FreezeOutcome]]] = []
        self._wake = asyncio.Event()
        self._began_seconds = clock.monotonic_seconds()
        self._tried: dict[FreezeKind, float] = {}

    async def freeze_now(self, kind: FreezeKind) -> FreezeOutcome:
        """A freeze out of turn; how it went."""
        outcome: asyncio.Future[FreezeOutcome] = asyncio.get_running_loop().create_future()
        self._wanted.append((kind, outcome))
        self._wake.set()
        return await outcome

    async def run(self) -> None:
        """Until cancelled. Thaws first what a killed predecessor has left frozen."""
        try:
            await self._ports.freezer.thaw_what_was_left()
        except OSError as error:
            log.error("what was left frozen is not known", error=str(error))
        while True:
            self._wake.clear()
            wanted, self._wanted = self._wanted, []
            kinds = {kind for kind, _ in wanted}
            kind = max(kinds, key=list(FreezeKind).index) if kinds else await self._due()
            if kind is None:
                try:
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                continue
            try:
                outcome = await self._make_points(kind)
            except asyncio.CancelledError:
                for _, future in wanted:
                    future.cancel()
                raise
            except Exception as fault:
                # why: a defect met by one freeze must not end the agent; it is logged whole and shown as its error
                log.exception("freeze")
                defect = DefectMet(reason=repr(fault)[:200])
                outcome = FreezeOutcome(kind=kind, seconds=0.0, labels={}, left_out=[], error=defect)
                self._note(outcome)
            for _, future in wanted:
                if not future.done():
                    future.set_result(outcome)

    async def _due(self) -> FreezeKind | None:
        able = [disk for disk in self._disks() if disk.freezable_device is not None]
        if not able:
            return None
        now = self._clock.monotonic_seconds()
        settled = [disk.last_settled_seconds for disk in able]
        ages = FreezeAges(
            agent_began=now - self._began_seconds,
            longest_unsettled=None if None in settled else now - min(one for one in settled if one is not None),
            freeze_tried=self._age(now, max(self._tried.values(), default=None)),
            application_tried=self._age(now, self._tried.get(FreezeKind.APPLICATION)),
        )
        has_scripts = self.frequency.application_interval_seconds > 0 and bool(await self._found_scripts())
        return choose_freeze(self.frequency, ages, has_scripts=has_scripts)

    def _age(self, now: float, then: float | None) -> float | None:
        return None if then is None else now - then

    async def _found_scripts(self) -> list[Path]:
        """Those that cannot be listed count as one that fails: the freeze tells why."""
        try:
            return await blocking(self._ports.executor, self._ports.scripts.found)
        except ScriptFailed:
            return [Path()]

    async def _make_points(self, kind: FreezeKind) -> FreezeOutcome:
        self._tried[kind] = self._clock.monotonic_seconds()
        disks = self._disks()
        devices = {disk.disk: disk.freezable_device for disk in disks}
        able = {disk.disk: disk for disk in disks if devices[disk.disk] is not None}
        left_out = [f"{disk.path}: {disk.why_not_freezable}" for disk in disks if devices[disk.disk] is None]
        left_out += [f"{path}: it does not replicate yet" for path in self._others()]
        meeting = FreezeMeeting(able, monotonic_seconds=self._clock.monotonic_seconds)
        seconds, error = 0.0, None
        for disk in able.values():
            disk.meet(meeting)
        try:
            held, script_fault = await self._hold(
                kind, meeting, able, {k: v for k, v in devices.items() if v is not None}
            )
            seconds = held.thaw.seconds
            await meeting.all_reach(Stage.JUDGED, seconds_max=SETTLE_SECONDS_MAX)
            left_out += [f"{able[disk].path}: {reason}" for disk, reason in meeting.left.items()]
            facts = _facts(kind, meeting, held, left_out=left_out, script_fault=script_fault)
            meeting.conclude(lambda disk: label_freeze(facts, disk))
        except (ReplicationError, OSError) as fault:
            error = fault if isinstance(fault, ReplicationError) else FreezeFailed(reason=str(fault))
        finally:
            meeting.call_off()
        labels = {disk: member.label for disk, member in meeting.members.items() if member.label is not None}
        outcome = FreezeOutcome(kind=kind, seconds=seconds, labels=labels, left_out=left_out, error=error)
        self._note(outcome)
        return outcome

    async def _hold(
        self,
        kind: FreezeKind,
        meeting: FreezeMeeting,
        disks: Mapping[DiskId, FreezableDisk],
        devices: Mapping[DiskId, int],
    ) -> tuple[_Held, str]:
        """Everything is thawed on return, and the scripts were told of it; with why they do not count."""
        await meeting.all_reach(Stage.DRAINED, seconds_max=DRAIN_SECONDS_MAX)
        self._require_members(meeting)
        plan = await blocking(
            self._ports.executor, lambda: freeze_plan({disk: devices[disk] for disk in meeting.members})
        )
        mount_points = [system.path for system in plan.file_systems]
        scripts, fault = await self._before_freeze(kind, mount_points)
        try:
            held = await self._freeze(meeting, plan, disks, devices)
        except BaseException:
            await self._after_thaw(scripts, mount_points)
            raise
        return held, fault or await self._after_thaw(scripts, mount_points)

    async def _freeze(
        self,
        meeting: FreezeMeeting,
        plan: FreezePlan,
        disks: Mapping[DiskId, FreezableDisk],
        devices: Mapping[DiskId, int],
    ) -> _Held:
        ports = self._ports
        held_elsewhere = await self._held_exclusively(plan, {})
        with held_logs():
            # why around all of it: whatever goes wrong, nothing is logged before the last thaw
            async with ports.freezer.process(plan.file_systems, seconds_max=ports.seconds_max) as process:
                await process.synchronize()
                meeting.open(Gate.DRAIN_AGAIN)
                await meeting.all_reach(Stage.READY, seconds_max=DRAIN_AGAIN_SECONDS_MAX)
                self._require_members(meeting)
                await process.synchronize()
                unfrozen, thaw = await self._mark(process, meeting, disks)
        # why afterwards too: what was mounted out of sight in between counts as well
        held_elsewhere = await self._held_exclusively(plan, held_elsewhere)
        after = await blocking(ports.executor, lambda: freeze_plan({disk: devices[disk] for disk in plan.disks}))
        return _Held(
            plan=plan,
            unfrozen=unfrozen,
            held_elsewhere=held_elsewhere,
            mounts_changed=(after.disks, after.to_probe) != (plan.disks, plan.to_probe),
            thaw=thaw,
        )

    async def _mark(
        self, process: FreezeProcess, meeting: FreezeMeeting, disks: Mapping[DiskId, FreezableDisk]
    ) -> tuple[Mapping[str, str], Thaw]:
        """Between freeze and thaw: the disks begin their rounds, and read."""
        if any(disks[disk].last_tick_ns is None for disk in meeting.members):
            raise FreezeFailed(reason="the configuration server's clock has not been heard yet")
        unfrozen = await process.freeze(self._ports.seconds_max)
        ticks = [tick for disk in meeting.members if (tick := disks[disk].last_tick_ns) is not None]
        meeting.instant_ns = min(ticks, default=None)
        meeting.open(Gate.FROZEN)
        await meeting.all_reach(Stage.BEGUN, seconds_max=self._ports.seconds_max)
        await meeting.all_read(seconds_max=self._ports.seconds_max)
        return unfrozen, await process.thaw()

    async def _held_exclusively(
        self, plan: FreezePlan, before: Mapping[DiskId, Sequence[str]]
    ) -> Mapping[DiskId, Sequence[str]]:
        """With those that were before."""
        found = await blocking(
            self._ports.executor, lambda: {disk: held_exclusively(names) for disk, names in plan.to_probe.items()}
        )
        return {disk: sorted({*names, *before.get(disk, ())}) for disk, names in found.items()}

    def _require_members(self, meeting: FreezeMeeting) -> None:
        if not meeting.members:
            raise FreezeFailed(reason=f"no disk is ready for it: {'; '.join(meeting.left.values()) or 'none is live'}")

    async def _before_freeze(self, kind: FreezeKind, mount_points: Sequence[str]) -> tuple[Sequence[Path], str]:
        """The scripts that are to be told of the thaw, and why they do not count."""
        if kind is not FreezeKind.APPLICATION:
            return (), ""
        try:
            scripts = await blocking(self._ports.executor, self._ports.scripts.found)
            await self._ports.scripts.before_freeze(scripts, mount_points=mount_points)
        except ScriptFailed as error:
            return (), str(error)
        return scripts, "" if scripts else "there are no scripts"

    async def _after_thaw(self, scripts: Sequence[Path], mount_points: Sequence[str]) -> str:
        """Why they do not count: what held an application still may have ended before the freeze."""
        try:
            await self._ports.scripts.after_thaw(scripts, mount_points=mount_points)
        except ScriptFailed as error:
            return str(error)
        return ""

    def _note(self, outcome: FreezeOutcome) -> None:
        totals = self.totals
        totals.newest = outcome
        totals.results[outcome.result] += 1
        totals.frozen_seconds += outcome.seconds
        totals.longest_seconds = max(totals.longest_seconds, outcome.seconds)
        tell = log.info if outcome.result == outcome.kind.value else log.warning
        tell(
            "freeze",
            wanted=outcome.kind.value,
            result=outcome.result,
            reason=outcome.reason,
            frozen_seconds=round(outcome.seconds, 4),
            left_out=list(outcome.left_out),
        )


def _facts(
    kind: FreezeKind, meeting: FreezeMeeting, held: _Held, *, left_out: Sequence[str], script_fault: str
) -> FreezeFacts:
    marked = [
        member.stage >= Stage.BEGUN and member.begun_seconds < held.thaw.thawing_seconds
        for member in meeting.members.values()
    ]
    faults = {**held.unfrozen, **held.thaw.lost}
    return FreezeFacts(
        kind=kind,
        disks={
            disk: DiskFreezeFacts(
                unsettled_reason=member.unsettled_reason,
                has_file_systems=bool(held.plan.disks[disk]),
                unfrozen=[
                    f"{system.path} ({system.kind}): {faults[place.path]}"
                    for system in held.plan.file_systems
                    if system.identifier in held.plan.disks[disk]
                    for place in system.places
                    if place.path in faults
                ],
                held_elsewhere=held.held_elsewhere[disk],
            )
            for disk, member in meeting.members.items()
        },
        left_out=left_out,
        were_all_marked=all(marked),
        mounts_changed=held.mounts_changed,
        script_fault=script_fault,
    )


def held_exclusively(names: Sequence[str]) -> list[str]:
    """Those block devices that somebody else has open exclusively, as one does who mounts them; also those that cannot
    be asked. Blocks shortly."""
    found = []
    for name in names:
        try:
            os.close(os.open(f"/dev/{name.replace('!', '/')}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            found.append(name if error.errno == errno.EBUSY else f"{name} ({error.strerror})")
    return found
