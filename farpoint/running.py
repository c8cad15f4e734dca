"""Runs a command's coroutine so that SIGINT and SIGTERM end it in order: cancelled, waited for, exit code 130."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from runtime.exit_codes import ExitCode
from runtime.output import notice
from runtime.service import StopSignal, run_service


def run_interruptible(work: Callable[[], Awaitable[ExitCode | None]]) -> ExitCode:
    """Returns what `work` returns (None means OK), or INTERRUPTED if a signal ended it. Raises what `work` raises."""
    result: list[ExitCode | None] = []
    was_stopped = False

    async def main(stop: StopSignal) -> None:
        nonlocal was_stopped

        async def watch() -> None:
            nonlocal was_stopped
            await stop.wait()
            was_stopped = True
            task.cancel()

        async def run() -> None:
            try:
                result.append(await work())
            finally:
                watcher.cancel()

        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(watch())
                task = group.create_task(run())
        except ExceptionGroup as failures:
            if len(failures.exceptions) > 1:
                raise
            raise failures.exceptions[0] from None

    code = run_service(main)
    if was_stopped and not result:
        notice("interrupted")
        return ExitCode.INTERRUPTED
    return (result[0] if result else None) or code
