"""One disk's owner: selects what happened, asks the table of core/replication, and applies the action.

Only the owner's run() changes the disk's state. Work (opening, copying, rounds) is one task at a time, which reports
by one event; what arrives from work or a connection that is over by then is dropped by its generation.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

import structlog

from mobility_agent.consistency.meeting import FreezeMeeting, Gate, Stage
from mobility_agent.core.replication import (
    Action,
    Event,
    Relation,
    State,
    decide,
    is_point_due,
    judge_opening,
    resync_cause_of,
)
from mobility_agent.disk_history import DiskHistory
from mobility_agent.disk_ports import DiskPorts
from mobility_agent.disk_status import DiskPace, DiskStatus
from mobility_agent.errors import AgentStateDamaged, CacheLost, DefectMet, DiskFault, ResyncNeeded
from mobility_agent.rounds import NO_CLOCK, HeldRound, RoundOutcome, RoundSender
from mobility_agent.tracking.change_source import ChangeSource, Round
from mobility_agent.uplink import Connection
from protocol.control import DiskIdentity
from protocol.errors import ConnectionLost, RefusedByPeer, ReplicationError
from protocol.messages import Positions
from protocol.vocabulary import Consistency, DiskId
from runtime.blocking import blocking

STILLNESS_POLL_SECONDS: Final = 0.2
"""A writer that waits for a lease is let in after so long at most."""
TICK_SECONDS_MAX: Final = 10.0
"""A delta round waits so long for the first tick of the server's clock: without it there is no point at its end."""
RETRY_SECONDS_MIN: Final = 1.0
RETRY_SECONDS_MAX: Final = 30.0
STOPPED_RETRY_SECONDS: Final = 30.0
"""How often a stopped disk is looked at again."""
DRAIN_ROUNDS_MAX: Final = 8
"""A disk of which not little enough is left after so many rounds changes faster than it can be read."""
HELD_BYTES_MAX: Final = 32 * 2**20
"""So much may be left to be sent when file systems are frozen: well within one change set."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OpenChannel:
    connection: Connection
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Happening:
    event: Event
    generation: int | None = None
    """Of the work that reports it; None for what comes from outside."""
    error: ReplicationError | None = None


class DiskReplication:
    """The owner of one disk. Methods but run() are for the event loop and return at once."""

    def __init__(
        self,
        *,
        disk: DiskId,
        path: str,
        identity: DiskIdentity,
        pace: DiskPace,
        ports: DiskPorts,
        on_changed: Callable[[], None] = lambda: None,
    ) -> None:
        """on_changed: called when there is news that operators want at once."""
        self.disk = disk
        self.path = path
        self._identity = identity
        self._pace = pace
        self._ports = ports
        self._on_changed = on_changed
        self._state = State.UNOPENED
        self._happenings: deque[_Happening] = deque()
        self._wake = asyncio.Event()
        self._round_wanted = asyncio.Event()
        self._idle_wake = asyncio.Event()
        self._connection: Connection | None = None
        self._channel: _OpenChannel | None = None
        self._newest_positions: Positions | None = None
        self._history: DiskHistory | None = None
        self._work: asyncio.Task[None] | None = None
        self._generation = 0
        self._round: Round | None = None
        self._cursor_bytes = 0
        self._committed_sequence = 0
        self._next_round_seconds: float | None = None
        self._last_point_seconds: float | None = None
        self._last_settled_seconds: float | None = None
        self._is_unmarked = False
        """Something was sent since the newest point."""
        self._retry_seconds = RETRY_SECONDS_MIN
        self._outcome: RoundOutcome | None = None
        self._error: ReplicationError | None = None
        self._read_bytes = self._sent_bytes = self._sent_raw_bytes = 0
        self._rounds = self._settled_rounds = self._points = 0
        self._alarms = self._follow_ups = 0
        self._resyncs: Counter[str] = Counter()
        self._meeting: FreezeMeeting | None = None
        self._newest_consistency: Consistency | None = None
        self._settled_position: tuple[int, int] | None = None
        self._source_name, self._source_reason = "", ""

    # what others tell

    def connected(self, connection: Connection) -> None:
        self._connection = connection
        self._happen(Event.CONNECTED)

    def disconnected(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
            self._happen(Event.CONNECTION_LOST)

    def positions(self, message: Positions) -> None:
        # why: they may come before the work that opened the channel has gone on; it asks for them then.
        self._newest_positions = message
        if self._channel is not None:
            self._take_positions()

    def closed(self, error: RefusedByPeer) -> None:
        self._channel = None
        retryable = bool(error.fields["retryable"])
        self._happen(Event.CLOSED_BY_PEER if retryable else Event.REFUSED_FOR_GOOD, error=error)

    def order(self, pace: DiskPace) -> None:
        """New orders."""
        changed, self._pace = self._pace != pace, pace
        if changed:
            self._idle_wake.set()
            self._wake.set()

    def begin_round_now(self) -> None:
        """The next delta round begins without waiting for its interval."""
        self._round_wanted.set()
        self._idle_wake.set()

    @property
    def freezable_device(self) -> int | None:
        """st_rdev of the disk, if a freeze could settle it just now."""
        is_able = self._state is State.DELTA_REPLICATION and self._meeting is None and self._history is not None
        return self._history.changes.freezable_device if is_able and self._history is not None else None

    @property
    def why_not_freezable(self) -> str:
        """For people; of a disk that freezable_device says None of."""
        if self._meeting is not None:
            return "it still takes part in an earlier freeze"
        if self._state is State.DELTA_REPLICATION:
            return f"its source is {self._source_name}"
        return f"it is in {self._state.value}"

    @property
    def last_tick_ns(self) -> int | None:
        """The newest tick of the server's clock that was received for it."""
        return None if self._connection is None else self._connection.last_tick_ns

    @property
    def last_settled_seconds(self) -> float | None:
        """When its newest settled round ended, of the monotonic clock; None before the first since the program
        began."""
        return self._last_settled_seconds

    def meet(self, meeting: FreezeMeeting) -> None:
        """It takes part, as soon as its round in work has ended."""
        self._meeting = meeting
        self._idle_wake.set()

    def status(self) -> DiskStatus:
        history, outcome, current = self._history, self._outcome, self._round
        standing = None if history is None else history.standing
        is_copying = self._state in (State.INITIAL_REPLICATION, State.RESYNCHRONIZATION)
        is_stopped = self._error is not None and self._state is State.OPENING
        return DiskStatus(
            disk=self.disk,
            path=self.path,
            state=State.STOPPED if is_stopped and isinstance(self._error, DiskFault) else self._state,
            source=self._source_name,
            source_reason=self._source_reason,
            size_bytes=self._identity.size_bytes,
            copied_bytes=self._copied_bytes() if is_copying else 0,
            copy_total_bytes=self._identity.size_bytes if is_copying else 0,
            backlog_bytes=0 if history is None else history.backlog_bytes,
            epoch=0 if standing is None else standing.epoch,
            sent_sequence=0 if standing is None else standing.sent_sequence,
            durable_sequence=0 if standing is None else standing.acknowledged_sequence,
            committed_sequence=self._committed_sequence,
            is_settled=outcome is not None and outcome.is_settled,
            unsettled_reason="" if outcome is None else outcome.reason,
            settled_position=self._settled_position,
            settled_seconds_ago=None
            if self._last_settled_seconds is None
            else self._ports.clock.monotonic_seconds() - self._last_settled_seconds,
            is_throttled=self._connection is not None and self._connection.is_out_of_credit,
            read_bytes=self._read_bytes + (0 if current is None else current.read_bytes),
            sent_bytes=self._sent_bytes,
            rounds=self._rounds,
            settled_rounds=self._settled_rounds,
            points=self._points,
            newest_consistency=self._newest_consistency,
            audit_alarms=self._alarms + (0 if history is None else history.changes.alarms),
            resyncs=dict(self._resyncs),
            error=self._error,
        )

    def _copied_bytes(self) -> int:
        return self._cursor_bytes if self._round is None else self._round.compared_to_bytes

    def _take_positions(self) -> None:
        message, channel, history = self._newest_positions, self._channel, self._history
        if message is None or channel is None or history is None or message.channel != channel.number:
            return
        history.positions(durable_sequence=message.durable_sequence, committed_sequence=message.committed_sequence)
        self._committed_sequence = message.committed_sequence
        self._idle_wake.set()

    # the owner

    async def run(self) -> None:
        """Until cancelled. Lets go of the disk and of its state files at the end."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch_stillness())
                while True:
                    happening = self._select()
                    if happening is None:
                        self._wake.clear()
                        await self._wake.wait()
                        continue
                    await self._apply(group, happening)
        finally:
            self._leave_meeting("its protection has ended")
            self._close_channel("stopping")
            await self._let_go()

    def _happen(self, event: Event, *, generation: int | None = None, error: ReplicationError | None = None) -> None:
        self._happenings.append(_Happening(event=event, generation=generation, error=error))
        self._wake.set()

    def _select(self) -> _Happening | None:
        """The next thing that happened and still matters."""
        while self._happenings:
            happening = self._happenings.popleft()
            if happening.generation in (None, self._generation):
                return happening
        if self._pace.is_paused and self._state is not State.PAUSED:
            return _Happening(event=Event.PAUSE_ORDERED)
        if not self._pace.is_paused and self._state is State.PAUSED:
            return _Happening(event=Event.RESUME_ORDERED)
        return None

    async def _apply(self, group: asyncio.TaskGroup, happening: _Happening) -> None:
        transition = decide(self._state, happening.event)
        if transition.state is not self._state:
            log.info("disk", disk=self.disk, path=self.path, state=transition.state.value, cause=happening.event.value)
            self._on_changed()
        self._state = transition.state
        if happening.error is not None:
            self._error = happening.error
            log.warning("disk", disk=self.disk, path=self.path, error=str(happening.error), hint=happening.error.hint)
        if transition.action is Action.NONE:
            return
        await self._end_work()
        match transition.action:
            case Action.OPEN:
                self._begin_work(group, self._open(anew=False))
            case Action.OPEN_NEW_EPOCH:
                self._close_channel("new epoch wanted")
                self._begin_work(group, self._open(anew=True))
            case Action.COPY:
                self._begin_work(group, self._copy())
            case Action.DELTA:
                self._begin_work(group, self._delta())
            case Action.SUSPEND:
                self._close_channel("suspended")
            case Action.WAIT:
                self._close_channel("waiting")
                self._begin_work(group, self._retry_after(self._next_pause()))
            case Action.STOP:
                self._close_channel("disk stopped")
                await self._let_go()
                self._begin_work(group, self._retry_after(STOPPED_RETRY_SECONDS))

    def _begin_work(self, group: asyncio.TaskGroup, work: Coroutine[Any, Any, Event]) -> None:
        self._work = group.create_task(self._report(work, self._generation))

    async def _end_work(self) -> None:
        """What runs is over when this returns; what it would still have reported does not count."""
        self._generation += 1
        work, self._work = self._work, None
        if work is not None and not work.done():
            work.cancel()
            await asyncio.wait([work])
        self._leave_meeting("its replication was interrupted")

    async def _report(self, work: Coroutine[Any, Any, Event], generation: int) -> None:
        """Turns the end of the work into the one event that it reports."""
        error: ReplicationError
        try:
            event = await work
        except ResyncNeeded as fault:
            self._resyncs[str(fault.fields["cause"])] += 1
            event, error = Event.RESYNC_NEEDED, fault
        except ConnectionLost:
            return  # the connection tells it itself
        except RefusedByPeer as fault:
            event = Event.CLOSED_BY_PEER if fault.fields["retryable"] else Event.REFUSED_FOR_GOOD
            error = fault
        except (DiskFault, AgentStateDamaged) as fault:
            event, error = Event.WORK_FAILED if fault.is_retryable else Event.DISK_FAILED, fault
        except ReplicationError as fault:
            event, error = Event.WORK_FAILED, fault
        except OSError as fault:
            event = Event.DISK_FAILED
            error = AgentStateDamaged(name=self.disk, reason=fault.strerror or str(fault))
        except Exception as fault:
            # why: a defect met by one disk must not end the others; it is logged whole and shown as this disk's error.
            log.exception("disk", disk=self.disk, path=self.path)
            event, error = Event.DISK_FAILED, DefectMet(reason=repr(fault)[:200])
        else:
            self._happen(event, generation=generation)
            return
        self._happen(event, generation=generation, error=error)

    # the work

    async def _open(self, *, anew: bool) -> Event:
        connection = self._connection
        if connection is None:
            return Event.CONNECTION_LOST
        if self._history is None:
            self._history = await blocking(self._ports.executor, self._load)
            self._note_source(self._history.changes)
        history = self._history
        await blocking(self._ports.executor, history.source.check)
        standing = history.standing
        self._newest_positions = None
        opened = await connection.open_disk(
            self.disk, self, standing=(standing.epoch, standing.acknowledged_sequence), anew=anew
        )
        self._channel = _OpenChannel(connection=connection, number=opened.channel)
        opening = judge_opening(standing, opened, disk=self.disk, disk_size_bytes=history.source.size_bytes)
        if cause := resync_cause_of(opening, is_wanted=anew):
            log.warning("resynchronization", disk=self.disk, path=self.path, cause=cause.value)
            self._resyncs[cause] += 1
        if opening.event is Event.OPENED_BEHIND:
            lost = CacheLost(
                disk=self.disk, acknowledged=standing.acknowledged_sequence, durable=opened.durable_sequence
            )
            if anew:
                raise lost
            log.warning("disk", disk=self.disk, path=self.path, error=str(lost))
            return opening.event
        await blocking(self._ports.executor, lambda: history.enter(opening, opened))
        if opening.relation is not Relation.SAME_EPOCH:
            log.info("epoch", disk=self.disk, epoch=opened.epoch, relation=opening.relation.value)
        self._cursor_bytes = opening.cursor_bytes
        self._committed_sequence = opened.committed_sequence
        self._take_positions()
        self._error = None
        if history.is_anything_dirty:
            self._next_round_seconds = None
        return opening.event

    def _load(self) -> DiskHistory:
        """Runs in the executor."""
        ports = self._ports
        source = ports.open_source(self.path, self._identity)
        try:
            changes = ports.tracking.open(
                self.disk, self.path, source, directory=ports.directory, draw_random=ports.draw_random
            )
        except BaseException:
            source.close()
            raise
        history = DiskHistory(disk=self.disk, source=source, changes=changes, directory=ports.directory)
        try:
            history.load()
        except BaseException:
            history.close()
            raise
        return history

    def _note_source(self, changes: ChangeSource) -> None:
        if (changes.name, changes.reason) != (self._source_name, self._source_reason):
            log.info("source", disk=self.disk, path=self.path, source=changes.name, why_no_better=changes.reason)
        self._source_name, self._source_reason = changes.name, changes.reason

    async def _copy(self) -> Event:
        await self._run_round(first_bytes=self._cursor_bytes, is_copy=True)
        return Event.COPY_COMPLETED

    async def _delta(self) -> Event:
        while True:
            await self._wait_for_round()
            if self._meeting is None:
                await self._run_round(first_bytes=0, is_copy=False)
            else:
                await self._take_part(self._meeting)

    async def _take_part(self, meeting: FreezeMeeting) -> None:
        """In a freeze of the machine, unless something comes between."""
        self._happen(Event.FREEZE_BEGAN, generation=self._generation)
        try:
            if not await self._drain():
                self._leave_meeting("it changes faster than it can be read")
            elif await self._is_awaited(meeting):
                await self._run_round(first_bytes=0, is_copy=False, meeting=meeting)
        finally:
            self._leave_meeting("its round failed")
        self._happen(Event.FREEZE_ENDED, generation=self._generation)

    async def _is_awaited(self, meeting: FreezeMeeting) -> bool:
        """Waits for the freeze, with the least left to be read; whether it holds."""
        meeting.reach(self.disk, Stage.DRAINED)
        if not await meeting.passed(self.disk, Gate.DRAIN_AGAIN):
            return False
        await self._run_round(first_bytes=0, is_copy=False)
        meeting.reach(self.disk, Stage.READY)
        return await meeting.passed(self.disk, Gate.FROZEN)

    async def _drain(self) -> bool:
        """Rounds, until what is left can be read while everything is frozen; whether that was reached."""
        for _ in range(DRAIN_ROUNDS_MAX):
            began, sent_bytes = self._ports.clock.monotonic_seconds(), self._sent_raw_bytes
            await self._run_round(first_bytes=0, is_copy=False)
            took_seconds = self._ports.clock.monotonic_seconds() - began
            if took_seconds <= self._ports.held_seconds_max / 2 and self._sent_raw_bytes - sent_bytes <= HELD_BYTES_MAX:
                return True
        return False

    def _leave_meeting(self, reason: str) -> None:
        meeting, self._meeting = self._meeting, None
        if meeting is not None:
            meeting.leave(self.disk, reason)

    async def _run_round(self, *, first_bytes: int, is_copy: bool, meeting: FreezeMeeting | None = None) -> None:
        """meeting: of which all is frozen now."""
        channel, history = self._channel, self._history
        if channel is None or history is None:
            raise ConnectionLost(peer="process server", reason="it ended meanwhile")
        if not is_copy and meeting is None:
            await channel.connection.wait_for_tick(TICK_SECONDS_MAX)
        began = self._ports.clock.monotonic_seconds()
        self._round_wanted.clear()
        connection = channel.connection
        changes = await blocking(
            self._ports.executor if meeting is None else self._ports.held_executor,
            lambda: history.changes.begin_round(
                first_bytes=first_bytes,
                is_held=meeting is not None,
                read_tick=lambda: connection.last_tick_ns if meeting is None else meeting.instant_ns,
            ),
        )
        self._round = changes
        sender = RoundSender(
            connection=connection,
            channel=channel.number,
            history=history,
            ports=self._ports,
            is_copy=is_copy,
            held=None if meeting is None else self._held_round(meeting),
        )
        try:
            self._outcome = await sender.send_round(changes, first_bytes=first_bytes, is_point_due=self._is_point_due)
        finally:
            self._round = None
            changes.abandon()
            self._read_bytes += changes.read_bytes
            self._sent_bytes += sender.sent_bytes
            self._sent_raw_bytes += sender.sent_raw_bytes
            self._is_unmarked |= sender.is_changed
        self._rounds += 1
        self._settled_rounds += self._outcome.is_settled
        if self._outcome.is_settled:
            self._last_settled_seconds = self._ports.clock.monotonic_seconds()
            self._settled_position = (history.standing.epoch, history.standing.sent_sequence)
        self._cursor_bytes = 0
        self._retry_seconds = RETRY_SECONDS_MIN
        if self._outcome.point is not None:
            self._points += 1
            self._is_unmarked = False
            self._newest_consistency = self._outcome.consistency
            self._last_point_seconds = self._ports.clock.monotonic_seconds()
        # why: a copy that did not settle, or had no clock to mark with, is followed at once by the round that can. Only
        # once: without a clock, rounds that follow each other would read the disk for ever.
        waits = not is_copy or (self._outcome.is_settled and self._outcome.reason != NO_CLOCK)
        self._follow_ups = 0 if is_copy or self._outcome.is_settled else self._follow_ups + 1
        is_followed_up = 0 < self._follow_ups <= history.changes.follow_ups_max
        self._next_round_seconds = began if waits and not is_followed_up else None
        if self._follow_ups > history.changes.follow_ups_max:
            self._follow_ups = 0

    def _held_round(self, meeting: FreezeMeeting) -> HeldRound:
        """Its round has begun."""
        meeting.reach(self.disk, Stage.BEGUN)
        return HeldRound(
            executor=self._ports.held_executor,
            on_read=lambda: meeting.reach(self.disk, Stage.READ),
            label=lambda unsettled_reason: meeting.label(self.disk, unsettled_reason=unsettled_reason),
        )

    def _is_point_due(self, *, is_changed: bool) -> bool:
        last = self._last_point_seconds
        since = None if last is None else self._ports.clock.monotonic_seconds() - last
        return is_point_due(
            is_changed=is_changed or self._is_unmarked,
            seconds_since_point=since,
            point_interval_seconds=self._pace.point_interval_seconds,
        )

    async def _wait_for_round(self) -> None:
        """Until the interval since the last round began has passed, or somebody wants one now."""
        while True:
            # why: cleared before anything is looked at, so that what happens meanwhile is not slept through.
            self._idle_wake.clear()
            if self._round_wanted.is_set() or self._meeting is not None:
                return
            history = self._history
            if history is not None and history.is_standing_due:
                await blocking(self._ports.executor, history.write_standing)
            began = self._next_round_seconds
            now = self._ports.clock.monotonic_seconds()
            left = 0.0 if began is None else began + self._pace.copy_interval_seconds - now
            if left <= 0:
                return
            try:
                async with asyncio.timeout(left):
                    await self._idle_wake.wait()
            except TimeoutError:
                continue

    async def _retry_after(self, seconds: float) -> Event:
        """After so long, or as soon as somebody who has mended the cause wants a round."""
        jitter = 0.5 + int.from_bytes(self._ports.draw_random(2), "little") / 65536
        self._round_wanted.clear()
        try:
            async with asyncio.timeout(seconds * jitter):
                await self._round_wanted.wait()
        except TimeoutError:
            pass
        return Event.RETRY_DUE

    def _next_pause(self) -> float:
        pause = self._retry_seconds
        self._retry_seconds = min(2 * pause, RETRY_SECONDS_MAX)
        return pause

    async def _watch_stillness(self) -> None:
        """Lets a writer in that waits for the lease, also while nothing is read."""
        while True:
            await asyncio.sleep(STILLNESS_POLL_SECONDS)
            if self._round is not None:
                self._round.is_still()

    def _close_channel(self, reason: str) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.connection.close_disk(channel.number, code="closed-by-agent", detail=reason)

    async def _let_go(self) -> None:
        history, self._history = self._history, None
        if history is not None:
            self._alarms += history.changes.alarms
            await blocking(self._ports.executor, history.close)
