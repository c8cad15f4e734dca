"""The simulated source: what it writes is remembered exactly, and no proof of stillness survives a write."""

import asyncio
import random

import pytest

from mobility_agent.errors import DiskUnreadable, DiskVanished, NotProvedStill
from tests.simulation.disk import SimulatedDisk, SimulatedSources, Workload
from tests.simulation.loop import VirtualTimeLoop
from tests.simulation.process import ProcessKilled, SimulatedProcess

SIZE_BYTES = 8 * 65536


def simulate(main, seed=1):
    loop = VirtualTimeLoop(seed=seed)
    disk = SimulatedDisk(loop, random.Random(seed), path="/dev/one", serial="ONE", size_bytes=SIZE_BYTES)
    process = SimulatedProcess("agent")
    source = SimulatedSources([disk], process)("/dev/one", None)
    try:
        return loop.run_until_complete(main(disk, source, process))
    finally:
        loop.close()


def read_all(source):
    buffer = bytearray(SIZE_BYTES)
    source.read_into(0, buffer)
    return bytes(buffer)


def test_a_workload_leaves_a_history_in_which_every_moment_can_be_found():
    async def main(disk, source, process):
        workload = Workload(
            pause_seconds=0.1,
            writes_per_burst_max=5,
            write_gap_seconds=0.01,
            write_bytes_max=65536,
            zero_share=0.3,
            random_share=0.5,
        )
        images = []
        async with asyncio.TaskGroup() as group:
            task = group.create_task(disk.run_workload(workload))
            for _ in range(20):
                await asyncio.sleep(0.2)
                images.append((disk.history.version, read_all(source)))
            task.cancel()
        assert disk.history.version > 20
        for version, image in images:
            assert version in disk.history.versions_of(image)

    simulate(main)


def test_a_write_during_a_proof_breaks_it_for_good():
    async def main(disk, source, process):
        proof = source.begin_stillness()
        assert proof.holds()
        async with asyncio.TaskGroup() as group:
            group.create_task(disk.write(0, b"x" * 512))
            await asyncio.sleep(0.001)
            assert not proof.holds()
        assert not proof.end()
        assert not proof.end()

    for seed in range(10):
        simulate(main, seed)


def test_a_proof_holds_when_nothing_was_written_between_its_begin_and_its_end():
    async def main(disk, source, process):
        await disk.write(0, b"before" + bytes(506))
        proof = source.begin_stillness()
        await asyncio.sleep(10)
        assert proof.end()
        await disk.write(0, b"after" + bytes(507))
        assert proof.end()

    simulate(main)


def test_a_waiting_writer_breaks_a_proof_that_began_while_it_waited():
    async def main(disk, source, process):
        first = source.begin_stillness()
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(disk.write(0, b"x" * 512))
            await asyncio.sleep(0.001)
            waited = not writing.done()
            second = source.begin_stillness()
            first.end()
            await asyncio.sleep(0.1)
            return waited, second.end()

    outcomes = {simulate(main, seed) for seed in range(20)}
    assert outcomes == {(True, False), (False, True)}


def test_ranges_without_data_certainly_read_as_zeroes():
    async def main(disk, source, process):
        image = bytearray(read_all(source))
        for first, end in source.data_ranges(0, SIZE_BYTES):
            assert any(image[first:end])
            image[first:end] = bytes(end - first)
        assert not any(image)

    simulate(main)


def test_faults_are_the_agents_own_typed_errors():
    async def main(disk, source, process):
        disk.read_failure_probability = disk.stillness_refusal_probability = 1.0
        with pytest.raises(DiskUnreadable):
            read_all(source)
        with pytest.raises(NotProvedStill):
            source.begin_stillness()
        with pytest.raises(DiskVanished):
            SimulatedSources([disk], process)("/dev/none", None)
        process.kill()
        with pytest.raises(ProcessKilled):
            read_all(source)

    simulate(main)
