"""A deterministic event loop in virtual time: nothing ever waits, and one seed gives one order of events.

- Time stands still while callbacks are ready and jumps to the next timer when none is.
- What is ready is run in a seeded random order, within what asyncio promises: plain callbacks (transports, futures'
  done callbacks, `call_soon`) keep the order in which they were registered among themselves, so that a transport's
  connection_made, data_received and connection_lost never overtake each other; the steps of different tasks, whose
  order nobody may rely on, are permuted among themselves and against the plain callbacks. A task never has two steps
  ready.
- Timers fire late by a few random microseconds, as real ones do; so no two are ever due at the same instant by
  accident.
- `run_in_executor` runs its function inline, at some instant after the call and before its result is delivered; an
  executor with one worker starts them in order, as the real one does.
- Tasks hash by their serial number, not by their address: sets of tasks iterate alike in every process.
- Nothing of a held process runs until it is let go, as after SIGSTOP; its timers are then all due at once.
- When nothing is ready and nothing is scheduled the run is stuck, and says so; so it does at the step limit.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import selectors
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, Final

from tests.simulation.process import RUNNING_PROCESS, ProcessKilled, SimulatedProcess

TIMER_LATENESS_SECONDS_MAX: Final = 50e-6
EXECUTOR_DELAY_SECONDS_MAX: Final = 2e-3
STEPS_MAX: Final = 5_000_000


class SimulationStuck(Exception):
    """Nothing is ready, nothing is scheduled, and the run is not over."""


class StepLimitExceeded(Exception):
    """The run took more steps than any honest run does: something spins."""


class SimulatedTask(asyncio.Task):  # type: ignore[type-arg]
    """A task whose hash is its serial number in this loop."""

    def __init__(self, coroutine: Any, *, loop: VirtualTimeLoop, **options: Any) -> None:
        self.serial = loop.next_task_serial()
        super().__init__(coroutine, loop=loop, name=f"task-{self.serial}", **options)

    def __hash__(self) -> int:
        return self.serial

    __eq__ = object.__eq__


class BlindSelector(selectors.BaseSelector):
    """Watches no file and never waits: the loop does not ask it."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, -1, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, -1, 0, None)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        raise KeyError(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`failures` collects what would otherwise only be logged: exceptions that nobody took."""

    def __init__(self, *, seed: int, start_seconds: float = 1000.0, steps_max: int = STEPS_MAX) -> None:
        self._now_seconds = start_seconds
        self._random = random.Random(f"loop {seed}")
        self._task_serial = 0
        self._steps_max = steps_max
        self._worker_free_at: dict[int, list[float]] = {}
        self.steps = 0
        self.failures: list[str] = []
        self._held: dict[SimulatedProcess, list[asyncio.Handle]] = {}
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timer_numbers = itertools.count()
        super().__init__(BlindSelector())
        self.set_task_factory(lambda loop, coroutine, **options: SimulatedTask(coroutine, loop=loop, **options))
        self.set_exception_handler(lambda loop, context: self._note_failure(context))

    def next_task_serial(self) -> int:
        self._task_serial += 1
        return self._task_serial

    def time(self) -> float:
        return self._now_seconds

    def close(self) -> None:
        self._timers.clear()
        super().close()

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        due_seconds = when + self._random.random() * TIMER_LATENESS_SECONDS_MAX
        timer = asyncio.TimerHandle(due_seconds, callback, args, self, context)
        # why: tuples are compared much faster than timers
        heapq.heappush(self._timers, (due_seconds, next(self._timer_numbers), timer))
        return timer

    def hold(self, process: SimulatedProcess) -> None:
        """Nothing of the process runs from now on."""
        self._held.setdefault(process, [])

    def let_go(self, process: SimulatedProcess) -> None:
        """What became ready while the process was held runs now, in the order in which it became so."""
        self._ready.extend(self._held.pop(process, ()))  # type: ignore[attr-defined]

    def _run_once(self) -> None:
        """One round, in place of asyncio's: advances time if nothing is ready, permutes what is, and runs it."""
        ready: deque[asyncio.Handle] = self._ready  # type: ignore[attr-defined]
        self._take_due_timers(ready)
        self.steps += len(ready)
        if self.steps > self._steps_max:
            raise StepLimitExceeded(f"more than {self._steps_max} steps at {self._now_seconds:.6f} s")
        if len(ready) > 1:
            self._permute(ready)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            if self._held:
                process = handle._context.get(RUNNING_PROCESS)  # type: ignore[attr-defined]
                if process in self._held:
                    self._held[process].append(handle)
                    continue
            handle._run()

    def _take_due_timers(self, ready: deque[asyncio.Handle]) -> None:
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not timers:
                raise SimulationStuck(f"nothing is ready or scheduled at {self._now_seconds:.6f} s")
            self._now_seconds = max(self._now_seconds, timers[0][0])
        while timers and timers[0][0] <= self._now_seconds:
            timer = heapq.heappop(timers)[2]
            if not timer._cancelled:
                ready.append(timer)

    def _permute(self, ready: Any) -> None:
        handles = list(ready)
        draw = self._random.random
        keys = [draw() for _ in handles]
        is_task_step = [isinstance(getattr(h._callback, "__self__", None), asyncio.Task) for h in handles]
        plain = [index for index, is_step in enumerate(is_task_step) if not is_step]
        for index, key in zip(plain, sorted(keys[index] for index in plain), strict=True):
            keys[index] = key
        ready.clear()
        ready.extend(handles[index] for index in sorted(range(len(handles)), key=keys.__getitem__))

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self.create_future()
        workers = getattr(executor, "_max_workers", 4)
        free_at = self._worker_free_at.setdefault(id(executor), [0.0] * workers)
        start = max(self._now_seconds, heapq.heappop(free_at)) + self._executor_delay()
        finish = start + self._executor_delay()
        heapq.heappush(free_at, finish)
        self.call_at(start, self._run_executor_call, future, finish, func, args)
        return future

    def _executor_delay(self) -> float:
        return EXECUTOR_DELAY_SECONDS_MAX * self._random.random() ** 4 + 2 * TIMER_LATENESS_SECONDS_MAX

    def _run_executor_call(
        self, future: asyncio.Future[Any], finish: float, func: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        if future.cancelled():
            return
        process = RUNNING_PROCESS.get()
        result: Any = None
        failure: BaseException | None = None
        try:
            if process is not None:
                process.check_alive()
            result = func(*args)
        except (Exception, ProcessKilled) as error:
            failure = error
        self.call_at(finish, _deliver, future, result, failure)

    def _note_failure(self, context: dict[str, Any]) -> None:
        process = RUNNING_PROCESS.get()
        exception = context.get("exception")
        if isinstance(exception, ProcessKilled) or (process is not None and not process.is_alive):
            return
        self.failures.append(f"{context.get('message')}: {exception!r}")


def _deliver(future: asyncio.Future[Any], result: Any, failure: BaseException | None) -> None:
    if future.cancelled():
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(result)
