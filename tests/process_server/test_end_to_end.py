"""The process server from frames to storage and back, and through every kind of trouble around it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.control import PublishPoint, RevocationList
from protocol.messages import CloseDisk, Goodbye, Refusal
from protocol.signed_records import PointMember, PointRecord, sign_point
from protocol.vocabulary import (
    Bookmark,
    ChangeSetEnd,
    Consistency,
    MachineId,
    PeerIdentity,
    PointId,
    ProcessServerId,
    Role,
)
from runtime.local_directory import LocalDirectory
from storage.errors import StoreFull
from tests.process_server.faulty_directory import FaultyDirectory
from tests.process_server.memory_store import MemoryStore
from tests.process_server.world import (
    DISK,
    DISK_BYTES,
    MACHINE,
    OTHER_DISK,
    SMALL,
    VAULT,
    RunningServer,
    ScriptedAgent,
    World,
    eventually,
)

MEBIBYTE = 2**20
POINT = PointId("e1" * 16)
OTHER_SERVER = ProcessServerId("de" * 16)


def marked(point: PointId = POINT, instant_ns: int = 5) -> ChangeSetEnd:
    return ChangeSetEnd(consistency=Consistency.CRASH, bookmark=Bookmark(point=point, instant_ns=instant_ns))


@pytest.fixture
async def world(tmp_path: Path) -> World:
    world = World(path=tmp_path)
    world.store = world.memory = MemoryStore()
    await world.begin()
    return world


async def send(agent: ScriptedAgent, expected: bytearray, sequence: int, **options: object) -> None:
    """One change set of 64 KiB of noise at a place of its own."""
    data = os.urandom(65536)
    offset = (sequence * MEBIBYTE) % DISK_BYTES
    expected[offset : offset + len(data)] = data
    await agent.send_change_set(sequence, {offset: data}, **options)  # type: ignore[arg-type]


async def opened_agent(running: RunningServer) -> ScriptedAgent:
    agent = await running.agent()
    await agent.open()
    return agent


async def test_what_an_agent_sends_is_recovered_byte_for_byte_from_storage_and_a_recovery_key(tmp_path: Path) -> None:
    world = World(path=tmp_path)
    await world.begin()
    expected = bytearray(DISK_BYTES)
    async with world.running() as running:
        agent = await running.agent()
        opened = await agent.open()
        assert (opened.epoch, opened.parent_epoch, opened.durable_sequence) == (1, 0, 0)
        for sequence in range(1, 13):
            data = os.urandom(200_000) + bytes(100_000)
            offset = (sequence * 3 * MEBIBYTE) % (DISK_BYTES - MEBIBYTE)
            await agent.send_change_set(sequence, {offset: data})
            expected[offset : offset + len(data)] = data
        await agent.until_committed(12)
    assert await world.image() == expected


async def test_a_change_set_of_many_frames_lies_in_one_segment(world: World) -> None:
    async with world.running() as running:
        agent = await opened_agent(running)
        await agent.send_change_set(1, {offset * MEBIBYTE: os.urandom(MEBIBYTE) for offset in range(5)})
        await agent.send_change_set(2, {0: b"x" * 512})
        await agent.until_committed(2)
    history = await world.archive.history(DISK)
    assert [(segment.first_sequence, segment.last_sequence) for segment in history.segments] == [(1, 1), (2, 2)]


async def test_replication_goes_on_into_the_cache_while_the_store_is_away(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    async with world.running() as running:
        agent = await opened_agent(running)
        world.memory.is_away = True
        for sequence in range(1, 6):
            await send(agent, expected, sequence)
            await agent.until_durable(sequence)
        assert agent.positions[1].committed_sequence == 0
        world.memory.is_away = False
        await agent.until_committed(5)
    assert await world.image() == expected


async def test_a_full_store_is_tried_again_until_it_takes_the_segment(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    world.memory.refuses = lambda name: StoreFull(url="memory:", reason="full") if name.endswith(".seg") else None
    async with world.running() as running:
        agent = await opened_agent(running)
        await send(agent, expected, 1)
        await agent.until_durable(1)
        world.memory.refuses = lambda name: None
        await agent.until_committed(1)
    assert await world.image() == expected


async def test_a_lost_reply_of_the_store_is_settled_by_comparing_trailers(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    world.memory.loses_replies = True
    async with world.running() as running:
        agent = await opened_agent(running)
        await send(agent, expected, 1)
        await agent.until_committed(1)
    assert await world.image() == expected


async def test_after_kill_what_was_acknowledged_is_still_there_and_the_epoch_goes_on(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    async with world.running() as running:
        agent = await opened_agent(running)
        world.memory.is_away = True
        for sequence in range(1, 9):
            await send(agent, expected, sequence)
        await agent.until_durable(8)
        await running.kill()
    world.memory.is_away = False
    async with world.running() as running:
        agent = await running.agent()
        opened = await agent.open(epoch=1, acknowledged=8)
        assert (opened.epoch, opened.durable_sequence) == (1, 8)
        await send(agent, expected, 9)
        await agent.until_committed(9)
    assert await world.image() == expected


async def test_after_kill_an_unfinished_change_set_is_cut_off_and_sent_again(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    three = {offset * MEBIBYTE: os.urandom(MEBIBYTE) for offset in range(3)}
    world.limits = dataclasses.replace(SMALL, segment_age_seconds_max=60.0)
    async with world.running() as running:
        agent = await opened_agent(running)
        await send(agent, expected, 1)
        await agent.until_durable(1)
        await agent.send_change_set(2, three, cut=1)
        await running.server._writer.barrier()
        await running.kill()
    async with world.running() as running:
        agent = await running.agent()
        assert (await agent.open(epoch=1, acknowledged=1)).durable_sequence == 1
        await agent.send_change_set(2, three)
        await agent.until_durable(2)
    for offset, data in three.items():
        expected[offset : offset + len(data)] = data
    assert await world.image() == expected


async def test_a_lost_connection_cuts_its_unfinished_change_set_and_ends_nobody_else(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    world.grant(1, disk=OTHER_DISK)
    async with world.running() as running:
        other = await running.agent()
        await other.open(disk=OTHER_DISK)
        agent = await opened_agent(running)
        await send(agent, expected, 1)
        await agent.send_change_set(2, {0: os.urandom(MEBIBYTE), MEBIBYTE: os.urandom(MEBIBYTE)}, cut=1)
        agent.channel.abort()
        again = await running.agent()
        assert (await again.open(epoch=1)).durable_sequence == 1
        await send(again, expected, 2)
        await again.until_committed(2)
        await other.send_change_set(1, {0: b"o" * 512})
        await other.until_durable(1)
    assert await world.image() == expected


async def test_an_agent_that_stops_within_a_change_set_holds_up_nothing_that_was_whole(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("process_server.core.segmenting.CHANGE_SET_SILENCE_SECONDS_MAX", 0.3)
    expected = bytearray(DISK_BYTES)
    async with world.running() as running:
        agent = await opened_agent(running)
        await send(agent, expected, 1)
        await agent.send_change_set(2, {n * MEBIBYTE: os.urandom(MEBIBYTE) for n in range(4, 6)}, cut=1)
        await agent.until(lambda: 1 in agent.closed)
        assert (agent.closed[1].code, agent.closed[1].is_retryable) == ("deadline-exceeded", True)
        assert (await agent.open(2)).durable_sequence == 1
        await agent.until_committed(1, channel=2)
    assert await world.image() == expected


async def test_orders_that_cannot_be_kept_are_not_asked_for_in_a_tight_loop(world: World) -> None:
    world.state = state = FaultyDirectory()
    async with world.running() as running:
        agent = await running.agent()
        await agent.refusal(disk=OTHER_DISK)
        state.fail = lambda operation, name: OSError(28, "No space left on device") if name == "grants" else None
        world.control.answers = 0
        world.grant(1, disk=OTHER_DISK, parent=0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await eventually(lambda: world.control.answers > 4)
        assert world.control.answers
        state.fail = lambda operation, name: None
        await eventually(lambda: bool(running.server._grants.held(OTHER_DISK)))


async def test_a_newer_connection_takes_the_disk_over(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    async with world.running() as running:
        first = await opened_agent(running)
        await send(first, expected, 1)
        second = await running.agent()
        assert (await second.open(epoch=1)).durable_sequence == 1
        await first.until(lambda: 1 in first.closed)
        assert first.closed[1].code == "disk-opened-elsewhere"
        await send(second, expected, 2)
        await second.until_committed(2)
    assert await world.image() == expected


async def test_an_empty_cache_with_storage_behind_it_goes_on_from_the_committed_position_in_a_new_epoch(
    world: World,
) -> None:
    expected = bytearray(DISK_BYTES)
    async with world.running() as running:
        agent = await opened_agent(running)
        await send(agent, expected, 1, end=marked())
        await agent.until_committed(1)
        world.memory.is_away = True
        await agent.send_change_set(2, {0: b"lost" * 128})
        await agent.until_durable(2)
        await running.kill()
    world.memory.is_away = False
    world.cache = LocalDirectory(world.path / "another-cache")
    world.control.reports.clear()
    async with world.running() as running:
        agent = await running.agent()
        opened = await agent.open(epoch=1, acknowledged=2)
        assert (opened.epoch, opened.parent_sequence, opened.durable_sequence) == (2, 1, 0)
        await send(agent, expected, 1)
        await agent.until_committed(1)
    assert await world.image() == expected
    assert POINT in world.control.points()


async def test_a_disk_that_neither_cache_nor_store_can_place_is_refused_for_now(world: World) -> None:
    world.memory.is_away = True
    async with world.running() as running:
        agent = await running.agent()
        refusal = await agent.refusal(epoch=1, acknowledged=5)
        assert (refusal.code, refusal.is_retryable) == ("store-unavailable", True)
        world.memory.is_away = False
        assert (await agent.open(2, epoch=1)).durable_sequence == 0


async def test_a_wanted_new_epoch_follows_a_closing_segment_and_its_parent_position(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    async with world.running() as running:
        agent = await opened_agent(running)
        for sequence in range(1, 4):
            await send(agent, expected, sequence)
        await agent.until_durable(3)
        again = await running.agent()
        opened = await again.open(epoch=1, wants_new=True)
        assert (opened.epoch, opened.parent_epoch, opened.parent_sequence) == (2, 1, 3)
        assert opened.durable_sequence == 0
        await again.send_change_set(1, {0: b"n" * 4096})
        expected[:4096] = b"n" * 4096
        await again.until_committed(1)
    history = await world.archive.history(DISK)
    assert history.epochs[1].closing is not None
    assert await world.image() == expected


async def test_a_new_epoch_survives_a_kill_right_after_it_was_told(world: World) -> None:
    async with world.running() as running:
        agent = await opened_agent(running)
        await agent.send_change_set(1, {0: b"1" * 512})
        await agent.until_durable(1)
        again = await running.agent()
        await again.open(epoch=1, wants_new=True)
        await running.kill()
    world.memory.is_away = True
    async with world.running() as running:
        agent = await running.agent()
        opened = await agent.open(epoch=2)
        assert (opened.epoch, opened.parent_epoch, opened.parent_sequence, opened.durable_sequence) == (2, 1, 1, 0)
        world.memory.is_away = False


async def test_grants_that_leave_the_epoch_behind_begin_the_next_one(world: World) -> None:
    async with world.running() as running:
        agent = await opened_agent(running)
        await agent.send_change_set(1, {0: b"1" * 512})
        await agent.until_committed(1)
    world.control.grants.clear()
    world.grant(2)
    world.grant(3)
    async with world.running() as running:
        agent = await running.agent()
        opened = await agent.open(epoch=1, acknowledged=1)
        assert (opened.epoch, opened.parent_epoch, opened.parent_sequence) == (2, 1, 1)


async def test_a_wanted_epoch_without_a_grant_is_refused_for_now(world: World) -> None:
    world.control.grants.clear()
    world.grant(1)
    async with world.running() as running:
        agent = await opened_agent(running)
        await agent.send_change_set(1, {0: b"1" * 512})
        await agent.until_durable(1)
        again = await running.agent()
        refusal = await again.refusal(epoch=1, wants_new=True)
        assert (refusal.code, refusal.is_retryable) == ("no-grant", True)


async def test_a_predecessor_that_finds_the_closing_segment_stops_and_overwrites_nothing(world: World) -> None:
    successor_key = Ed25519PrivateKey.generate()
    grant, signed = world.sign(2, key=successor_key, server=OTHER_SERVER)
    world.control.grants.clear()
    world.grant(1)
    async with world.running() as running:
        agent = await opened_agent(running)
        await agent.send_change_set(1, {0: b"1" * 512})
        await agent.until_committed(1)
        await world.archive.close_epoch(grant, signed, successor_key)
        before = dict(world.memory.objects)
        await agent.send_change_set(2, {0: b"2" * 512})
        await agent.until(lambda: 1 in agent.closed)
        assert agent.closed[1].code == "disk-stopped"
        again = await running.agent()
        assert (await again.refusal(epoch=1)).code == "disk-stopped"
        await running.server._reporter.report_once()
        assert any(fault.code == "disk-stopped" for fault in world.control.reports[-1].faults)
    assert world.memory.objects == before


async def test_an_epoch_that_another_process_server_closed_is_not_opened(world: World) -> None:
    successor_key = Ed25519PrivateKey.generate()
    grant, signed = world.sign(2, key=successor_key, server=OTHER_SERVER)
    world.control.grants.clear()
    world.grant(1)
    await world.archive.close_epoch(grant, signed, successor_key)
    async with world.running() as running:
        agent = await running.agent()
        refusal = await agent.refusal(epoch=1)
        assert (refusal.code, refusal.is_retryable) == ("disk-taken-over", False)


async def test_a_disk_granted_elsewhere_is_closed_here_and_can_come_back_with_a_higher_epoch(world: World) -> None:
    successor_key = Ed25519PrivateKey.generate()
    grant, signed = world.sign(2, key=successor_key, server=OTHER_SERVER)
    async with world.running() as running:
        agent = await opened_agent(running)
        await agent.send_change_set(1, {0: b"1" * 512})
        await agent.until_committed(1)
        world.control.grants.clear()
        world.control.change()
        await agent.until(lambda: 1 in agent.closed)
        assert (agent.closed[1].code, agent.closed[1].is_retryable) == ("no-grant", True)
        await world.archive.close_epoch(grant, signed, successor_key)
        world.grant(3, parent=2)
        await running.server._reporter.report_once()
        opened = await agent.open(2, epoch=2)
        assert (opened.epoch, opened.parent_epoch, opened.parent_sequence) == (3, 2, 0)


async def test_an_agent_ahead_of_every_grant_is_refused(world: World) -> None:
    async with world.running() as running:
        agent = await running.agent()
        assert (await agent.refusal(epoch=9)).code == "stale-epoch"


async def test_another_machines_agent_may_not_open_the_disk(world: World) -> None:
    stranger = PeerIdentity(vault=VAULT, role=Role.AGENT, identifier=MachineId("bc" * 16))
    async with world.running() as running:
        agent = await running.agent(identity=stranger)
        refusal = await agent.refusal()
        assert (refusal.code, refusal.is_retryable) == ("not-permitted", False)


async def test_a_disk_without_a_grant_is_refused_until_orders_bring_it(world: World) -> None:
    async with world.running() as running:
        agent = await running.agent()
        refusal = await agent.refusal(disk=OTHER_DISK)
        assert (refusal.code, refusal.is_retryable) == ("no-grant", True)
        world.grant(1, disk=OTHER_DISK)
        await running.server._reporter.report_once()
        assert (await agent.open(2, disk=OTHER_DISK)).epoch == 1


async def test_a_forged_grant_counts_for_nothing(world: World) -> None:
    world.control.grants[:] = [grant[:-1] + bytes([grant[-1] ^ 1]) for grant in world.control.grants]
    async with world.running() as running:
        agent = await running.agent()
        assert (await agent.refusal()).code == "no-grant"


async def test_a_change_set_beyond_the_disks_end_closes_that_channel_only(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    async with world.running() as running:
        agent = await opened_agent(running)
        await agent.send_change_set(1, {DISK_BYTES - 256: b"x" * 512})
        await agent.until(lambda: 1 in agent.closed)
        assert agent.closed[1].code == "malformed-input"
        await agent.open(2, epoch=1)
        await send(agent, expected, 1, channel=2)
        await agent.until_committed(1, channel=2)
    assert await world.image() == expected


async def test_a_revoked_certificate_ends_live_connections_and_refuses_new_ones(world: World) -> None:
    async with world.running() as running:
        good = await running.agent(serial="0B")
        agent = await running.agent(serial="0A")
        await agent.open()
        world.control.revoked = RevocationList(number=1, serials=("0A",))
        world.control.change()
        await agent.until(lambda: agent.is_over)
        assert isinstance(agent.ending, Refusal)
        assert agent.ending.code == "certificate-refused"
        late = running.connect(serial="0A")
        await late.until(lambda: late.is_over)
        assert isinstance(late.ending, Refusal)
        assert not good.is_over
    world.control.is_away = True
    async with world.running() as running:
        late = running.connect(serial="0A")
        await late.until(lambda: late.is_over)
        assert isinstance(late.ending, Refusal)


async def test_a_restart_with_the_configuration_server_away_goes_on_from_cached_grants(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    world.control.is_away = True
    async with world.running() as running:
        agent = await opened_agent(running)
        await send(agent, expected, 1)
        await agent.until_committed(1)
        assert {tick.instant_ns for tick in agent.ticks} == {None}
    assert await world.image() == expected


async def test_ticks_carry_the_configuration_servers_clock(world: World) -> None:
    async with world.running() as running:
        await running.server._reporter.report_once()
        agent = await running.agent()
        await agent.until(lambda: agent.ticks)
        instant = agent.ticks[-1].instant_ns
        assert instant is not None
        assert 0 <= instant - world.control.now_ns < 60 * 10**9


async def test_a_committed_point_is_reported_until_the_report_is_answered(world: World) -> None:
    world.control.is_away = True
    async with world.running() as running:
        agent = await opened_agent(running)
        await agent.send_change_set(1, {0: b"1" * 512}, end=marked())
        await agent.until_committed(1)
        await running.kill()
    world.control.is_away = False
    async with world.running() as running:
        await eventually(lambda: POINT in world.control.points())
        await eventually(lambda: not running.server._history(DISK).unreported_points)
        world.control.reports.clear()
        await running.server._reporter.report_once()
        assert POINT not in world.control.points()


async def test_a_point_is_not_reported_before_it_is_committed(world: World) -> None:
    world.memory.is_away = False
    async with world.running() as running:
        agent = await opened_agent(running)
        world.memory.is_away = True
        await agent.send_change_set(1, {0: b"1" * 512}, end=marked())
        await agent.until_durable(1)
        await running.server._reporter.report_once()
        assert world.control.points() == []
        world.memory.is_away = False
        await agent.until_committed(1)
    assert POINT in world.control.points()


async def test_orders_to_publish_are_carried_out_once_and_reported_as_completed(world: World) -> None:
    record = PointRecord(
        vault=VAULT,
        point=POINT,
        instant_ns=5,
        consistency=Consistency.CRASH,
        members=(PointMember(machine=MACHINE, disk=DISK, epoch=1, sequence=1),),
    )
    signed = sign_point(record, world.vault.authority.private_key)
    order = "f0" * 16
    world.control.orders.append(PublishPoint(order=order, point=POINT, record=signed))
    world.control.change()
    async with world.running() as running:
        await eventually(lambda: any(order in report.completed_orders for report in world.control.reports))
        assert not running.server.not_ready()
    points = await world.archive.list_points()
    assert points.records == (record,)
    assert sum(name.endswith(".point") for name in world.memory.create_attempts) == 1


async def test_stop_makes_durable_acknowledges_says_goodbye_and_uploads(world: World) -> None:
    expected = bytearray(DISK_BYTES)
    world.limits = dataclasses.replace(SMALL, segment_age_seconds_max=3600.0)
    async with world.running() as running:
        agent = await opened_agent(running)
        for sequence in range(1, 4):
            await send(agent, expected, sequence)
        await agent.until_durable(3)
    assert isinstance(agent.ending, Goodbye)
    assert agent.positions[1].durable_sequence == 3
    assert await world.image() == expected


async def test_an_agents_goodbye_is_answered_after_everything_is_durable(world: World) -> None:
    async with world.running() as running:
        agent = await opened_agent(running)
        for sequence in range(1, 4):
            await agent.send_change_set(sequence, {0: os.urandom(1024)})
        await agent.send(Goodbye(reason="done"))
        await agent.until(lambda: agent.is_over)
        assert isinstance(agent.ending, Goodbye)
        assert agent.positions[1].durable_sequence == 3


async def test_a_closed_channel_can_be_opened_again_under_another_number(world: World) -> None:
    async with world.running() as running:
        agent = await opened_agent(running)
        await agent.send_change_set(1, {0: b"1" * 512})
        await agent.until_durable(1)
        await agent.send(CloseDisk(channel=1, code="paused", detail="", is_retryable=True))
        await agent.until(lambda: 1 in agent.closed)
        assert (await agent.open(2, epoch=1)).durable_sequence == 1


async def test_a_full_cache_grants_no_credit_keeps_its_limit_and_drains_when_the_store_is_back(world: World) -> None:
    world.limits = dataclasses.replace(SMALL, cache_bytes_max=32 * MEBIBYTE, cache_file_bytes=4 * MEBIBYTE)
    world.cache = directory = FaultyDirectory()
    expected = bytearray(DISK_BYTES)
    async with world.running() as running:
        agent = await opened_agent(running)
        world.memory.is_away = True
        sent = 0
        while not is_starved(running, agent):
            if agent.session.credit_bytes_available >= MEBIBYTE + 16:
                sent += 1
                data = os.urandom(MEBIBYTE)
                offset = (sent * MEBIBYTE) % DISK_BYTES
                expected[offset : offset + MEBIBYTE] = data
                await agent.send_change_set(sent, {offset: data})
            else:
                await agent.until_durable(sent)
        assert 8 < sent < 32
        assert 1 not in agent.closed
        world.memory.is_away = False
        await agent.until_committed(sent)
        await agent.until(lambda: agent.session.credit_bytes_available >= MEBIBYTE + 16)
    assert directory.preallocated_bytes_max <= 32 * MEBIBYTE
    assert await world.image() == expected


def is_starved(running: RunningServer, agent: ScriptedAgent) -> bool:
    """All that was sent is durable, and there is still no credit for a full frame."""
    (connection,) = running.server._connections
    is_all_durable = connection.credit.released_bytes == agent.session.body_bytes_total
    has_credit = agent.session.credit_bytes_available >= MEBIBYTE + 16
    grows = running.server._next_credit(connection) > agent.session.credit_bytes_granted
    return is_all_durable and not has_credit and not grows


async def test_small_frames_without_room_break_the_disk_off_and_lose_nothing(world: World) -> None:
    """Small frames are padded to blocks of 4 KiB, so that credit in bytes cannot foresee what they take."""
    world.limits = dataclasses.replace(
        SMALL, cache_bytes_max=8 * MEBIBYTE, cache_file_bytes=2 * MEBIBYTE, segment_age_seconds_max=0.5
    )
    expected = bytearray(DISK_BYTES)
    async with world.running() as running:
        agent = await opened_agent(running)
        world.memory.is_away = True
        sequence = 0
        while 1 not in agent.closed and sequence < 2000:
            sequence += 1
            await agent.send_change_set(sequence, {sequence * 512: bytes([sequence % 255 + 1]) * 512})
            await agent.until(lambda last=sequence: 1 in agent.closed or positions_durable(agent) >= last)
        assert agent.closed[1].code == "cache-full"
        durable = positions_durable(agent)
        assert running.server._cache.used_bytes <= world.limits.cache_bytes_max
        for number in range(1, durable + 1):
            expected[number * 512 : number * 512 + 512] = bytes([number % 255 + 1]) * 512
        world.memory.is_away = False
        await eventually(lambda: running.server._cache.room_bytes() > 0)
        assert (await agent.open(2, epoch=1, acknowledged=durable)).durable_sequence == durable
        await agent.send_change_set(durable + 1, {0: b"z" * 512}, channel=2)
        expected[:512] = b"z" * 512
        await agent.until_committed(durable + 1, channel=2)
    assert await world.image() == expected


def positions_durable(agent: ScriptedAgent) -> int:
    return agent.positions[1].durable_sequence if 1 in agent.positions else 0
