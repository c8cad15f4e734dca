"""Defects that a run must find, planted into the real programs by `planted/sitecustomize.py`; never in product code."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from runtime import local_directory

VARIABLE: Final = "TORTURE_FAULT"
ROOT: Final = Path(__file__).parents[2]


def _no_synchronize() -> None:
    """Files are never synchronized: what the cache and the ledger acknowledge is only in memory."""

    def synchronize(self: local_directory.LocalFile) -> None:
        return

    local_directory.LocalFile.synchronize = synchronize  # type: ignore[method-assign]


def _replace_in_place() -> None:
    """A file is overwritten where it lies: a kill in between leaves half of it, or nothing."""

    def replace(self: local_directory.LocalDirectory, name: str, data: bytes) -> None:
        with open(self.path / name, "wb", buffering=0) as file:
            os.pwritev(file.fileno(), [data[: len(data) // 2]], 0)
            os.pwritev(file.fileno(), [data[len(data) // 2 :]], len(data) // 2)
            os.fsync(file.fileno())

    local_directory.LocalDirectory.replace = replace  # type: ignore[method-assign]


def _write_errors_ignored() -> None:
    """A write that failed counts as done."""
    write_fully: Callable[..., None] = local_directory.write_fully

    def write(descriptor: int, offset_bytes: int, buffers: Sequence[Any]) -> None:
        try:
            write_fully(descriptor, offset_bytes, buffers)
        except OSError:
            return

    local_directory.write_fully = write


PLANTED_FAULTS: Final[dict[str, Callable[[], None]]] = {
    "no-synchronize": _no_synchronize,
    "replace-in-place": _replace_in_place,
    "write-errors-ignored": _write_errors_ignored,
}


def plant_from_environment() -> None:
    """In a program's process, before it imports anything of its own."""
    if name := os.environ.get(VARIABLE):
        PLANTED_FAULTS[name]()


def environment(name: str) -> dict[str, str]:
    """For the processes that are to have the defect."""
    return {VARIABLE: name, "PYTHONPATH": f"{Path(__file__).parent / 'planted'}{os.pathsep}{ROOT}"}
