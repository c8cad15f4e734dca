"""Small files of the state directory: replaced whole, and read back only as they were written.

Invariant: what a latent error of the disk turned over is never taken for what was kept.
"""

from __future__ import annotations

from typing import Final

from blake3 import blake3

from process_server.errors import StateUnreadable
from runtime.directory import DurableDirectory

DIGEST_BYTES: Final = 16


def keep(state: DurableDirectory, name: str, contents: bytes) -> None:
    """Durable on return. Raises OSError."""
    state.replace(name, blake3(contents).digest(DIGEST_BYTES) + contents)


def kept(state: DurableDirectory, name: str) -> bytes | None:
    """What was kept last, None if nothing was. Raises OSError, StateUnreadable."""
    try:
        data = state.read(name)
    except FileNotFoundError:
        return None
    digest, contents = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if blake3(contents).digest(DIGEST_BYTES) != digest:
        raise StateUnreadable(name=name, reason="it is not as it was written")
    return contents
