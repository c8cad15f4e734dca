"""Reads many objects a few at a time, so that a store's latency is waited for once and not once per object.

Invariant: no more than the given number of reads is under way, and none is when the call has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


async def read_each(
    items: Sequence[_Item], read: Callable[[_Item], Awaitable[_Result]], *, at_once: int
) -> list[_Result]:
    """The results in the order of the items. The first failure ends it and is raised."""
    results: dict[int, _Result] = {}
    pending = iter(enumerate(items))

    async def work() -> None:
        for place, item in pending:
            results[place] = await read(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(items))):
                group.create_task(work())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [results[place] for place in range(len(items))]
