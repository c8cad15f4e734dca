"""Two agents with one identity: found out, cut off, and released."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config_server.core.clones import ENDED_BOOTS_MAX, BootHistory, observe_boot
from protocol.control import NO_REVISION, AgentReport
from protocol.control_errors import MachineQuarantined, ResourceNotFound
from protocol.enrollment import make_certificate_key
from protocol.vocabulary import MachineId
from tests.config_server.running import agent_report, process_server_report, registration, running_server


def report_of(boot_id: str) -> AgentReport:
    return agent_report().model_copy(update={"boot_id": boot_id})


@given(st.lists(st.integers(0, 4), max_size=30))
def test_a_restart_is_no_copy_and_a_boot_that_comes_back_is_one(boots: list[int]) -> None:
    history: BootHistory | None = BootHistory(boot_id="", ended=())
    heard: list[int] = []
    for boot in boots:
        assert history is not None
        history = observe_boot(history, str(boot))
        has_come_back = boot in heard and heard[-1] != boot
        assert (history is None) == has_come_back
        if has_come_back:
            return
        heard.append(boot)


def test_only_so_many_ended_boots_are_remembered() -> None:
    history = BootHistory(boot_id="", ended=())
    for boot in range(3 * ENDED_BOOTS_MAX):
        found = observe_boot(history, str(boot))
        assert found is not None
        history = found
    assert len(history.ended) == ENDED_BOOTS_MAX
    assert observe_boot(history, "0") is not None
    assert observe_boot(history, history.ended[0]) is None


async def test_both_are_refused_and_everybody_is_told_until_it_is_released(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, server.operator() as operator:
        process_server = await server.process_server(tmp_path / "process-server")
        async with process_server, await server.agent(tmp_path / "agent") as agent:
            orders = await process_server.report(process_server_report())
            machine = (await agent.register_disk(registration())).machine
            for boot in ("a", "a", "b", "b", "c"):
                await agent.report(report_of(boot))
            waiting = asyncio.ensure_future(agent.wait_for_orders((await agent.report(report_of("c"))).revision, 60.0))
            await asyncio.sleep(0)
            with pytest.raises(MachineQuarantined):
                await agent.report(report_of("a"))
            async with asyncio.timeout(20):
                with pytest.raises(MachineQuarantined):
                    await waiting
            for boot in ("a", "b", "c", "d"):
                with pytest.raises(MachineQuarantined):
                    await agent.report(report_of(boot))
            for call in (
                agent.wait_for_orders(NO_REVISION, 0.0),
                agent.register_disk(registration()),
                agent.renew(make_certificate_key("x").request_pem),
            ):
                with pytest.raises(MachineQuarantined):
                    await call
            barred = (await process_server.wait_for_orders(NO_REVISION, 0.0)).revoked
            (held,) = [one for one in (await operator.certificates()).certificates if one.identifier == machine]
            assert barred.serials == (held.serial,)
            assert barred.number > orders.revoked.number
            assert not held.is_revoked
            assert (await operator.machines()).machines[0].is_quarantined
            entry = (await operator.audit_page()).entries[-1]
            assert (entry.action, entry.subject, entry.actor_kind) == (
                "quarantine machine",
                machine,
                "configuration-server",
            )
            assert (entry.details["boot_id"], entry.details["other_boot_id"]) == ("a", "c")
    async with running_server(tmp_path / "server") as server, server.operator() as operator:
        process_server = server.process_server_client(tmp_path / "process-server")
        async with process_server, server.agent_client(tmp_path / "agent") as agent:
            with pytest.raises(MachineQuarantined):
                await agent.report(report_of("c"))
            with pytest.raises(ResourceNotFound):
                await operator.release_machine(MachineId("9" * 32))
            for _ in range(2):
                await operator.release_machine(machine)
            released = (await process_server.wait_for_orders(NO_REVISION, 0.0)).revoked
            assert released.serials == ()
            assert released.number > barred.number
            await agent.report(report_of("a"))
            await agent.report(report_of("d"))
            with pytest.raises(MachineQuarantined):
                await agent.report(report_of("a"))
            again = (await process_server.wait_for_orders(NO_REVISION, 0.0)).revoked
            assert (again.serials, again.number > released.number) == (barred.serials, True)
