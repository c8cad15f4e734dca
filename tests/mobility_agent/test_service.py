"""The whole agent against a model of the servers, on real files."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from mobility_agent.errors import AlreadyProtected, DiskVanished, NotProtected, TooManyDisks
from mobility_agent.service import AgentService
from protocol.control import DiskState
from protocol.messages import CloseDisk
from protocol.vocabulary import Consistency
from tests.mobility_agent.conftest import BLOCK, MIB, QUICK, Bench


@pytest.mark.parametrize("size", [5 * MIB, 5 * MIB + 3 * BLOCK, 3 * MIB + 513, 700, 16 * MIB])
async def test_a_disk_is_replicated_bit_exact_and_gets_a_point(bench: Bench, size: int) -> None:
    bench.write_image(size)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
    assert bench.recovered == bench.contents
    ends = bench.server.disks[bench.disk].ends()
    assert ends[-1].consistency is Consistency.CRASH
    assert ends[-1].bookmark is not None
    assert ends[-1].bookmark.instant_ns == bench.server.instant_ns
    assert ends[-2].copy_in_cursor_bytes == size


async def test_zeroes_and_holes_of_a_new_disk_are_not_sent(bench: Bench) -> None:
    with open(bench.image, "wb") as file:
        file.truncate(64 * MIB)
        file.seek(20 * MIB)
        file.write(bytes(4 * MIB) + b"x" * 100)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
    sets = bench.server.disks[bench.disk].newest.sets
    assert sum(one.raw_bytes for one in sets) == BLOCK
    assert sum(len(table) for one in sets for table, _ in one.frames) == 1
    assert bench.recovered == bench.contents


async def test_a_delta_sends_what_changed_and_blocks_that_became_zero_as_zeroes(bench: Bench) -> None:
    bench.write_image(8 * MIB, zero_share=0.0)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
        before = len(bench.server.disks[bench.disk].newest.sets)
        bench.change(3 * MIB + 5, b"changed")
        bench.change(5 * MIB, bytes(2 * BLOCK))
        service.scan_now()
        await bench.until_points(2)
        assert bench.recovered == bench.contents
    delta = bench.server.disks[bench.disk].newest.sets[before:]
    assert sum(one.raw_bytes for one in delta) == BLOCK
    assert [int(row["length"]) for one in delta for table, _ in one.frames for row in table] == [BLOCK, 2 * BLOCK]


async def test_with_nothing_changed_a_point_is_an_empty_change_set_once_per_interval(bench: Bench) -> None:
    bench.write_image(2 * MIB)
    bench.control.copy_interval_seconds = 0.05
    bench.control.point_interval_seconds = 0.2
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(3)
        status = service.protection[0].replication
        assert status is not None
        assert status.rounds > status.points
    sets = bench.server.disks[bench.disk].newest.sets
    assert [one.raw_bytes for one in sets[-2:]] == [0, 0]


async def test_a_file_that_is_open_for_writing_is_copied_but_gets_no_point(bench: Bench) -> None:
    bench.write_image(4 * MIB)
    with open(bench.image, "r+b"):
        async with bench.agent() as service:
            await service.protect(str(bench.image))
            await bench.server.until(
                lambda: service.protection[0].replication and service.protection[0].replication.rounds >= 2
            )
            status = service.protection[0].replication
            assert status is not None
            assert not status.is_settled
            assert "open for writing" in status.unsettled_reason
    assert bench.recovered == bench.contents
    assert not bench.server.disks[bench.disk].points()
    assert all(not end.consistency.is_settled for end in bench.server.disks[bench.disk].ends())


async def test_without_a_clock_tick_a_settled_position_gets_no_point_and_says_why(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobility_agent.replication.TICK_SECONDS_MAX", 0.05)
    bench.write_image(1 * MIB)
    bench.server.instant_ns = None
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.server.until(
            lambda: (
                bool(bench.server.disks)
                and any(e.consistency.is_settled for e in bench.server.disks[bench.disk].ends())
            )
        )
        status = service.protection[0].replication
        assert status is not None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await bench.server.until(lambda: (now := service.protection[0].replication) and now.rounds > 2)
        status = service.protection[0].replication
        assert status is not None
        assert status.rounds == 2, "the copy and one round after it; the next waits for its interval"
        assert "clock" in status.unsettled_reason
    assert not bench.server.disks[bench.disk].points()


async def test_a_long_round_ends_its_change_sets_by_age_so_that_what_it_sent_becomes_durable(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobility_agent.rounds.CHANGE_SET_SECONDS_MAX", 0.0)
    bench.write_image(20 * MIB, zero_share=0.0)
    async with bench.agent(replace(QUICK, change_set_raw_bytes=64 * MIB)) as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
        before = len(bench.server.disks[bench.disk].newest.sets)
        assert before > 10, "one change set would have held it all"
        for offset in (0, 19 * MIB):
            bench.change(offset, b"changed")
        service.scan_now()
        await bench.until_points(2)
    delta = bench.server.disks[bench.disk].newest.sets[before:]
    assert [one.raw_bytes for one in delta] == [BLOCK, BLOCK, 0]
    assert [one.end.consistency.is_settled for one in delta if one.end is not None] == [False, False, True]
    assert bench.recovered == bench.contents


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8])
async def test_a_cut_connection_is_made_anew_and_nothing_is_lost(bench: Bench, frames: int) -> None:
    bench.write_image(12 * MIB)
    bench.server.cut_after_frames = frames
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
    assert bench.server.connections >= 2
    assert bench.recovered == bench.contents


async def test_an_interrupted_initial_replication_resumes_at_its_cursor(bench: Bench) -> None:
    bench.write_image(12 * MIB, zero_share=0.0)
    bench.server.cut_after_frames = 7
    bench.server.acknowledges = True
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.server.until(lambda: bench.server.connections >= 2)
        await bench.until_points(1)
        sent = sum(one.raw_bytes for one in bench.server.disks[bench.disk].newest.sets)
    assert bench.recovered == bench.contents
    assert sent < 12 * MIB + 3 * MIB, "what was durable is not sent again"
    cursors = [end.copy_in_cursor_bytes for end in bench.server.disks[bench.disk].ends()]
    stated = [cursor for cursor in cursors if cursor is not None]
    assert stated == sorted(stated)
    assert stated[-1] == 12 * MIB


async def test_a_resumed_initial_replication_ends_unsettled_and_the_next_round_settles_it(bench: Bench) -> None:
    bench.write_image(8 * MIB, zero_share=0.0)
    bench.server.cut_after_frames = 5
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
    ends = bench.server.disks[bench.disk].ends()
    complete = next(index for index, end in enumerate(ends) if end.copy_in_cursor_bytes == 8 * MIB)
    assert all(not end.consistency.is_settled for end in ends[: complete + 1])
    assert ends[-1].bookmark is not None


async def test_a_restarted_agent_goes_on_with_deltas_and_sends_nothing_twice(bench: Bench) -> None:
    bench.write_image(6 * MIB)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
    before = len(bench.server.disks[bench.disk].newest.sets)
    bench.change(100, b"while the agent was away")
    async with bench.agent():
        await bench.until_points(2)
    assert bench.recovered == bench.contents
    assert sum(one.raw_bytes for one in bench.server.disks[bench.disk].newest.sets[before:]) == BLOCK


async def test_an_agent_that_lost_all_its_state_sends_everything_again_zeroes_included(bench: Bench) -> None:
    bench.write_image(4 * MIB, zero_share=0.0)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
    for name in bench.directory.names():
        if name.endswith((".ledger", ".digests")):
            bench.directory.remove(name)
    bench.change(MIB, bytes(MIB))
    async with bench.agent() as service:
        await bench.until_points(2)
        assert resyncs(service) == {"history_unknown": 1}
    assert bench.recovered == bench.contents


def resyncs(service: AgentService) -> dict[str, int]:
    status = service.protection[0].replication
    assert status is not None
    return dict(status.resyncs)


async def test_cache_loss_continues_in_a_new_epoch_and_copies_the_lost_extents_again(bench: Bench) -> None:
    bench.write_image(6 * MIB, zero_share=0.0)
    bench.server.commits = False
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
        assert service.protection[0].replication is not None
        bench.server.lose_cache(bench.disk, durable=1)
        await bench.server.until(lambda: bench.server.disks[bench.disk].epoch == 2)
        await bench.until_points(1)
        history = bench.server.disks[bench.disk]
        assert history.newest.parent == (1, 1)
        resent = sum(one.raw_bytes for one in history.newest.sets)
        assert resyncs(service) == {"cache_lost": 1}
    assert bench.recovered == bench.contents
    assert resent == 4 * MIB, "only what was lost is copied in again"
    assert bench.server.openings[-1].wants_new_epoch


async def test_cache_loss_while_the_agent_was_away_is_noticed_by_its_ledger(bench: Bench) -> None:
    bench.write_image(6 * MIB, zero_share=0.0)
    bench.server.commits = False
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
    bench.server.lose_cache(bench.disk, durable=2)
    async with bench.agent() as service:
        await bench.until_points(1)
        assert resyncs(service) == {"cache_lost": 1}
    assert bench.recovered == bench.contents


async def test_unacknowledged_change_sets_are_sent_again_after_a_restart(bench: Bench) -> None:
    bench.write_image(6 * MIB)
    bench.server.acknowledges = False
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
        status = service.protection[0].replication
        assert status is not None
        assert status.backlog_bytes > 0
        assert status.durable_sequence == 0
    bench.server.acknowledges = True
    bench.server.disks[bench.disk].newest.sets.clear()
    async with bench.agent():
        await bench.until_points(1)
    assert bench.recovered == bench.contents


async def test_frames_wait_for_credit(bench: Bench) -> None:
    bench.write_image(6 * MIB, zero_share=0.0)
    bench.server.credit_bytes = 3 * MIB
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.server.until(lambda: bench.server.frames == 2)
        bench.server.credit_bytes = 2**30
        bench.server.cut()
        await bench.until_points(1)
    assert bench.recovered == bench.contents


async def test_a_refused_disk_waits_and_tries_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobility_agent.replication.RETRY_SECONDS_MIN", 0.02)
    bench.write_image(MIB)
    bench.server.refusal = CloseDisk(channel=0, code="no-grant", detail="not yet", is_retryable=True)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.server.until(lambda: len(bench.server.openings) >= 1)
        bench.server.refusal = None
        await bench.until_points(1)
    assert bench.recovered == bench.contents


async def test_one_disk_that_fails_does_not_end_the_others(bench: Bench) -> None:
    bench.write_image(2 * MIB)
    other = bench.image.with_name("other.img")
    other.write_bytes(b"o" * 3 * MIB)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await service.protect(str(other))
        await bench.server.until(
            lambda: len(bench.server.disks) == 2 and all(d.points() for d in bench.server.disks.values())
        )
        other.rename(other.with_suffix(".away"))
        bench.change(0, b"still going")
        service.scan_now()
        await bench.until_points(2)
        by_path = {status.path: status.replication for status in service.protection}
        await bench.server.until(
            lambda: any(r.error is not None for s in service.protection if (r := s.replication) is not None)
        )
        by_path = {status.path: status.replication for status in service.protection}
        failed = by_path[str(other)]
        assert failed is not None
        assert isinstance(failed.error, DiskVanished)
    assert bench.recovered == bench.contents


async def test_a_paused_disk_sends_nothing_until_it_is_resumed(bench: Bench) -> None:
    bench.write_image(2 * MIB)
    bench.control.is_paused = True
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.server.until(lambda: bench.server.connections == 1)
        await bench.server.until(
            lambda: (
                any(disk.state is DiskState.PAUSED for report in bench.control.reports for disk in report.disks)
                or service.protection[0].replication is not None
            )
        )
        assert not bench.server.openings
        bench.control.is_paused = False
        bench.control.changed()
        await bench.until_points(1)
    assert bench.recovered == bench.contents


async def test_unprotect_ends_the_protection_and_leaves_no_state(bench: Bench) -> None:
    bench.write_image(2 * MIB)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
        with pytest.raises(NotProtected):
            await service.unprotect("/no/such/disk", keep=True)
        await service.unprotect(str(bench.image), keep=True)
        await bench.server.until(lambda: bool(bench.control.unregistered))
    assert bench.control.unregistered == [(bench.disk, True)]
    assert not [name for name in bench.directory.names() if name.startswith(bench.disk)]


async def test_a_restart_works_from_cached_orders_while_the_configuration_server_is_away(bench: Bench) -> None:
    bench.write_image(2 * MIB)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
    bench.control.is_down = True
    bench.change(BLOCK, b"nobody is watching")
    async with bench.agent() as service:
        await bench.until_points(2)
        assert service.control_error is not None
    assert bench.recovered == bench.contents


async def test_a_missing_disk_cannot_be_protected(bench: Bench) -> None:
    async with bench.agent() as service:
        with pytest.raises(DiskVanished):
            await service.protect(str(bench.image))


async def test_a_revoked_process_server_is_not_talked_to(bench: Bench) -> None:
    bench.write_image(MIB)
    bench.control.revoked = ("1F",)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.server.until(lambda: bench.server.connections >= 2)
    assert not bench.server.openings


async def test_payloads_are_compressed_at_the_agent_when_asked(bench: Bench) -> None:

    bench.image.write_bytes(b"compressible " * 300_000)
    async with bench.agent(replace(QUICK, compress_at_agent=True)) as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
        status = service.protection[0].replication
        assert status is not None
        assert status.sent_bytes < 100_000
    assert bench.recovered == bench.contents


async def test_two_paths_to_one_disk_are_not_two_disks(bench: Bench) -> None:
    bench.write_image(MIB)
    link = bench.image.with_name("link.img")
    link.symlink_to(bench.image)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        with pytest.raises(AlreadyProtected) as caught:
            await service.protect(str(link))
        assert caught.value.fields["other"] == str(bench.image)


async def test_a_machine_has_a_bounded_number_of_disks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobility_agent.protection.DISKS_PER_MACHINE_MAX", 1)
    bench.write_image(MIB)
    other = bench.image.with_name("other.img")
    other.write_bytes(bytes(MIB))
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        with pytest.raises(TooManyDisks):
            await service.protect(str(other))


async def test_whatever_a_peer_calls_its_refusal_the_report_can_be_sent(bench: Bench) -> None:
    bench.write_image(MIB)
    bench.server.refusal = CloseDisk(channel=0, code="Not A Code!", detail="x" * 1000, is_retryable=False)
    async with bench.agent() as service:
        await service.protect(str(bench.image))
        await bench.server.until(
            lambda: any(disk.error is not None for report in bench.control.reports for disk in report.disks)
        )
    errors = [disk.error for report in bench.control.reports for disk in report.disks if disk.error is not None]
    assert errors[-1].code == "refused-by-peer"


async def test_many_disks_share_few_buffers_and_one_connection(bench: Bench) -> None:
    bench.write_image(MIB)
    images = [bench.image.with_name(f"disk-{number}.img") for number in range(8)]
    for number, image in enumerate(images):
        image.write_bytes(bytes([number + 1]) * (3 * MIB + number))
    async with bench.agent(replace(QUICK, frame_buffers=2)) as service:
        for image in images:
            await service.protect(str(image))
        await bench.server.until(
            lambda: len(bench.server.disks) == 8 and all(disk.points() for disk in bench.server.disks.values())
        )
        for status in service.protection:
            assert status.disk is not None
            contents = images[int(status.path[-5])].read_bytes()
            assert bench.server.disks[status.disk].image(len(contents)) == contents
    assert bench.server.connections == 1
