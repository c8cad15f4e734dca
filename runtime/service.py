"""How a program runs as a service: uvloop, an orderly stop on SIGTERM or SIGINT within a named deadline, systemd told
of both.

Invariant: after the first signal `StopSignal` is set and stays set; a second signal, or the deadline, cuts the stop
short.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
import uvloop

from runtime.errors import StopDeadlineExceeded
from runtime.exit_codes import ExitCode

STOP_DEADLINE_SECONDS: Final = 30.0
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger(__name__)


class StopSignal:
    """Asked for once, by whoever; waited for by as many as like. Made and used within one event loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.reason = ""

    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self, reason: str) -> None:
        """Asks for an orderly stop. Later calls change nothing."""
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    async def wait(self) -> None:
        """Returns when a stop has been asked for."""
        await self._event.wait()


def run_service(
    main: Callable[[StopSignal], Awaitable[None]], *, stop_deadline_seconds: float = STOP_DEADLINE_SECONDS
) -> ExitCode:
    """Runs `main` under uvloop until it returns. It shall return soon after its StopSignal is set.

    Returns INTERRUPTED if SIGINT stopped it, else OK. Raises what `main` raises, and StopDeadlineExceeded when `main`
    had to be cancelled because it did not return within the deadline after a stop signal (at once after a second
    signal).
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(main, stop_deadline_seconds))


async def _run(main: Callable[[StopSignal], Awaitable[None]], stop_deadline_seconds: float) -> ExitCode:
    stop, hurry = StopSignal(), StopSignal()
    received: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        received.append(number)
        (hurry if stop.is_set() else stop).set(number.name)

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(report_loop_fault)
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        await _supervise(main, stop, hurry, stop_deadline_seconds)
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None
    finally:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)
        notify("STOPPING=1")
    return ExitCode.INTERRUPTED if signal.SIGINT in received[:1] else ExitCode.OK


def report_loop_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What the event loop met and nobody awaits goes to the log as an error, but for one that is none."""
    error = context.get("exception")
    # why: uvloop's TLS answers bytes that arrive on a connection which we have just closed, finds its own end closed,
    # and calls that fatal; the connection was over anyway. It happens when a long poll is given up at a stop.
    if isinstance(error, RuntimeError) and str(error).endswith("the handler is closed"):
        log.debug("bytes for a closed connection", reason=str(error))
        return
    loop.default_exception_handler(context)


async def _supervise(
    main: Callable[[StopSignal], Awaitable[None]], stop: StopSignal, hurry: StopSignal, stop_deadline_seconds: float
) -> None:
    """Owns main's task and the two that watch over it; all have ended on return."""
    cut_short = False

    async def run_main() -> None:
        try:
            await main(stop)
        finally:
            watcher.cancel()
            heartbeat.cancel()

    async def watch() -> None:
        nonlocal cut_short
        await stop.wait()
        log.info("stopping", reason=stop.reason, deadline_seconds=stop_deadline_seconds)
        notify("STOPPING=1")
        try:
            async with asyncio.timeout(stop_deadline_seconds):
                await hurry.wait()
        except TimeoutError:
            pass
        cut_short = True
        task.cancel()

    async with asyncio.TaskGroup() as group:
        watcher = group.create_task(watch(), name="stop-watcher")
        heartbeat = group.create_task(_keep_watchdog_quiet(), name="watchdog")
        task = group.create_task(run_main(), name="main")
    if cut_short:
        raise StopDeadlineExceeded(seconds=stop_deadline_seconds)


async def _keep_watchdog_quiet() -> None:
    """Tells systemd that the event loop turns, twice per interval that the unit asks for."""
    interval_seconds = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    while interval_seconds > 0:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_seconds / 2)


def notify(state: str) -> None:
    """Tells the service manager a state (`READY=1`, `STATUS=…`) if it listens; see sd_notify(3). Never fails the
    program."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError as error:
            log.warning("service manager not told", state=state, reason=str(error))


def notify_ready() -> None:
    """Says that the program serves now; called once, when its sockets listen."""
    notify("READY=1")
