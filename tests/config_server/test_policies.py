"""Replication policies: who edits them, whom an edit reaches, and what is no policy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from protocol.control import NO_REVISION, AgentOrders
from protocol.control_errors import PolicyChanged, PolicyInUse, PolicyNameTaken, RequestInvalid, ResourceNotFound
from protocol.enrollment import CREDENTIALS_FILE
from protocol.operator_messages import OperatorRole, ReplicationPolicy, RpoStatus
from protocol.vocabulary import MachineId
from tests.config_server.running import (
    AdjustableClock,
    agent_report,
    disk_identity,
    process_server_report,
    registration,
    running_server,
)

GOLD = ReplicationPolicy(
    name="gold",
    rpo_threshold_seconds=420.0,
    point_interval_seconds=30.0,
    application_interval_seconds=7200.0,
    freeze_interval_seconds=60.0,
    copy_interval_seconds=300.0,
)
NOBODY = "9" * 32


def frequencies(orders: AgentOrders) -> tuple[float, ...]:
    (disk,) = orders.disks
    return (
        disk.point_interval_seconds,
        disk.copy_interval_seconds,
        orders.freeze_interval_seconds,
        orders.application_interval_seconds,
    )


async def test_an_edit_reaches_the_machines_of_the_policy_at_once_and_no_other(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server", point_interval_seconds=7.0, copy_interval_seconds=8.0) as server,
        server.operator() as operator,
        await server.agent(tmp_path / "one", name="one") as one,
        await server.agent(tmp_path / "other", name="other") as other,
    ):
        machines = []
        for agent, serial in ((one, "S1"), (other, "S2")):
            assignment = await agent.register_disk(registration(identity=disk_identity(serial)))
            machines.append(assignment.machine)
        orders = await one.wait_for_orders(NO_REVISION, 0)
        assert frequencies(orders)[:2] == (7.0, 8.0)
        made = await operator.create_policy(GOLD)
        await operator.set_policy(machines[0], made.policy)
        assert frequencies(await one.wait_for_orders(NO_REVISION, 0)) == (30.0, 300.0, 60.0, 7200.0)
        assert frequencies(await other.wait_for_orders(NO_REVISION, 0))[:2] == (7.0, 8.0)

        before, elsewhere = [await agent.wait_for_orders(NO_REVISION, 0) for agent in (one, other)]
        polls = [
            asyncio.create_task(agent.wait_for_orders(known.revision, wait))
            for agent, known, wait in ((one, before, 60.0), (other, elsewhere, 1.0))
        ]
        async with asyncio.timeout(20):  # of a minute that the poll may be held
            edited = await operator.edit_policy(made.policy, GOLD.model_copy(update={"point_interval_seconds": 45.0}))
            assert (edited.version, edited.machines) == (2, (machines[0],))
            assert frequencies(await polls[0])[0] == 45.0
            assert (await polls[1]).revision == elsewhere.revision

        await operator.set_policy(machines[0], None)
        assert frequencies(await one.wait_for_orders(NO_REVISION, 0))[:2] == (7.0, 8.0)
    async with running_server(tmp_path / "server") as server, server.operator() as operator:
        (kept,) = (await operator.policies()).policies
        assert kept == edited.model_copy(update={"machines": ()})


async def test_the_threshold_of_the_policy_decides_what_is_a_breach(tmp_path: Path) -> None:
    clock = AdjustableClock()
    async with (
        running_server(tmp_path / "server", clock=clock, rpo_threshold_seconds=3600.0) as server,
        server.operator() as operator,
        await server.agent(tmp_path / "agent") as agent,
        await server.process_server(tmp_path / "process-server") as process_server,
    ):
        await process_server.report(process_server_report())
        assignment = await agent.register_disk(registration())
        await agent.report(agent_report(assignment.disk))
        made = await operator.create_policy(GOLD)
        clock.offset_ns += 500 * 10**9
        first = await operator.disk(assignment.disk)
        await operator.set_policy(assignment.machine, made.policy)
        second = await operator.disk(assignment.disk)
        assert (first.rpo.threshold_seconds, second.rpo.threshold_seconds) == (3600.0, 420.0)
        assert (await operator.disks()).disks[0].rpo.threshold_seconds == 420.0
        assert (first.rpo.status, second.rpo.status) == (RpoStatus.UNKNOWN, RpoStatus.MISSED)
        (machine,) = (await operator.machines()).machines
        assert machine.policy == "gold"


async def test_who_edits_what_somebody_else_has_changed_is_told(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, server.operator() as operator:
        made = await operator.create_policy(GOLD)
        wider = GOLD.model_copy(update={"rpo_threshold_seconds": 900.0})
        assert (await operator.edit_policy(made.policy, wider, version=1)).version == 2
        assert (await operator.edit_policy(made.policy, wider, version=2)).version == 2, "nothing changed"
        with pytest.raises(PolicyChanged) as refused:
            await operator.edit_policy(made.policy, GOLD, version=1)
        assert refused.value.fields["version"] == 2
        async with server.plain_session(bearer=server.admin_token) as session:
            url = f"/v1/policies/{made.policy}"
            async with session.get(url) as response:
                assert response.headers["ETag"] == '"2"'
            json = {"Content-Type": "application/json"}
            async with session.delete(url, headers={"If-Match": '"1"'}) as response:
                assert response.status == 412
            async with session.get("/v1/machines", headers={"If-Match": "somebody else's"}) as response:
                assert response.status == 200
            for header, status in (('"1"', 412), ("*", 200), ("W/x", 400), ('"3"', 200)):
                async with session.put(
                    url, data=GOLD.model_dump_json(), headers=json | {"If-Match": header}
                ) as response:
                    assert response.status == status
            async with session.get("/v1/policies") as response:
                assert "ETag" not in response.headers


async def test_names_are_unique_and_what_is_in_use_stays(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        server.operator() as operator,
        await server.agent(tmp_path / "agent") as agent,
    ):
        machine = (await agent.register_disk(registration())).machine
        gold = await operator.create_policy(GOLD)
        silver = await operator.create_policy(GOLD.model_copy(update={"name": "silver"}))
        with pytest.raises(PolicyNameTaken):
            await operator.create_policy(GOLD)
        with pytest.raises(PolicyNameTaken):
            await operator.edit_policy(silver.policy, GOLD)
        await operator.set_policy(machine, gold.policy)
        with pytest.raises(PolicyInUse):
            await operator.delete_policy(gold.policy)
        await operator.delete_policy(silver.policy)
        for call in (
            operator.delete_policy(silver.policy),
            operator.edit_policy(silver.policy, GOLD.model_copy(update={"name": "x"})),
            operator.set_policy(machine, silver.policy),
            operator.set_policy(MachineId(NOBODY), gold.policy),
        ):
            with pytest.raises(ResourceNotFound):
                await call
        assert [one.content.name for one in (await operator.policies()).policies] == ["gold"]
        entries = (await operator.audit_page()).entries
    actions = [entry.action for entry in entries if "policy" in entry.action]
    assert actions == ["create policy", "create policy", "set policy of machine", "delete policy"]
    told = next(entry for entry in entries if entry.action == "create policy")
    assert told.details == {
        "name": "gold",
        "rpo_threshold_seconds": "420.0",
        "point_interval_seconds": "30.0",
        "application_interval_seconds": "7200.0",
        "freeze_interval_seconds": "60.0",
        "copy_interval_seconds": "300.0",
    }


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"name": ""}, "name"),
    ({"name": "x" * 64}, "name"),
    ({"name": "two words"}, "name"),
    ({"name": "ünlaut"}, "name"),
    ({"rpo_threshold_seconds": 29.0}, "rpo_threshold_seconds"),
    ({"rpo_threshold_seconds": float("inf")}, "rpo_threshold_seconds"),
    ({"rpo_threshold_seconds": 59.0}, "twice point_interval_seconds"),
    ({"point_interval_seconds": 4.0}, "point_interval_seconds"),
    ({"point_interval_seconds": 3601.0}, "point_interval_seconds"),
    ({"application_interval_seconds": 3599.0}, "application_interval_seconds"),
    ({"application_interval_seconds": 12 * 3600.0 + 1}, "application_interval_seconds"),
    ({"application_interval_seconds": -1.0}, "application_interval_seconds"),
    ({"freeze_interval_seconds": 29.0}, "freeze_interval_seconds"),
    ({"freeze_interval_seconds": float("nan")}, "freeze_interval_seconds"),
    ({"copy_interval_seconds": 60.0}, "must be 30, 300 or 900"),
    ({"copy_interval_seconds": 900.0}, "below copy_interval_seconds"),
    ({"retention": 1}, "retention"),
)


@pytest.mark.parametrize(("wrong", "told"), WRONG)
async def test_what_is_no_policy_is_refused_with_the_field_and_the_rule(
    tmp_path: Path, wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        ReplicationPolicy.model_validate(GOLD.model_dump() | wrong)
    assert told in str(refused.value)


async def test_the_server_tells_which_field_and_why(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, server.operator() as operator:
        wrong = GOLD.model_copy(update={"copy_interval_seconds": 60.0})
        with pytest.raises(RequestInvalid) as refused:
            await operator.create_policy(wrong)
        assert "copy_interval_seconds" in str(refused.value)
        assert "30, 300 or 900" in str(refused.value)
        viewer = await server.operator_token(OperatorRole.VIEWER)
        async with server.operator(viewer.secret_token) as reader:
            assert not (await reader.policies()).policies
        await server.agent(tmp_path / "agent")
        async with (
            server.plain_session(tmp_path / "agent" / CREDENTIALS_FILE) as session,
            session.get("/v1/policies") as response,
        ):
            assert response.status == 403
