"""A shared access signature that lies in a file.

Invariant: whoever replaces the file needs to restart nothing: signatures end, and programs go on. What is no signature
(a file that is missing, or half written) leaves the one before in use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from azure.core.credentials import AzureSasCredential

from runtime.errors import SecretMissing, SecretUnreadable


class SignatureInFile(AzureSasCredential):
    """The SDK asks for `signature` at every request; the file is read again when it is another than before."""

    def __init__(self, path: Path, read_signature: Callable[[], str]) -> None:
        """Raises SecretMissing, SecretUnreadable, as read_signature does."""
        self._path = path
        self._read_signature = read_signature
        self._seen = _state(path)
        super().__init__(read_signature())

    @property
    def signature(self) -> str:
        found = _state(self._path)
        if found is not None and found != self._seen:
            self._seen = found
            try:
                self.update(self._read_signature())
            except (SecretMissing, SecretUnreadable):
                pass
        return super().signature


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever the file is written or replaced; None while there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
