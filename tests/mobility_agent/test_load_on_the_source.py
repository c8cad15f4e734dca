"""What the agent asks of its machine: reads of copy-ins keep their rate and their priority."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobility_agent.core.read_pace import ReadPace
from mobility_agent.frame_buffers import FrameBuffers
from mobility_agent.io_priority import IoPriority
from mobility_agent.pipeline import ReadAhead
from tests.deploy.needed_tools import not_here
from tests.mobility_agent.conftest import QUICK, Bench
from tests.mobility_agent.test_scan import MIB, Scanned

IOPRIO_GET = {"x86_64": 252, "aarch64": 31}


@given(
    rate=st.integers(1, 10**9),
    steps=st.lists(st.tuples(st.integers(0, 2**24), st.floats(0, 100)), min_size=1, max_size=30),
)
def test_the_rate_is_never_exceeded_by_more_than_one_step(rate: int, steps: list[tuple[int, float]]) -> None:
    """Whoever waits as told has, at any time, read no more than the rate allows since they began, but for one step."""
    pace, now, read_bytes = ReadPace(rate), 0.0, 0
    for step_bytes, pause in steps:
        assert read_bytes <= rate * now * (1 + 1e-9) + 1e-3
        now += pause
        read_bytes += step_bytes
        now += pace.wait_seconds(step_bytes, now)


def test_without_a_rate_nobody_waits() -> None:
    assert ReadPace(0).wait_seconds(2**40, 5.0) == 0


def test_time_in_which_nobody_read_is_not_saved_up() -> None:
    pace = ReadPace(100)
    assert pace.wait_seconds(100, 0.0) == 1.0
    assert pace.wait_seconds(100, 1000.0) == 1.0


@pytest.mark.parametrize(("priority", "value"), [(IoPriority.LOW, 2 << 13 | 7), (IoPriority.IDLE, 3 << 13)])
async def test_reads_have_the_priority_that_was_asked_for(tmp_path: Path, priority: IoPriority, value: int) -> None:
    number = IOPRIO_GET.get(os.uname().machine)
    if number is None:
        not_here("this processor's number of ioprio_get is not known")
    asked = functools.partial(ctypes.CDLL(None).syscall, number, 1, 0)
    seen: list[int] = []
    scanned = Scanned(tmp_path, MIB)
    changes = scanned.source.begin_round(first_bytes=0)
    read = changes.read
    changes.read = lambda *buffers: (seen.append(asked()), read(*buffers))[1]  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as executor:
        ahead = ReadAhead(changes, FrameBuffers(buffers=2), executor, compress=False, priority=priority)
        assert await ahead.next() is not None
        await ahead.close()
        assert seen == [value]
        assert executor.submit(asked).result() == 2 << 13 | 4, "what else the thread does has the usual one"


async def test_a_copy_in_keeps_the_rate_that_was_set(bench: Bench) -> None:
    """It cannot be through sooner."""
    bench.write_image(4 * MIB)
    began = time.monotonic()
    async with bench.agent(dataclasses.replace(QUICK, copy_read_bytes_per_second=8 * MIB)) as service:
        await service.protect(str(bench.image))
        await bench.until_points(1)
    assert time.monotonic() - began >= 0.5
