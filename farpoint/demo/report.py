"""What a demo ends with: its figures as one JSON line or as a table, and the verdict."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from farpoint.demo.measures import Counts
from farpoint.demo.source_image import Changes

TABLE_WIDTH: Final = 140


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of replication: from its cause to the recovery point that covers it."""

    name: str
    seconds: float
    counts: Counts
    useful_bytes: int
    """What there was to copy: allocated bytes of the image, or bytes written by the changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredPoint:
    """One point, recovered from store and key file and compared with the source at that moment."""

    point: str
    instant: str
    seconds: float
    bytes_read: int
    source_digest: str
    recovered_digest: str
    is_identical: bool
    is_file_system_sound: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    disk: str
    image_kind: str
    size_bytes: int
    allocated_bytes: int
    changes: Changes
    phases: tuple[Phase, ...]
    recovered: tuple[RecoveredPoint, ...]
    rpo_seconds: float | None
    """The age of the newest recovery point, as the configuration server stated it when the second point was there."""
    stored_bytes: int
    seconds: float
    store: str
    store_credentials: Path | None
    """What the store needs to be read; None if nothing."""
    store_start_command: str | None
    """By which the store can be read again after the demo; None if nothing has to be started."""
    recovery_key: Path

    @property
    def is_identical(self) -> bool:
        """The one verdict: both images byte for byte the same, and no file system found broken."""
        return bool(self.recovered) and all(
            point.is_identical and point.is_file_system_sound is not False for point in self.recovered
        )

    def record(self) -> dict[str, object]:
        """The JSON's last line."""
        return {
            "identical": self.is_identical,
            "disk": self.disk,
            "points": [point.point for point in self.recovered],
            "store": self.store,
            "store_credentials_file": None if self.store_credentials is None else str(self.store_credentials),
            "store_start_command": self.store_start_command,
            "recovery_key": str(self.recovery_key),
            "image": self.image_kind,
            "size_bytes": self.size_bytes,
            "allocated_bytes": self.allocated_bytes,
            "changes": self.changes,
            "phases": {
                phase.name.replace(" ", "_"): {
                    "seconds": round(phase.seconds, 2),
                    "bytes_read": phase.counts.read_bytes,
                    "bytes_sent": phase.counts.sent_bytes,
                    "bytes_stored": phase.counts.stored_bytes,
                    "cpu_seconds": round(phase.counts.cpu_seconds, 2),
                    "ratio_stored_to_sent": _ratio(phase.counts.stored_bytes, phase.counts.sent_bytes),
                    "ratio_sent_to_useful": _ratio(phase.counts.sent_bytes, phase.useful_bytes),
                }
                for phase in self.phases
            },
            "recovered": [
                {
                    "point": point.point,
                    "instant": point.instant,
                    "seconds": point.seconds,
                    "bytes_read": point.bytes_read,
                    "blake3_source": point.source_digest,
                    "blake3_recovered": point.recovered_digest,
                    "identical": point.is_identical,
                    "file_system_sound": point.is_file_system_sound,
                }
                for point in self.recovered
            ],
            "stored_bytes": self.stored_bytes,
            "rpo_seconds": self.rpo_seconds,
            "seconds": round(self.seconds, 1),
        }


def print_table(result: DemoResult) -> None:
    """The figures and the verdict, on stdout."""
    # why: without a terminal rich assumes 80 columns and folds the figures
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else TABLE_WIDTH)
    console.print(_replication(result))
    console.print(_recovery(result))
    rpo = "unknown" if result.rpo_seconds is None else f"{result.rpo_seconds:.1f} s"
    console.print(
        f"disk {result.disk}: {result.image_kind} image of {_mebibytes(result.size_bytes)}, "
        f"{_mebibytes(result.allocated_bytes)} allocated; store {_mebibytes(result.stored_bytes)}; RPO {rpo}; "
        f"{result.seconds:.1f} s in all"
    )
    verdict = "[bold green]IDENTICAL[/]" if result.is_identical else "[bold red]DIFFERENT[/]"
    console.print(verdict)


def _replication(result: DemoResult) -> Table:
    table = Table(title="replication", title_justify="left")
    for heading in ("phase", "read", "sent", "stored", "stored/sent", "CPU s", "s"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for phase in result.phases:
        ratio = _ratio(phase.counts.stored_bytes, phase.counts.sent_bytes)
        table.add_row(
            phase.name,
            _mebibytes(phase.counts.read_bytes),
            _mebibytes(phase.counts.sent_bytes),
            _mebibytes(phase.counts.stored_bytes),
            "–" if ratio is None else f"{ratio:.2f}",
            f"{phase.counts.cpu_seconds:.2f}",
            f"{phase.seconds:.1f}",
        )
    return table


def _recovery(result: DemoResult) -> Table:
    table = Table(title="recovery from store and key file alone", title_justify="left")
    for heading in ("point", "instant", "read", "s", "blake3 of the source", "of the recovered", "e2fsck", ""):
        table.add_column(heading, overflow="fold")
    for point in result.recovered:
        table.add_row(
            point.point[:8],
            point.instant,
            _mebibytes(point.bytes_read),
            f"{point.seconds:.1f}",
            point.source_digest[:16],
            point.recovered_digest[:16],
            {True: "sound", False: "BROKEN", None: "–"}[point.is_file_system_sound],
            "[green]IDENTICAL[/]" if point.is_identical else "[red]DIFFERENT[/]",
        )
    return table


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 3) if whole else None
