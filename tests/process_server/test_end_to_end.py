"""The process server from frames to storage and back, and through restarts, with real files and real keys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protocol.vocabulary import Bookmark, ChangeSetEnd, Consistency, PointId
from tests.process_server.world import DISK_BYTES, World

MEBIBYTE = 2**20


@pytest.fixture
async def world(tmp_path: Path) -> World:
    world = World(path=tmp_path)
    await world.begin()
    return world


async def test_what_an_agent_sends_is_recovered_byte_for_byte_from_storage_and_a_recovery_key(world: World) -> None:
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
