"""Calls that block go to the bounded executor, and are over before anybody goes on, cancelled or not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

Result = TypeVar("Result")


async def finished(future: asyncio.Future[Result]) -> Result:
    """Waits for a call in the executor. Cancelled, it still waits until the call has ended: its buffers are in use."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue
        if not future.cancelled():
            future.exception()
        raise


async def blocking(executor: Executor, call: Callable[[], Result]) -> Result:
    """Runs `call` in the executor."""
    return await finished(asyncio.get_running_loop().run_in_executor(executor, call))
