"""Calls that block go to the bounded executor, and are over before anybody goes on, cancelled or not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

Result = TypeVar("Result")


async def ended(future: asyncio.Future[Result]) -> None:
    """Waits until a call in the executor is over, whatever came of it. Cancelled, however often, it still waits: the
    call's buffers are in use."""
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
        if future.done():
            break
    if not future.cancelled():
        future.exception()  # or else the loop would complain that nobody had asked for it
    if cancelled is not None:
        raise cancelled


async def finished(future: asyncio.Future[Result]) -> Result:
    """What a call in the executor returns or raises. Cancelled, it still waits as ended() does."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await ended(future)
        raise


async def blocking(executor: Executor | None, call: Callable[[], Result]) -> Result:
    """Runs `call` in the executor; None is the loop's own."""
    return await finished(asyncio.get_running_loop().run_in_executor(executor, call))
