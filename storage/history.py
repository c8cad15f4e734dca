"""The trusted chain: which of a disk's stored segments are its history, in what order, and what is broken.

A segment is in the history if and only if a chain of trailer hashes leads to it from the start of an epoch without a
parent, through whole epochs and the closing segments that end them. Nothing behind a broken link is used; everything
before it is. What lies behind a closing segment was an upload that its predecessor had under way: never committed, not
history, not damage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from protocol.vocabulary import ChangeSetEnd, Consistency, DiskId, PointId, Position, VaultId
from storage.errors import ObjectCorrupt, PositionNotFound, SegmentAwaited, SegmentMissing, VaultFault
from storage.object_names import SegmentName
from storage.segment import NO_TRAILER_HASH, VerifiedSegment

UPLOADS_IN_FLIGHT_MAX: Final = 32
"""A process server has no more segments of one disk on their way than this."""

Finding: TypeAlias = VerifiedSegment | VaultFault
"""What lies under a segment's name: a verified segment, or why it is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryPoint:
    """A settled, bookmarked position of one disk."""

    point: PointId
    position: Position
    consistency: Consistency
    instant_ns: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpochHistory:
    """The trusted part of one epoch. parent is the position that it continues, None if it begins at nothing.

    closing ends it: nothing follows in this epoch. fault: why no more of it is trusted, None if it is whole as far as
    it goes.
    """

    epoch: int
    parent: Position | None
    segments: tuple[VerifiedSegment, ...]
    closing: VerifiedSegment | None

    @property
    def last_sequence(self) -> int:
        return self.segments[-1].last_sequence if self.segments else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DiskHistory:
    """All that storage proves about one disk. epochs are those reached by the chain, in ascending order."""

    disk: DiskId
    epochs: Mapping[int, EpochHistory]
    damage: tuple[VaultFault, ...]
    """Every missing or broken segment that was found, each naming its object."""
    faults: Mapping[int, VaultFault]
    """By epoch: why no more of it is trusted; for an epoch that is not reached at all, what broke the way to it."""

    @property
    def head(self) -> Position | None:
        """The newest trusted position: the end of the highest epoch. None if nothing is stored."""
        if not self.epochs:
            return None
        epoch = max(self.epochs)
        return Position(epoch=epoch, sequence=self.epochs[epoch].last_sequence)

    @property
    def segments(self) -> tuple[VerifiedSegment, ...]:
        """Every trusted segment with frames, epoch by epoch."""
        return tuple(segment for epoch in self.epochs.values() for segment in epoch.segments)

    @property
    def points(self) -> tuple[HistoryPoint, ...]:
        """Every bookmarked position, in the order of the history."""
        return tuple(
            HistoryPoint(
                point=end.bookmark.point,
                position=Position(epoch=segment.name.epoch, sequence=sequence),
                consistency=end.consistency,
                instant_ns=end.bookmark.instant_ns,
            )
            for segment in self.segments
            for sequence, end in segment.index.bookmarked_ends()
            if end.bookmark is not None
        )

    def positions(self) -> Iterator[tuple[Position, ChangeSetEnd]]:
        """Every position with what its change set stated, in the order of the history; settled ones and others."""
        for segment in self.segments:
            for sequence, end in segment.index.ends():
                yield Position(epoch=segment.name.epoch, sequence=sequence), end

    def end_at(self, position: Position) -> ChangeSetEnd | None:
        """What the change set that completes `position` stated; None at the very start. Raises as path_to does."""
        path = self.path_to(position)
        if not path:
            return None
        last = path[-1]
        if last.name.epoch != position.epoch or not position.sequence:
            return last.index.ends()[-1][1]
        return last.index.end_of(position.sequence)

    def path_to(self, position: Position) -> tuple[VerifiedSegment, ...]:
        """The segments to apply, in order, for the copy at `position`, across epochs.

        All of them are applied whole but the last, of which only `index.frames_through(position.sequence)` frames are,
        where it is of the position's epoch. Raises the damage that stands between, or PositionNotFound.
        """
        epoch = self.epochs.get(position.epoch)
        if epoch is None or position.sequence > epoch.last_sequence:
            raise self.faults.get(position.epoch) or PositionNotFound(disk=self.disk, position=position)
        own = tuple(segment for segment in epoch.segments if segment.first_sequence <= position.sequence)
        return (self.path_to(epoch.parent) if epoch.parent else ()) + own


def may_be_under_way(missing: int, newest: int, beyond: Iterable[Finding]) -> bool:
    """Whether uploads that overtake each other explain that ordinal `missing` is not there while those `beyond`, up to
    ordinal `newest`, are. A closing segment is written only behind what is there."""
    if newest - missing >= UPLOADS_IN_FLIGHT_MAX:
        return False
    return not any(isinstance(finding, VerifiedSegment) and finding.is_closing for finding in beyond)


def is_passed_over(first: Finding | None) -> bool:
    """Whether an epoch with this first segment was closed before anybody had begun it: what continues it begins at
    nothing."""
    if not isinstance(first, VerifiedSegment) or not first.is_closing or first.name.ordinal != 1:
        return False
    return first.header.previous_trailer_hash == NO_TRAILER_HASH


def chain_history(vault: VaultId, disk: DiskId, findings: Mapping[SegmentName, Finding]) -> DiskHistory:
    """The history that `findings`, all that lies under the disk's segment names, prove."""
    chain = _Chain(vault=vault, disk=disk, newest_epoch=max((name.epoch for name in findings), default=0))
    by_epoch: dict[int, dict[int, Finding]] = {}
    for name, finding in findings.items():
        by_epoch.setdefault(name.epoch, {})[name.ordinal] = finding
    # why: a successor's epoch is higher than its parent's, so ascending order meets every closing before its successor.
    while pending := (by_epoch.keys() | chain.closings.keys()) - chain.seen:
        number = min(pending)
        chain.seen.add(number)
        chain.follow(number, by_epoch.get(number, {}))
    return DiskHistory(
        disk=disk, epochs=dict(sorted(chain.epochs.items())), damage=tuple(chain.damage), faults=chain.faults
    )


@dataclass(slots=True, kw_only=True)
class _Chain:
    vault: VaultId
    disk: DiskId
    newest_epoch: int
    """Of all that have segments: the only one in which uploads can be under way."""
    epochs: dict[int, EpochHistory] = field(default_factory=dict)
    closings: dict[int, VerifiedSegment] = field(default_factory=dict)
    """By the epoch that they name as the successor."""
    damage: list[VaultFault] = field(default_factory=list)
    faults: dict[int, VaultFault] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def follow(self, number: int, findings: Mapping[int, Finding]) -> None:
        """Takes the epoch's segments as far as the chain holds."""
        # why: what names as its successor an epoch that another process server had passed over came too late
        opened_by = None if is_passed_over(findings.get(1)) else self.closings.get(number)
        if opened_by is None and (cause := self._cause_upstream(findings.get(1))):
            self.faults[number] = cause
            self._note_damage(None, findings, None)
            return
        link = ChainLink.after_closing(opened_by) if opened_by else ChainLink()
        segments: list[VerifiedSegment] = []
        closing, fault = None, None
        for ordinal in range(1, len(findings) + 2):
            finding = findings.get(ordinal) or self._gap(number, ordinal, findings)
            if isinstance(finding, VerifiedSegment):
                finding = link.refusal(finding) or finding
            if not isinstance(finding, VerifiedSegment):
                fault = finding
                break
            link = ChainLink.behind(finding)
            if finding.is_closing:
                closing = finding
                self.closings[finding.grant.epoch] = finding
                break
            segments.append(finding)
        if fault is not None:
            self.faults[number] = fault
        self._note_damage(fault, findings, closing)
        if not (segments or closing or opened_by):
            return
        parent = None
        if opened_by:
            parent = Position(epoch=opened_by.name.epoch, sequence=opened_by.last_sequence)
        self.epochs[number] = EpochHistory(epoch=number, parent=parent, segments=tuple(segments), closing=closing)

    def _cause_upstream(self, first: Finding | None) -> VaultFault | None:
        """The fault that hides the closing segment which the epoch's sound first segment continues, if there is one."""
        if not isinstance(first, VerifiedSegment) or first.header.previous_trailer_hash == NO_TRAILER_HASH:
            return None
        if not first.is_closing:
            return self.faults.get(first.grant.parent_epoch)
        earlier = [number for number in self.faults if number < first.name.epoch]
        return self.faults[max(earlier)] if earlier else None

    def _gap(self, number: int, ordinal: int, findings: Mapping[int, Finding]) -> VaultFault | None:
        beyond = {later: finding for later, finding in findings.items() if later > ordinal}
        if not beyond:
            return None
        name = str(self._name(number, ordinal))
        if number == self.newest_epoch and may_be_under_way(ordinal, max(beyond), beyond.values()):
            return SegmentAwaited(name=name)
        return SegmentMissing(name=name)

    def _note_damage(
        self, fault: VaultFault | None, findings: Mapping[int, Finding], closing: VerifiedSegment | None
    ) -> None:
        if fault is not None:
            self.damage.append(fault)
        if closing is not None:
            return
        for _, finding in sorted(findings.items()):
            if not isinstance(finding, VerifiedSegment) and finding is not fault:
                self.damage.append(finding)

    def _name(self, epoch: int, ordinal: int) -> SegmentName:
        return SegmentName(vault=self.vault, disk=self.disk, epoch=epoch, ordinal=ordinal)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainLink:
    """What the next segment of an epoch has to continue. signed_grant: the epoch's, None until it is known."""

    trailer_hash: bytes = NO_TRAILER_HASH
    next_sequence: int = 1
    signed_grant: bytes | None = None

    @staticmethod
    def after_closing(closing: VerifiedSegment) -> ChainLink:
        return ChainLink(trailer_hash=closing.trailer_hash, signed_grant=closing.header.opening.signed_grant)

    def refusal(self, segment: VerifiedSegment) -> ObjectCorrupt | None:
        """Why `segment` cannot be the next one, None if it can."""
        opening = segment.header.opening
        if self.signed_grant is None and segment.grant.parent_epoch and not segment.is_closing:
            reason = f"epoch {segment.grant.parent_epoch}, which it continues, does not name it as its successor"
        elif segment.header.previous_trailer_hash != self.trailer_hash:
            reason = "it does not follow the segment before it"
        elif segment.first_sequence != self.next_sequence:
            reason = f"it begins at change set {segment.first_sequence} instead of {self.next_sequence}"
        elif not segment.is_closing and self.signed_grant not in (None, opening.signed_grant):
            reason = "it carries another grant than its epoch"
        else:
            return None
        return ObjectCorrupt(name=str(segment.name), reason=reason)

    @staticmethod
    def behind(segment: VerifiedSegment) -> ChainLink:
        """The link that `segment`, once it is taken, leaves."""
        return ChainLink(
            trailer_hash=segment.trailer_hash,
            next_sequence=segment.last_sequence + 1,
            signed_grant=segment.header.opening.signed_grant,
        )
