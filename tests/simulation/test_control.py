"""The simulated configuration server grants, orders and states as the real one does."""

import random

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.control import (
    CommittedPoint,
    DiskIdentity,
    DiskKind,
    DiskPosition,
    DiskRegistration,
    ProcessServerReport,
    PublishPoint,
)
from protocol.control_errors import ServerUnreachable
from protocol.signed_records import verify_grant, verify_point
from protocol.vocabulary import Consistency
from tests.simulation.control import ConfigurationServer, SimulatedAgentControl, SimulatedProcessServerControl
from tests.simulation.loop import VirtualTimeLoop
from tests.simulation.process import ProcessKilled, SimulatedProcess

AUTHORITY = Ed25519PrivateKey.from_private_bytes(b"a" * 32)
REGISTRATION = DiskRegistration(
    path="/dev/one",
    identity=DiskIdentity(kind=DiskKind.BLOCK_DEVICE, size_bytes=65536, logical_sector_bytes=512, serial="ONE"),
)


def simulate(main, seed=1):
    loop = VirtualTimeLoop(seed=seed)
    server = ConfigurationServer(
        loop,
        random.Random(seed),
        vault="5eed" * 8,
        authority=AUTHORITY,
        process_server_keys=[b"k" * 32, b"o" * 32],
        copy_interval_seconds=1.0,
    )
    process = SimulatedProcess("test")
    agent, process_server = (
        SimulatedAgentControl(server, process),
        SimulatedProcessServerControl(server, process, server.owner),
    )
    try:
        return loop.run_until_complete(main(server, agent, process_server, process))
    finally:
        loop.close()


def report(positions=(), points=(), completed=()):
    return ProcessServerReport(
        version="1",
        host="host",
        port=9443,
        cache_bytes=0,
        cache_limit_bytes=1,
        positions=tuple(positions),
        committed_points=tuple(points),
        completed_orders=tuple(completed),
    )


def position_of(disk, epoch):
    return DiskPosition(
        disk=disk,
        epoch=epoch,
        durable_sequence=0,
        committed_sequence=0,
        cached_bytes=0,
        received_bytes=0,
        stored_bytes=0,
    )


def grants_of(orders):
    return [verify_grant(record, AUTHORITY.public_key()) for record in orders.grants]


def test_a_disk_registered_twice_is_one_disk_with_a_grant_and_a_spare():
    async def main(server, agent, process_server, process):
        first = await agent.register_disk(REGISTRATION)
        assert await agent.register_disk(REGISTRATION) == first
        grants = grants_of(await process_server.report(report()))
        assert [(grant.epoch, grant.parent_epoch, grant.is_spare) for grant in grants] == [(1, 0, False), (2, 1, True)]
        assert {grant.disk for grant in grants} == {first.disk}

    simulate(main)


def test_an_epoch_that_rose_brings_the_next_spare_and_old_grants_stay_as_they_were():
    async def main(server, agent, process_server, process):
        disk = (await agent.register_disk(REGISTRATION)).disk
        before = (await process_server.report(report())).grants
        after = await process_server.report(report([position_of(disk, 2)]))
        assert after.grants[0] == before[1]
        assert [grant.epoch for grant in grants_of(after)] == [2, 3]

    simulate(main)


def test_a_committed_point_is_stated_once_and_ordered_to_be_published_until_that_is_reported():
    async def main(server, agent, process_server, process):
        disk = (await agent.register_disk(REGISTRATION)).disk
        point = CommittedPoint(
            disk=disk, epoch=1, sequence=3, point="f" * 32, instant_ns=5, consistency=Consistency.CRASH
        )
        await process_server.report(report(points=[point]))
        orders = await process_server.report(report(points=[point]))
        publish = [order for order in orders.orders if isinstance(order, PublishPoint)]
        assert len(publish) == 1
        assert verify_point(publish[0].record, AUTHORITY.public_key()).members[0].sequence == 3
        orders = await process_server.report(report(completed=[publish[0].order]))
        assert not [order for order in orders.orders if isinstance(order, PublishPoint)]
        assert list(server.ledger) == ["f" * 32]

    simulate(main)


def test_a_long_poll_ends_when_the_orders_change_and_at_its_deadline():
    async def main(server, agent, process_server, process):
        first = await agent.wait_for_orders("", 30.0)
        begin = server.loop.time()
        assert (await agent.wait_for_orders(first.revision, 10.0)).revision == first.revision
        assert server.loop.time() - begin >= 10.0
        server.loop.call_later(1.0, server.register, REGISTRATION)
        begin = server.loop.time()
        assert (await agent.wait_for_orders(first.revision, 10.0)).revision != first.revision
        assert server.loop.time() - begin < 2.0

    simulate(main)


def test_a_server_that_is_away_or_loses_its_reply_is_unreachable():
    async def main(server, agent, process_server, process):
        server.lost_reply_probability = 1.0
        with pytest.raises(ServerUnreachable):
            await agent.register_disk(REGISTRATION)
        assert len(server.disks) == 1
        server.is_down = True
        with pytest.raises(ServerUnreachable):
            await process_server.wait_for_orders("", 1.0)
        process.kill()
        with pytest.raises(ProcessKilled):
            await process_server.report(report())

    simulate(main)


def test_a_disk_that_moves_is_granted_to_the_other_process_server_and_no_longer_to_the_first():
    async def main(server, agent, process_server, process):
        disk = (await agent.register_disk(REGISTRATION)).disk
        other = SimulatedProcessServerControl(server, process, server.process_servers[1])
        await process_server.report(report([position_of(disk, 1)]))
        server.switch_process_server(continues_reported_epoch=True)
        assert grants_of(await process_server.report(report([position_of(disk, 1)]))) == []
        granted = [(grant.epoch, grant.parent_epoch) for grant in grants_of(await other.report(report()))]
        assert granted == [(3, 1), (4, 3)]
        # the old owner had used its spare before it heard of that: the new one continues there
        await process_server.report(report([position_of(disk, 2)]))
        granted = [(grant.epoch, grant.parent_epoch) for grant in grants_of(await other.report(report()))]
        assert granted == [(5, 2), (6, 5)]
        assert (await agent.wait_for_orders("", 1.0)).disks[0].process_server == server.process_servers[1].address

    simulate(main)


def test_who_is_cut_off_is_not_answered_and_a_held_server_answers_nobody():
    async def main(server, agent, process_server, process):
        server.cut_off.add(process.name)
        with pytest.raises(ServerUnreachable):
            await process_server.report(report())
        server.heal()
        await process_server.report(report())
        server.is_held = True
        begin = server.loop.time()
        with pytest.raises(ServerUnreachable):
            await process_server.report(report())
        assert server.loop.time() - begin > 20.0

    simulate(main)
