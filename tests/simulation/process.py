"""One simulated operating system process: everything it runs and holds vanishes at once when it is killed.

A killed process's tasks are still unwound by the loop (Python has no way to drop a coroutine without running its
`finally` blocks), so every port of a process asks `check_alive` first: whatever a dead process tries changes nothing
any more and raises `ProcessKilled`, which is a BaseException so that no handler of the product mistakes it for a
fault that it can mend.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar


class ProcessKilled(BaseException):
    """Raised by every port of a process that is no more."""


class SimulatedProcess:
    """`on_kill` is called once, at the instant of death, from whatever was running then."""

    def __init__(self, name: str, on_kill: Callable[[SimulatedProcess], None] = lambda process: None) -> None:
        self.name = name
        self.is_alive = True
        self._on_kill = on_kill
        self._operations_left: int | None = None

    def kill(self) -> None:
        if self.is_alive:
            self.is_alive = False
            self._on_kill(self)

    def kill_after_operations(self, count: int) -> None:
        """Arms a death in the middle of a blocking function: right before its `count`-th durable operation from now."""
        self._operations_left = count

    def check_alive(self) -> None:
        """Raises ProcessKilled if the process is dead."""
        if not self.is_alive:
            raise ProcessKilled(self.name)

    def count_operation(self) -> None:
        """A durable operation is about to happen. Raises ProcessKilled if the process is dead or dies here."""
        self.check_alive()
        if self._operations_left is not None:
            self._operations_left -= 1
            if self._operations_left <= 0:
                self._operations_left = None
                self.kill()
                raise ProcessKilled(self.name)


RUNNING_PROCESS: ContextVar[SimulatedProcess | None] = ContextVar("RUNNING_PROCESS", default=None)
"""The process that the running callback belongs to; tasks and callbacks inherit it from whoever started them."""
