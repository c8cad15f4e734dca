"""Real files of this machine, for images that look like somebody's disk: the Python installation and /usr/share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

FILES_MAX: Final = 5_000
FILE_BYTES_MIN: Final = 8192
"""Thousands of tiny files only cost time."""
FILE_BYTES_MAX: Final = 64 * 2**20
BLOCK_BYTES: Final = 4096
ROOTS: Final = (Path(sys.base_prefix), Path("/usr/share"))
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.+-]+")
"""Names that need no quoting in a debugfs script."""


def real_files(budget_bytes: int) -> Iterator[tuple[Path, Path]]:
    """(file, place in the image) from all ROOTS, up to budget_bytes (whole blocks) and FILES_MAX, in a fixed order.

    What one root does not have, the next may give.
    """
    remaining_bytes, remaining_files = budget_bytes, FILES_MAX
    for place, root in enumerate(ROOTS):
        share_bytes, share_files = (
            remaining // (len(ROOTS) - place) for remaining in (remaining_bytes, remaining_files)
        )
        for path in _readable(root):
            size_bytes = -(-path.stat().st_size // BLOCK_BYTES) * BLOCK_BYTES
            if share_files and size_bytes <= share_bytes:
                share_bytes, share_files = share_bytes - size_bytes, share_files - 1
                remaining_bytes, remaining_files = remaining_bytes - size_bytes, remaining_files - 1
                yield path, Path(root.name, path.relative_to(root))


def _readable(root: Path) -> Iterator[Path]:
    """Regular files below root that we may read, with plain names all the way."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if _PLAIN_NAME.fullmatch(name))
        for name in sorted(names):
            path = Path(folder, name)
            is_plain = _PLAIN_NAME.fullmatch(name) and not path.is_symlink() and path.is_file()
            if is_plain and os.access(path, os.R_OK) and FILE_BYTES_MIN <= path.stat().st_size <= FILE_BYTES_MAX:
                yield path
