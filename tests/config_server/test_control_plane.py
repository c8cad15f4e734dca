"""Reports up, orders down, against a server that really runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from config_server.announcements import WAITERS_PER_MEMBER_MAX
from protocol.control import (
    NO_REVISION,
    CommittedPoint,
    PublishMachineDescription,
    PublishPoint,
)
from protocol.control_errors import (
    DiskChanged,
    DiskOfAnotherMachine,
    ResourceNotFound,
)
from protocol.errors import NotPermitted
from protocol.operator_messages import RpoReason, RpoStatus
from protocol.signed_records import verify_grant, verify_machine_description, verify_point
from protocol.vocabulary import Consistency, DiskId, PointId
from tests.config_server.running import (
    AUTHORITY_KEY,
    GIBIBYTE,
    HOST,
    VAULT,
    AdjustableClock,
    Running,
    agent_report,
    disk_identity,
    image_identity,
    position,
    process_server_report,
    registration,
    running_server,
)

PUBLIC_KEY = AUTHORITY_KEY.public_key


def committed_point(
    disk: DiskId, *, point: str = "a", instant_ns: int, epoch: int = 1, sequence: int = 5
) -> CommittedPoint:
    return CommittedPoint(
        disk=disk,
        epoch=epoch,
        sequence=sequence,
        point=PointId(point * 32),
        instant_ns=instant_ns,
        consistency=Consistency.CRASH,
    )


async def test_a_disk_is_registered_once_however_often_it_is_asked_for(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, await server.agent(tmp_path / "agent") as agent:
        first = await agent.register_disk(registration())
        again = await agent.register_disk(registration(path="/dev/vdb"))
        named = await agent.register_disk(registration(disk=first.disk))
        other = await agent.register_disk(registration(path="/dev/vdc", identity=disk_identity("S2")))
        image = await agent.register_disk(registration(path="/a.img", identity=image_identity(7)))
        replaced = await agent.register_disk(registration(path="/a.img", identity=image_identity(8)))
    assert first == again == named
    assert len({first.disk, other.disk, image.disk, replaced.disk}) == 4
    assert (first.vault, first.process_server) == (VAULT, None)


async def test_a_machine_gets_the_process_server_that_is_there_and_learns_it_at_once(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, await server.agent(tmp_path / "agent") as agent:
        assignment = await agent.register_disk(registration())
        orders = await agent.report(agent_report(assignment.disk))
        assert orders.disks[0].process_server is None
        waiting = asyncio.ensure_future(agent.wait_for_orders(orders.revision, 30.0))
        async with await server.process_server(tmp_path / "ps") as process_server:
            await process_server.report(process_server_report(port=9555))
        orders = await asyncio.wait_for(waiting, 10)
        address = orders.disks[0].process_server
        again = await agent.register_disk(registration())
    assert address is not None
    assert (address.host, address.port) == ("127.0.0.1", 9555)
    assert again.process_server == address


async def test_a_new_machine_goes_to_the_process_server_with_the_fewest_disks(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        await server.process_server(tmp_path / "ps1", name="one") as one,
        await server.process_server(tmp_path / "ps2", name="two") as two,
        await server.agent(tmp_path / "a1", name="m1") as first,
        await server.agent(tmp_path / "a2", name="m2") as second,
    ):
        await one.report(process_server_report(port=9001))
        await two.report(process_server_report(port=9002))
        assigned = [
            (await first.register_disk(registration("/dev/vda", disk_identity("A")))).process_server,
            (await first.register_disk(registration("/dev/vdb", disk_identity("B")))).process_server,
            (await second.register_disk(registration("/dev/vda", disk_identity("A")))).process_server,
        ]
    assert assigned[0] == assigned[1] != assigned[2]


async def test_a_process_server_holds_the_present_grant_and_one_spare(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        await server.process_server(tmp_path / "ps") as process_server,
        await server.agent(tmp_path / "agent") as agent,
    ):
        orders = await process_server.report(process_server_report())
        assert orders.grants == ()
        waiting = asyncio.ensure_future(process_server.wait_for_orders(orders.revision, 30.0))
        assignment = await agent.register_disk(registration())
        orders = await asyncio.wait_for(waiting, 10)
        present, spare = (verify_grant(record, PUBLIC_KEY) for record in orders.grants)
        assert (present.epoch, present.parent_epoch, present.is_spare) == (1, 0, False)
        assert (spare.epoch, spare.parent_epoch, spare.is_spare) == (2, 1, True)
        assert (present.vault, present.machine, present.disk) == (VAULT, assignment.machine, assignment.disk)
        assert (present.disk_size_bytes, present.sector_bytes) == (GIBIBYTE, 512)
        # the spare is used: the next is signed, and what was signed before stays as it is
        advanced = await process_server.report(process_server_report(positions=(position(assignment.disk, epoch=2),)))
        assert advanced.grants[0] == orders.grants[1]
        assert verify_grant(advanced.grants[1], PUBLIC_KEY).epoch == 3
        late = await process_server.report(process_server_report(positions=(position(assignment.disk, epoch=1),)))
        assert late.grants == advanced.grants


async def test_a_committed_bookmark_becomes_a_signed_point_that_is_ordered_until_it_is_done(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        await server.process_server(tmp_path / "ps") as process_server,
        await server.agent(tmp_path / "agent") as agent,
        server.operator() as operator,
    ):
        await process_server.report(process_server_report())
        assignment = await agent.register_disk(registration())
        tick_ns = (await agent.report(agent_report(assignment.disk))).now_ns
        point = committed_point(assignment.disk, instant_ns=tick_ns)
        report = process_server_report(
            positions=(position(assignment.disk, durable=6, committed=5),), committed_points=(point,)
        )
        orders = await process_server.report(report)
        again = await process_server.report(report)
        assert orders.orders == again.orders
        publish = next(order for order in orders.orders if isinstance(order, PublishPoint))
        record = verify_point(publish.record, PUBLIC_KEY)
        assert (record.point, record.instant_ns, record.consistency) == (point.point, tick_ns, Consistency.CRASH)
        assert [(one.machine, one.disk, one.epoch, one.sequence) for one in record.members] == [
            (assignment.machine, assignment.disk, 1, 5)
        ]
        (listed,) = (await operator.points()).points
        assert not listed.is_published
        done = process_server_report(completed_orders=(publish.order,))
        left = await process_server.report(done)
        assert not any(isinstance(order, PublishPoint) for order in left.orders)
        assert (await process_server.report(done)).orders == left.orders
        (listed,) = (await operator.points(disk=assignment.disk)).points
        assert listed.is_published
        (disk,) = (await operator.disks()).disks
    assert (disk.rpo.status, disk.newest_point, disk.newest_point_instant_ns) == (RpoStatus.OK, point.point, tick_ns)
    assert disk.rpo.age_seconds is not None
    assert 0 <= disk.rpo.age_seconds < 60


async def test_another_statement_under_a_points_name_changes_nothing_and_spoils_no_report(tmp_path: Path) -> None:
    """Agents choose the names of points; a process server repeats a report that was refused for ever."""
    async with (
        running_server(tmp_path / "server") as server,
        await server.process_server(tmp_path / "ps") as process_server,
        await server.agent(tmp_path / "agent") as agent,
        server.operator() as operator,
    ):
        await process_server.report(process_server_report())
        disk = (await agent.register_disk(registration())).disk
        first = committed_point(disk, instant_ns=1)
        await process_server.report(process_server_report(committed_points=(first,)))
        news = committed_point(disk, point="b", instant_ns=2, sequence=4)
        await process_server.report(
            process_server_report(committed_points=(news, first.model_copy(update={"sequence": 6})))
        )
        points = (await operator.points()).points
        assert {(one.point, one.sequence) for one in points} == {
            (first.point, first.sequence),
            (news.point, news.sequence),
        }


async def test_a_points_name_that_two_disks_use_is_published_for_the_first_and_spoils_no_report(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        await server.process_server(tmp_path / "ps") as process_server,
        await server.agent(tmp_path / "one") as one,
        await server.agent(tmp_path / "two") as two,
        server.operator() as operator,
    ):
        await process_server.report(process_server_report())
        disks = [(await agent.register_disk(registration())).disk for agent in (one, two)]
        for disk in disks:
            orders = await process_server.report(
                process_server_report(committed_points=(committed_point(disk, instant_ns=1),))
            )
        published = [order for order in orders.orders if isinstance(order, PublishPoint)]
        assert {point.disk for point in (await operator.points()).points} == set(disks)
    authority = AUTHORITY_KEY.public_key
    assert [[member.disk for member in verify_point(order.record, authority).members] for order in published] == [
        [disks[0]]
    ]


async def test_a_machines_description_is_published_anew_when_it_changes_and_only_then(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        await server.process_server(tmp_path / "ps") as process_server,
        await server.agent(tmp_path / "agent") as agent,
    ):
        await process_server.report(process_server_report())
        disk = (await agent.register_disk(registration())).disk
        await agent.report(agent_report(disk))
        await agent.report(agent_report(disk))
        orders = (await process_server.report(process_server_report())).orders
        (first,) = [order for order in orders if isinstance(order, PublishMachineDescription)]
        description = verify_machine_description(first.record, PUBLIC_KEY)
        assert (description.name, description.processors, description.firmware) == ("db-1", 4, "uefi")
        assert [one.disk for one in description.disks] == [disk]
        await process_server.report(process_server_report(completed_orders=(first.order,)))
        await agent.report(agent_report(disk))
        assert (await process_server.report(process_server_report())).orders == ()
        await agent.report(agent_report(disk, host=HOST.model_copy(update={"processors": 8})))
        (second,) = (await process_server.report(process_server_report())).orders
    assert isinstance(second, PublishMachineDescription)
    assert (first.version, second.version) == (1, 2)
    assert verify_machine_description(second.record, PUBLIC_KEY).processors == 8


async def test_an_agent_cannot_name_another_machines_disk(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        await server.agent(tmp_path / "a1") as owner,
        await server.agent(tmp_path / "a2") as thief,
        server.operator() as operator,
    ):
        disk = (await owner.register_disk(registration())).disk
        own = (await thief.register_disk(registration())).disk
        assert own != disk
        with pytest.raises(NotPermitted):
            await thief.register_disk(registration(disk=disk))
        with pytest.raises(NotPermitted):
            await thief.report(agent_report(own, disk))
        with pytest.raises(NotPermitted):
            await thief.unregister_disk(disk, keep_data=False)
        with pytest.raises(NotPermitted):
            await thief.unregister_disk(DiskId("9" * 32), keep_data=False)
        statuses = {one.disk: one for one in (await operator.disks()).disks}
    assert statuses[disk].is_protected
    assert statuses[own].state is None, "a refused report leaves nothing behind"


async def test_a_disk_with_the_world_wide_name_of_another_machines_disk_is_refused(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        await server.agent(tmp_path / "a1") as owner,
        await server.agent(tmp_path / "a2") as other,
    ):
        identity = disk_identity(wwn="naa.5000c500a1b2c3d4")
        disk = (await owner.register_disk(registration(identity=identity))).disk
        with pytest.raises(DiskOfAnotherMachine):
            await other.register_disk(registration(identity=identity))
        await owner.unregister_disk(disk, keep_data=True)
        taken_over = await other.register_disk(registration(identity=identity))
    assert taken_over.disk != disk


async def test_a_disk_that_grew_is_refused_until_its_protection_has_ended(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, await server.agent(tmp_path / "agent") as agent:
        disk = (await agent.register_disk(registration())).disk
        grown = registration(identity=disk_identity(size_bytes=2 * GIBIBYTE))
        with pytest.raises(DiskChanged):
            await agent.register_disk(grown)
        await agent.unregister_disk(disk, keep_data=True)
        assert (await agent.register_disk(grown)).disk != disk


async def test_protection_ends_and_begins_again_with_the_same_disk_if_its_data_was_kept(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, await server.agent(tmp_path / "agent") as agent:
        kept = (await agent.register_disk(registration())).disk
        await agent.unregister_disk(kept, keep_data=True)
        await agent.unregister_disk(kept, keep_data=True)
        assert (await agent.report(agent_report(kept))).disks == ()
        assert (await agent.register_disk(registration())).disk == kept
        await agent.unregister_disk(kept, keep_data=False)
        await agent.unregister_disk(kept, keep_data=True)
        assert (await agent.register_disk(registration())).disk != kept


async def test_a_process_server_cannot_report_what_it_was_not_granted(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        await server.process_server(tmp_path / "ps1", name="one") as granted,
        await server.process_server(tmp_path / "ps2", name="two") as other,
        await server.agent(tmp_path / "agent") as agent,
        server.operator() as operator,
    ):
        await granted.report(process_server_report())
        disk = (await agent.register_disk(registration())).disk
        for reporter, epoch in ((other, 1), (granted, 3)):
            with pytest.raises(NotPermitted):
                await reporter.report(process_server_report(positions=(position(disk, epoch=epoch),)))
            point = committed_point(disk, instant_ns=1, epoch=epoch)
            with pytest.raises(NotPermitted):
                await reporter.report(process_server_report(committed_points=(point,)))
        assert (await operator.points()).points == ()
        assert (await operator.disk(disk)).position is None


async def test_a_long_poll_with_an_old_revision_is_answered_at_once(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, await server.agent(tmp_path / "agent") as agent:
        async with asyncio.timeout(10):
            orders = await agent.wait_for_orders(NO_REVISION, 60.0)
            again = await agent.wait_for_orders(orders.revision, 0.05)
    assert again.revision == orders.revision
    assert again.now_ns > orders.now_ns


async def test_a_long_poll_wakes_when_an_operator_pauses_the_disk(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        await server.agent(tmp_path / "agent") as agent,
        server.operator() as operator,
    ):
        disk = (await agent.register_disk(registration())).disk
        orders = await agent.wait_for_orders(NO_REVISION, 0.0)
        waiting = asyncio.ensure_future(agent.wait_for_orders(orders.revision, 60.0))
        assert (await operator.pause_disk(disk, is_paused=True)).is_paused
        woken = await asyncio.wait_for(waiting, 10)
        with pytest.raises(ResourceNotFound):
            await operator.pause_disk(DiskId("9" * 32), is_paused=True)
    assert woken.disks[0].is_paused


async def test_a_member_holds_no_more_long_polls_than_it_needs_and_the_newest_count(tmp_path: Path) -> None:
    """An agent that was killed five times within a minute gets its orders all the same."""
    async with running_server(tmp_path / "server") as server, await server.agent(tmp_path / "agent") as agent:
        revision = (await agent.wait_for_orders(NO_REVISION, 0.0)).revision
        others = [server.agent_client(tmp_path / "agent") for _ in range(6)]
        waiting = [asyncio.ensure_future(one.wait_for_orders(revision, 60.0)) for one in others]
        ended: set[asyncio.Future[Any]] = set()
        async with asyncio.timeout(10):
            while len(ended) < len(others) - WAITERS_PER_MEMBER_MAX:
                done, _ = await asyncio.wait(set(waiting) - ended, return_when=asyncio.FIRST_COMPLETED)
                ended |= done
        assert {one.result().revision for one in ended} == {revision}
        await agent.register_disk(registration())
        async with asyncio.timeout(10):
            woken = await asyncio.gather(*(set(waiting) - ended))
        assert len(woken) == WAITERS_PER_MEMBER_MAX
        assert revision not in {orders.revision for orders in woken}
        for client in others:
            await client.close()


async def test_a_stop_ends_long_polls_at_once(tmp_path: Path) -> None:
    async with asyncio.timeout(10):
        async with running_server(tmp_path / "server") as server:
            agent = await server.agent(tmp_path / "agent")
            orders = await agent.wait_for_orders(NO_REVISION, 0.0)
            waiting = asyncio.ensure_future(agent.wait_for_orders(orders.revision, 60.0))
            async with server.operator() as operator:
                await operator.machines()
        assert (await waiting).revision == orders.revision
        await agent.close()


async def test_a_restart_goes_on_with_the_same_members_grants_and_orders(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        process_server = await server.process_server(tmp_path / "ps")
        agent = await server.agent(tmp_path / "agent")
        await process_server.report(process_server_report())
        disk = (await agent.register_disk(registration())).disk
        agent_before = await agent.report(agent_report(disk))
        point = committed_point(disk, instant_ns=agent_before.now_ns)
        before = await process_server.report(
            process_server_report(positions=(position(disk, durable=5, committed=5),), committed_points=(point,))
        )
        await process_server.close()
        await agent.close()
        port = server.address.port
    async with running_server(tmp_path / "server", listen=f"127.0.0.1:{port}") as server:
        after = await process_server.wait_for_orders(NO_REVISION, 0.0)
        agent_after = await agent.wait_for_orders(NO_REVISION, 0.0)
        async with server.operator() as operator:
            (status,) = (await operator.disks()).disks
        await process_server.close()
        await agent.close()
    assert after.model_copy(update={"now_ns": 0}) == before.model_copy(update={"now_ns": 0})
    assert agent_after.revision == agent_before.revision
    assert (status.rpo.status, status.newest_point) == (RpoStatus.OK, point.point)


@pytest.mark.parametrize("hours", [-3, 3])
async def test_a_clock_that_jumps_makes_the_rpo_unknown_until_the_next_point(tmp_path: Path, hours: int) -> None:
    clock = AdjustableClock()
    async with running_server(tmp_path / "server", clock=clock) as server:
        process_server = await server.process_server(tmp_path / "ps")
        agent = await server.agent(tmp_path / "agent")
        await process_server.report(process_server_report())
        disk = (await agent.register_disk(registration())).disk
        tick_ns = (await agent.report(agent_report(disk))).now_ns
        first = committed_point(disk, point="a", instant_ns=tick_ns)
        await process_server.report(process_server_report(committed_points=(first,)))
        statuses = [await _rpo(server, disk)]
        clock.offset_ns = hours * 3600 * 10**9
        statuses.append(await _rpo(server, disk))
        # a mark from before the jump that arrives after it does not help
        late = committed_point(disk, point="b", instant_ns=tick_ns, sequence=6)
        await process_server.report(process_server_report(committed_points=(late,)))
        statuses.append(await _rpo(server, disk))
        tick_ns = (await agent.report(agent_report(disk))).now_ns
        new = committed_point(disk, point="c", instant_ns=tick_ns, sequence=7)
        await process_server.report(process_server_report(committed_points=(new,)))
        statuses.append(await _rpo(server, disk))
        await process_server.close()
        await agent.close()
    assert statuses == [
        (RpoStatus.OK, RpoReason.WITHIN_THRESHOLD),
        (RpoStatus.UNKNOWN, RpoReason.CLOCK_JUMPED),
        (RpoStatus.UNKNOWN, RpoReason.CLOCK_JUMPED),
        (RpoStatus.OK, RpoReason.WITHIN_THRESHOLD),
    ]


async def test_a_clock_that_was_set_back_while_the_server_was_down_is_noticed(tmp_path: Path) -> None:
    clock = AdjustableClock()
    async with running_server(tmp_path / "server", clock=clock) as server:
        process_server = await server.process_server(tmp_path / "ps")
        agent = await server.agent(tmp_path / "agent")
        await process_server.report(process_server_report())
        disk = (await agent.register_disk(registration())).disk
        tick_ns = (await agent.report(agent_report(disk))).now_ns
        point = committed_point(disk, instant_ns=tick_ns)
        await process_server.report(process_server_report(committed_points=(point,)))
        await process_server.close()
        await agent.close()
    clock.offset_ns = -3600 * 10**9
    async with running_server(tmp_path / "server", clock=clock) as server:
        assert await _rpo(server, disk) == (RpoStatus.UNKNOWN, RpoReason.CLOCK_JUMPED)


async def _rpo(server: Running, disk: DiskId) -> tuple[RpoStatus, RpoReason]:
    async with server.operator() as operator:
        rpo = (await operator.disk(disk)).rpo
    assert (rpo.age_seconds is None) == (rpo.status is RpoStatus.UNKNOWN)
    return rpo.status, rpo.reason
