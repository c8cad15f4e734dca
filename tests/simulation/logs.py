"""The programs' structured logs during a run: dropped, or printed with the trace; a logged defect is a violation.

A program that catches what it did not expect logs it with its traceback and goes on. That is right in production and
must not hide a defect here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

from protocol.errors import ReplicationError
from tests.simulation.process import RUNNING_PROCESS, ProcessKilled

Defect = Callable[[str, BaseException], None]


def capture_logs(*, on_line: Callable[[str], None] | None, on_defect: Defect) -> None:
    """Until the next call: `on_line` gets every log line, `on_defect` every unexpected exception of a living
    process."""

    def process(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        error = _error_of(event.pop("exc_info", None))
        running = RUNNING_PROCESS.get()
        if error is not None and (running is None or running.is_alive):
            unexpected = [leaf for leaf in leaves_of(error) if not isinstance(leaf, ReplicationError | OSError)]
            for leaf in unexpected:
                on_defect(str(event.get("event")), leaf)
        if on_line is not None:
            name = running.name if running is not None else "-"
            fields = " ".join(f"{key}={value}" for key, value in event.items() if key != "event")
            on_line(f"log {name} {method}: {event.get('event')} {fields} {error!r}")
        raise structlog.DropEvent

    structlog.configure(processors=[process], cache_logger_on_first_use=False)


def leaves_of(error: BaseException) -> list[BaseException]:
    """The exceptions inside groups of groups."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves_of(inner)]
    return [] if isinstance(error, ProcessKilled) else [error]


def _error_of(information: Any) -> BaseException | None:
    if isinstance(information, BaseException):
        return information
    if isinstance(information, tuple):
        return information[1]
    return sys.exc_info()[1] if information else None
