"""What the agent makes of what its sources say: which one a disk gets, what instant a point carries, when rounds
follow at once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mobility_agent.core.tracking_choice import SourceChoice, WantedSource
from mobility_agent.disk_reader import open_local_disk
from mobility_agent.errors import DiskNotSupported
from mobility_agent.ports import DrawRandom, SourceDisk
from mobility_agent.tracking.bitmap import BitmapSource
from mobility_agent.tracking.change_source import Promise, ReadTick, RoundEnd, SourceFrame, no_tick
from mobility_agent.tracking.scan import ScanRound, ScanSource
from mobility_agent.tracking.selection import SourceSelection
from protocol.vocabulary import DiskId
from runtime.directory import DurableDirectory
from runtime.local_directory import LocalDirectory
from tests.mobility_agent.conftest import MIB, Bench

DISK = DiskId("d" * 32)
EARLIER_NS, LATER_NS = 1_000_000_000, 2_000_000_000_000


def test_a_scanning_agent_ends_what_an_earlier_one_tracked_and_begins_nothing(tmp_path: Path) -> None:
    pins = tmp_path / "pins"
    (pins / "disks" / DISK).mkdir(parents=True)
    (pins / "programs_1").mkdir()
    (pins / "programs_1" / "link_mark_request").touch()
    SourceSelection(WantedSource.SCAN, pins).forget(DISK)
    assert not pins.exists()


class ActedRound(ScanRound):
    """A round that ends as it is told to."""

    end_as: Callable[[RoundEnd], RoundEnd]
    at_read: Callable[[], None] = staticmethod(lambda: None)

    def read(self, window: memoryview, packing: memoryview) -> Sequence[SourceFrame]:
        self.at_read()
        return super().read(window, packing)

    def end(self) -> RoundEnd:
        return self.end_as(super().end())


class ActedSource(ScanSource):
    """Counts its rounds."""

    follow_ups_max = 2  # type: ignore[misc]
    end_as: Callable[[RoundEnd], RoundEnd] = staticmethod(lambda end: end)
    at_read: Callable[[], None] = staticmethod(lambda: None)
    rounds = 0

    def begin_round(self, *, first_bytes: int, read_tick: ReadTick = no_tick, is_held: bool = False) -> ScanRound:
        self.rounds += 1
        acted = ActedRound(self._source, self.digests, first_bytes=first_bytes, read_tick=read_tick)
        acted.end_as, acted.at_read = self.end_as, self.at_read  # type: ignore[method-assign]
        return acted


class ActedTracking:
    """Implements Tracking."""

    def __init__(self, prepare: Callable[[ActedSource], None]) -> None:
        self.source: ActedSource | None = None
        self.forgotten: list[DiskId] = []
        self._prepare = prepare

    def open(
        self, disk: DiskId, path: str, source: SourceDisk, *, directory: DurableDirectory, draw_random: DrawRandom
    ) -> ActedSource:
        self.source = ActedSource(disk=disk, source=source, directory=directory, draw_random=draw_random)
        self._prepare(self.source)
        return self.source

    def forget(self, disk: DiskId) -> None:
        self.forgotten.append(disk)


@pytest.mark.parametrize("instant_ns", [EARLIER_NS, None])
async def test_a_point_carries_the_tick_that_its_source_read(bench: Bench, instant_ns: int | None) -> None:
    """A scan reads it while its proof still holds; what a tracked disk shows is of the begin of its round."""

    def tick() -> None:
        assert bench.service is not None
        for link in bench.service._links.values():
            assert link.uplink.connection is not None
            link.uplink.connection.last_tick_ns = LATER_NS

    def prepare(source: ActedSource) -> None:
        if instant_ns is not None:
            source.end_as = lambda end: dataclasses.replace(end, instant_ns=instant_ns)  # type: ignore[method-assign]
        source.at_read = tick  # type: ignore[method-assign]

    bench.tracking = ActedTracking(prepare)
    bench.write_image(2 * MIB)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
    bookmark = bench.server.disks[bench.disk].ends()[-1].bookmark
    assert bookmark is not None
    assert bookmark.instant_ns == (instant_ns or LATER_NS)


async def test_what_went_out_in_a_disturbed_round_gets_a_point_at_the_next_that_settles(bench: Bench) -> None:
    """Although that one finds nothing changed, and the interval for disks without changes is far from over."""
    is_disturbed = False

    def prepare(source: ActedSource) -> None:
        fuzzy = RoundEnd(promise=Promise.COPY_IN_FUZZY, reason="disturbed")
        source.follow_ups_max = 0  # type: ignore[misc]
        source.end_as = lambda end: fuzzy if is_disturbed else end  # type: ignore[method-assign]

    bench.tracking = ActedTracking(prepare)
    bench.write_image(MIB)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
        is_disturbed = True
        bench.change(0, b"in a disturbed round")
        settled = _rounds(service.protection)
        service.scan_now()
        await bench.server.until(lambda: _rounds(service.protection) > settled)
        assert len(bench.server.disks[bench.disk].points()) == 1
        is_disturbed = False
        service.scan_now()
        await bench.until_points(2)


async def test_rounds_follow_one_that_did_not_settle_but_not_for_ever(bench: Bench) -> None:
    def prepare(source: ActedSource) -> None:
        source.end_as = lambda end: RoundEnd(promise=Promise.COPY_IN_FUZZY, reason="disturbed")  # type: ignore[method-assign]

    tracking = bench.tracking = ActedTracking(prepare)
    bench.write_image(MIB)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        rounds = 1 + 1 + ActedSource.follow_ups_max  # the copy, the delta round after it, and what follows that
        await bench.server.until(lambda: bool(service.protection) and _rounds(service.protection) == rounds)
        (status,) = service.protection
        assert status.replication is not None
        assert (status.replication.settled_rounds, status.replication.points) == (0, 0)
        assert status.replication.unsettled_reason == "disturbed"
    assert tracking.source is not None
    assert tracking.source.rounds == rounds


async def test_a_release_comes_to_its_end_although_the_kernel_goes_on_tracking(bench: Bench) -> None:
    class Kept(ActedTracking):
        def forget(self, disk: DiskId) -> None:
            raise DiskNotSupported(path=disk, reason="its tracking cannot be ended")

    bench.tracking = Kept(lambda source: None)
    bench.write_image(MIB)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
        await service.unprotect(str(bench.image), keep=True)
        await bench.server.until(lambda: not service.protection)
    assert bench.control.unregistered == [(bench.disk, True)]


def _rounds(protection: Sequence[object]) -> int:
    (status,) = protection
    replication = getattr(status, "replication", None)
    return 0 if replication is None else replication.rounds


async def test_the_end_of_a_protection_ends_its_tracking(bench: Bench) -> None:
    tracking = bench.tracking = ActedTracking(lambda source: None)
    bench.write_image(MIB)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
        disk = bench.disk
        await service.unprotect(str(bench.image), keep=True)
        await bench.server.until(lambda: not service.protection)
    assert tracking.forgotten == [disk]


def test_a_disk_whose_tracking_cannot_begin_is_scanned_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").write_bytes(os.urandom(MIB))
    (tmp_path / "pins").mkdir()
    disk = open_local_disk(str(tmp_path / "image"), None)

    def refuse(self: SourceSelection, *arguments: object) -> BitmapSource:
        raise OSError(22, "the verifier says no")

    monkeypatch.setattr(SourceSelection, "choose", lambda self, source: SourceChoice(source="bitmap", reasons=()))
    monkeypatch.setattr(SourceSelection, "_open_bitmap", refuse)
    monkeypatch.setattr("mobility_agent.tracking.kernel_tracker.KernelTracker.open", refuse)

    def opened(wanted: WantedSource) -> str:
        selection = SourceSelection(wanted, tmp_path / "pins")
        directory = LocalDirectory(tmp_path / "state")
        found = selection.open(DISK, "path", disk, directory=directory, draw_random=os.urandom)
        assert isinstance(found, ScanSource)
        return found.reason

    assert "the verifier says no" in opened(WantedSource.AUTO)
    with pytest.raises(DiskNotSupported, match="the verifier says no"):
        opened(WantedSource.BITMAP)
