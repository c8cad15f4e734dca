"""A process server whose cache had lost its end unnoticed, and that cached other change sets under numbers that the
store holds already: it leaves the epoch, whatever happens to it meanwhile, and its agent sends everything."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from protocol.vocabulary import SEQUENCE_UNKNOWN
from tests.process_server.world import RunningServer, ScriptedAgent, World

LATER_BYTES = b"later"


@pytest.fixture
async def forked(tmp_path: Path) -> World:
    """The store has two change sets, the cache remembers one of them."""
    world = World(path=tmp_path)
    await world.begin()
    world.grant(3)
    async with world.running() as running:
        agent = await opened(running)
        await agent.send_change_set(1, {0: b"1" * 512})
        await agent.until_committed(1)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "cache", kept)
    async with world.running() as running:
        agent = await opened(running, epoch=1, acknowledged=1)
        await agent.send_change_set(2, {0: b"2" * 512})
        await agent.until_committed(2)
    shutil.rmtree(tmp_path / "cache")
    kept.rename(tmp_path / "cache")
    return world


async def opened(running: RunningServer, **request: int) -> ScriptedAgent:
    agent = await running.agent()
    await agent.open(**request)
    return agent


async def send_into_the_fork(running: RunningServer) -> None:
    agent = await opened(running, epoch=1, acknowledged=1)
    await agent.send_change_set(2, {0: LATER_BYTES + bytes(512 - len(LATER_BYTES))})
    await agent.until(lambda: 1 in agent.closed)
    assert agent.closed[1].code == "disk-stopped"


@pytest.mark.parametrize("restarts", [0, 1, 2])
async def test_the_next_epoch_is_told_to_continue_nothing_that_the_agent_knows(forked: World, restarts: int) -> None:
    """Also by a process that starts after the one that found the fork, killed at once or not."""
    async with forked.running() as running:
        await send_into_the_fork(running)
        if not restarts:
            await expect_everything_anew(running)
            return
        await running.kill()
    if restarts == 2:
        async with forked.running():
            pass
    async with forked.running() as running:
        await expect_everything_anew(running)


async def expect_everything_anew(running: RunningServer) -> None:
    agent = await running.agent()
    told = await agent.open(epoch=1, acknowledged=2)
    assert (told.epoch, told.parent_epoch, told.parent_sequence) == (2, 1, SEQUENCE_UNKNOWN)
    await agent.send_change_set(1, {0: b"3" * 512})
    await agent.until_committed(1)
