"""Services: an orderly stop on either signal, a deadline that is kept, and a service manager that is told."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from runtime.errors import StopDeadlineExceeded
from runtime.exit_codes import ExitCode
from runtime.service import StopSignal, notify_ready, run_service


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, ExitCode.OK), (signal.SIGINT, ExitCode.INTERRUPTED)])
def test_a_signal_asks_for_an_orderly_stop(number: signal.Signals, code: ExitCode) -> None:
    finished: list[str] = []

    async def main(stop: StopSignal) -> None:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        await stop.wait()
        finished.append(stop.reason)

    assert run_service(main) is code
    assert finished == [number.name]


def test_a_service_that_ends_by_itself_is_fine() -> None:
    async def main(stop: StopSignal) -> None:
        return

    assert run_service(main) is ExitCode.OK


def test_what_a_service_raises_comes_out_as_it_was_raised() -> None:
    async def main(stop: StopSignal) -> None:
        raise ValueError("of main")

    with pytest.raises(ValueError, match="of main"):
        run_service(main)


def test_a_service_that_does_not_stop_is_cut_short_at_its_deadline() -> None:
    async def main(stop: StopSignal) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    with pytest.raises(StopDeadlineExceeded):
        run_service(main, stop_deadline_seconds=0.02)


def test_a_second_signal_cuts_the_stop_short_at_once() -> None:
    async def main(stop: StopSignal) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    with pytest.raises(StopDeadlineExceeded):
        run_service(main, stop_deadline_seconds=3600)


def test_a_stop_asked_for_twice_keeps_its_first_reason() -> None:
    async def main(stop: StopSignal) -> None:
        stop.set("first")
        stop.set("second")
        assert stop.reason == "first"

    run_service(main)


def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "20000")

        async def main(stop: StopSignal) -> None:
            loop = asyncio.get_running_loop()
            for _ in range(2):
                assert await loop.run_in_executor(None, manager.recv, 100) == b"WATCHDOG=1"
            notify_ready()

        run_service(main)
        told = []
        while not told or told[-1] != b"STOPPING=1":
            told.append(manager.recv(100))
    assert b"READY=1" in told


def test_a_service_manager_that_does_not_listen_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "missing"))

    async def main(stop: StopSignal) -> None:
        notify_ready()

    assert run_service(main) is ExitCode.OK


def test_bytes_for_a_connection_closed_at_a_stop_are_no_error_but_all_else_that_nobody_awaits_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    closed = RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    async def main(stop: StopSignal) -> None:
        handler = asyncio.get_running_loop().call_exception_handler
        handler({"message": "Fatal error on SSL protocol", "exception": closed})
        assert not caplog.records
        handler({"message": "something else", "exception": RuntimeError("went wrong")})

    run_service(main)
    assert [record.message.splitlines()[0] for record in caplog.records] == ["something else"]
