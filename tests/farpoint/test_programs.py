"""The demo's programs: started, watched, and gone, however the demo ends."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from farpoint.demo.errors import DemoTookTooLong, ProgramEnded
from farpoint.demo.programs import Programs, free_port


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_taken_port_is_passed_over() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        taken: set[int] = set()
        assert free_port(port, taken=taken) > port
        assert free_port(port, taken=taken) > min(taken)


async def test_no_program_outlives_its_context(tmp_path: Path) -> None:
    started: list[int] = []

    async def fail_half_way() -> None:
        async with Programs(tmp_path) as programs:
            program = await programs.start("http.server", "0", "--bind", "127.0.0.1")
            started.append(program.process.pid)
            assert is_running(program.process.pid)
            raise RuntimeError("trouble")

    with pytest.raises(RuntimeError, match="trouble"):
        await fail_half_way()
    assert started
    assert not any(is_running(process) for process in started)


async def test_a_program_that_ends_unasked_says_its_last_words(tmp_path: Path) -> None:
    async with Programs(tmp_path) as programs:
        program = await programs.start("config_server", "run", "--dir", tmp_path / "nowhere")
        await program.process.wait()
        with pytest.raises(ProgramEnded, match="init") as caught:
            programs.check()
        assert caught.value.program == "config-server"


async def test_a_call_gives_lines_as_they_come_and_fails_with_the_last_words(tmp_path: Path) -> None:
    async with Programs(tmp_path) as programs:
        seen: list[bytes] = []
        lines = await programs.call("platform", on_line=seen.append)
        assert lines == seen
        assert lines
        with pytest.raises(ProgramEnded, match="No such option"):
            await programs.call("farpoint", "recover", "--nonsense")


async def test_a_cancelled_call_ends_its_program(tmp_path: Path) -> None:
    async with Programs(tmp_path) as programs:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await programs.call("http.server", "0", "--bind", "127.0.0.1")


async def test_giving_up_tells_what_all_programs_said(tmp_path: Path) -> None:
    async with Programs(tmp_path) as programs:
        program = await programs.start("config_server", "run", "--dir", tmp_path / "nowhere")
        await program.process.wait()
        with pytest.raises(DemoTookTooLong, match="config-server: error"):
            programs.give_up("the test", 1.0)
