"""Finds changes by what the kernel marked: reads the marked blocks, and settles what was provably not written
meanwhile.

- A block leaves what is pending only when the ledger holds the change set that carries it, or the history was found to
  hold it already.
- What may have been read too early is pending again until a round was quiet and the audit clean.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from mobility_agent.core.dirty_map import SentRecord
from mobility_agent.core.extent_set import ExtentSet
from mobility_agent.core.resync_cause import ResyncCause
from mobility_agent.core.write_audit import AuditBase, AuditFinding, judge_audit
from mobility_agent.disk_reader import LocalDisk
from mobility_agent.errors import ResyncNeeded
from mobility_agent.ports import DrawRandom
from mobility_agent.tracking.bitmap_round import BitmapRound, Receipt, RoundBegin
from mobility_agent.tracking.block_bits import Mask, Numbers
from mobility_agent.tracking.change_source import ReadTick, no_tick
from mobility_agent.tracking.digest_renewal import DigestRenewal
from mobility_agent.tracking.followed_disk import ChangeInFlight, Counters, FollowedDisk
from mobility_agent.tracking.scan import ScanSource
from protocol.vocabulary import SEQUENCE_MAX, DiskId
from runtime.directory import DurableDirectory

QUIET_SECONDS_MAX: Final = 0.5
"""A round waits so long for writes that were under way when it began; without them it is fuzzy, and read again."""
IDLE_SECONDS_MAX: Final = 2.0
"""After an alarm of the audit: for a moment with nothing in flight, at which the counts can be compared exactly."""
LEAK_SECONDS: Final = 5.0
"""A change in flight for so long, before and after a moment at which the kernel counts none, has ended unseen; or it
waits before the device, as behind a suspended device mapper, and will be marked when it completes."""

log = structlog.get_logger(__name__)


class BitmapSource:
    """One followed disk. Implements ChangeSource; also raises OSError when the kernel refuses to tell."""

    name: Final = "bitmap"
    reason: Final = ""
    follow_ups_max: Final = 3

    def __init__(
        self,
        *,
        disk: DiskId,
        source: LocalDisk,
        directory: DurableDirectory,
        draw_random: DrawRandom,
        follow: Callable[[], FollowedDisk],
    ) -> None:
        """follow: KernelTracker.follow for this disk."""
        self._alarms = 0
        self._disk = disk
        self._source = source
        self._known = ScanSource(disk=disk, source=source, directory=directory, draw_random=draw_random)
        self._tracked = follow()
        self._renewal = DigestRenewal(source, self._tracked)
        self._sent_sequence: int | None = None
        self._acknowledged_sequence: int | None = None
        self._suspects: dict[ChangeInFlight, float] = {}
        self._pending_lock = threading.Lock()
        """What was sent leaves what is pending in one thread while another may be marking."""

    @property
    def freezable_device(self) -> int:
        return self._tracked.facts.device

    @property
    def alarms(self) -> int:
        return self._alarms

    def restore(self, epoch: int, records: Sequence[SentRecord], *, sent_sequence: int = SEQUENCE_MAX) -> bool:
        return self._known.restore(epoch, records, sent_sequence=sent_sequence)

    def enter_epoch(self, epoch: int, *, parent_sequence: int | None, is_base_empty: bool) -> None:
        if parent_sequence is None:
            self._tracked.layout.mark_all(self._tracked.pending)
        self._known.enter_epoch(epoch, parent_sequence=parent_sequence, is_base_empty=is_base_empty)
        self._sent_sequence = None
        self._tracked.facts.resync_cause = ""
        self._tracked.write_facts()

    def begin_round(self, *, first_bytes: int, read_tick: ReadTick = no_tick, is_held: bool = False) -> BitmapRound:
        self._source.check()
        if self._tracked.facts.resync_cause:
            raise ResyncNeeded(cause=self._tracked.facts.resync_cause)
        if not is_held:
            self._renew_digests()
        before = self._tracked.counters()
        misses_before = self._tracked.read_audit().missed_submissions
        # why: a read past the page cache writes back what is dirty there; before the swap that disturbs no round. Where
        # the agent's own state is on the disk, some of it is dirty again after every round.
        self._source.write_back()
        facts = self._tracked.facts
        if facts.is_unsettled:
            self._tracked.read_again()
        facts.is_unsettled = 1
        self._tracked.write_facts()
        is_older_quiet = self._tracked.wait_for_older(seconds_max=QUIET_SECONDS_MAX)
        instant_ns = read_tick()
        parity = self._tracked.swap()
        untracked_before = facts.untracked
        self._check_counters(before)
        self._audit()
        was_quiet = is_older_quiet and self._tracked.wait_until_quiet(parity, seconds_max=QUIET_SECONDS_MAX)
        if not was_quiet:
            self._give_up_leaks()
        self._tracked.take_late()
        return BitmapRound(
            self,
            self._source,
            self._known.digests,
            self._tracked,
            first_bytes=first_bytes,
            begin=RoundBegin(
                counters=before,
                untracked=untracked_before,
                missed_submissions=misses_before,
                was_quiet=was_quiet,
                instant_ns=instant_ns,
            ),
        )

    def sent(self, sequence: int, receipts: Sequence[Receipt]) -> None:
        digests = self._known.digests
        for receipt in receipts:
            digests.forget_blocks(receipt.unknown)
            if receipt.unknown:
                self._renewal.expect()
            digests.write(sequence, receipt.digests)
            for windows, masks in receipt.sent:
                self.clear_pending(windows, masks)
        self._sent_sequence = sequence

    def acknowledged(self, sequence: int) -> None:
        self._acknowledged_sequence = sequence

    def forget(self, extents: ExtentSet) -> None:
        self._sent_sequence = None
        self._tracked.layout.mark(self._tracked.pending, extents)
        self._known.forget(extents)

    def synchronize(self) -> None:
        self._known.synchronize()

    def remove_other_epochs(self) -> None:
        self._known.remove_other_epochs()

    def close(self) -> None:
        self._known.close()
        self._tracked.close()

    def is_audit_clean(self) -> bool:
        """Whether the programs saw all that the kernel counted. Raises ResyncNeeded when nobody knows what they
        missed."""
        return self._audit() is AuditFinding.CLEAN

    def settle(self) -> None:
        """All that was marked at submission up to the last swap was read after it had completed."""
        self._tracked.settle()
        self._rebase()
        self._tracked.write_facts()

    def clear_pending(self, windows: Numbers, masks: Mask) -> None:
        with self._pending_lock:
            # why: when track is lost everything is pending, also what frames that are still on their way carry
            if not self._tracked.facts.resync_cause:
                self._tracked.layout.clear_masks(self._tracked.pending, windows, masks)

    def _renew_digests(self) -> None:
        """Only after a round that settled, and whose change sets were acknowledged: what was marked until then was read
        after it had completed, and the history has it."""
        sequence = self._sent_sequence
        if sequence is not None and sequence == self._acknowledged_sequence and not self._tracked.facts.is_unsettled:
            self._renewal.renew(self._known.digests, sequence=sequence)

    def _rebase(self) -> None:
        """Where the kernel does not count all that the programs see (zram: discards), its lead falls; a miss would hide
        in what is left of it."""
        facts, reading = self._tracked.facts, self._tracked.read_audit()
        finding, _ = judge_audit(facts.audit_base, reading)
        is_stable = reading == self._tracked.read_audit() and not self._tracked.kernel_in_flight()
        if finding is AuditFinding.CLEAN and is_stable:
            facts.audit_base = AuditBase.of(reading)

    def _check_counters(self, now: Counters) -> None:
        facts, lost = self._tracked.facts, self._tracked.unplaced_changes(now)
        self._mark_again(lost, is_needed=now.never_completed > facts.never_completed)
        # why: marked before what was concluded is kept: whoever is killed in between concludes it again
        facts.pass_through, facts.beyond_end = now.pass_through, now.beyond_end
        facts.never_completed, facts.untracked = now.never_completed, now.untracked
        self._tracked.write_facts()
        if lost:
            raise ResyncNeeded(cause=lost)

    def _audit(self) -> AuditFinding:
        facts = self._tracked.facts
        finding, base = judge_audit(facts.audit_base, self._tracked.read_audit())
        if finding is AuditFinding.CLEAN:
            return finding
        self._wait_until_idle()
        finding, base = judge_audit(facts.audit_base, self._tracked.read_audit())
        if finding is AuditFinding.CLEAN:
            # why: a driver that takes bios lets the kernel count a write a moment before its completion is traced.
            return finding
        self._alarms += 1
        log.warning("completions were missed", disk=self._disk, finding=finding.value)
        lost = ResyncCause.WRITES_MISSED if finding is AuditFinding.LOST_TRACK else None
        self._mark_again(lost, is_needed=True)
        facts.audit_base = base
        self._tracked.write_facts()
        if lost:
            raise ResyncNeeded(cause=lost)
        return finding

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + IDLE_SECONDS_MAX
        while self._tracked.kernel_in_flight() and time.monotonic() < deadline:
            time.sleep(0.001)

    def _give_up_leaks(self) -> None:
        """Changes in flight that never end as far as was seen: their completion was missed. Their blocks are pending
        anyway until a round was quiet."""
        now = time.monotonic()
        found = self._tracked.changes_in_flight()
        self._suspects = {change: self._suspects.get(change, now) for change in found}
        if self._tracked.kernel_in_flight():
            return
        # why: what ended only just now is no leak
        for change in self._tracked.changes_in_flight() & found:
            if now - self._suspects[change] > LEAK_SECONDS:
                log.warning("a completion was missed", disk=self._disk, sector=change.sector, bytes=change.bytes)
                self._tracked.forgive(change)

    def _mark_again(self, lost: ResyncCause | None, *, is_needed: bool) -> None:
        """Makes pending again what may have been read too early; everything, if track is lost."""
        with self._pending_lock:
            if lost is not None:
                self._tracked.lose(lost)
            elif is_needed:
                # why: what was missed may belong to the generation in use
                self._tracked.suspect_generation()
                self._tracked.read_again()
