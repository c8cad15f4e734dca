"""Shows how far something has come: bars on a terminal's stderr, or one JSON object a line on stdout."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from runtime.output import print_json

LINE_SECONDS_MIN: Final = 0.5
"""JSON lines come no closer than this, but for the last of each step."""


class ProgressView(Protocol):
    """A context; each step has a name and a total in bytes."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, step: str, done_bytes: int, total_bytes: int) -> None:
        """May be called as often as one likes."""
        ...


class Bars:
    """One bar per step on stderr; nothing at all where stderr is no terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._steps: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, step: str, done_bytes: int, total_bytes: int) -> None:
        if step not in self._steps:
            self._steps[step] = self._progress.add_task(step, total=total_bytes)
        self._progress.update(self._steps[step], completed=done_bytes, total=total_bytes)


class JsonLines:
    """`{"step": …, "done_bytes": …, "total_bytes": …}`, a line at a time."""

    def __init__(self) -> None:
        self._shown_at: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def show(self, step: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if done_bytes < total_bytes and now - self._shown_at.get(step, 0.0) < LINE_SECONDS_MIN:
            return
        self._shown_at[step] = now
        print_json({"step": step, "done_bytes": done_bytes, "total_bytes": total_bytes}, indent=None)
        sys.stdout.flush()


def progress_view(*, json_lines: bool) -> ProgressView:
    return JsonLines() if json_lines else Bars()
