"""The grants that this process server holds, verified, and kept in its state directory for restarts without the server.

Invariants: only what the vault's authority signed for this process server's key is held; what is held in memory is also
on disk; orders replace what was held before, so that a disk moved elsewhere is no longer granted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, cast

import msgpack  # type: ignore[import-untyped]
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from process_server.errors import StateUnreadable
from process_server.state_file import keep, kept
from protocol.errors import ReplicationError
from protocol.signed_records import Grant, verify_grant
from protocol.vocabulary import DiskId, PeerIdentity
from runtime.directory import DurableDirectory

GRANTS_FILE: Final = "grants"

_log = structlog.get_logger("process_server.grants")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldGrant:
    """A grant, and the bytes that were signed."""

    grant: Grant
    signed: bytes


class GrantBook:
    """Every grant by disk. `load` and `save` block and belong in an executor."""

    def __init__(self, *, identity: PeerIdentity, public_key: bytes, authority: Ed25519PublicKey) -> None:
        self._identity = identity
        self._public_key = public_key
        self._authority = authority
        self._by_disk: dict[DiskId, dict[int, HeldGrant]] = {}

    def held(self, disk: DiskId) -> dict[int, HeldGrant]:
        """By epoch; empty if none is held."""
        return self._by_disk.get(disk, {})

    def disks(self) -> list[DiskId]:
        return sorted(self._by_disk)

    def take(self, signed_grants: Iterable[bytes]) -> None:
        """Replaces what is held. A grant that does not verify, or is for another, is logged and left out."""
        by_disk: dict[DiskId, dict[int, HeldGrant]] = {}
        for signed in signed_grants:
            try:
                grant = verify_grant(signed, self._authority)
            except ReplicationError as error:
                _log.warning("grant refused", code=error.code, reason=str(error))
                continue
            if not self._is_ours(grant):
                _log.warning("grant is for another process server or vault", disk=grant.disk, epoch=grant.epoch)
                continue
            by_disk.setdefault(grant.disk, {})[grant.epoch] = HeldGrant(grant=grant, signed=signed)
        self._by_disk = by_disk

    def signed(self) -> list[bytes]:
        """All that is held, in the order of disks and epochs."""
        return [grants[epoch].signed for _, grants in sorted(self._by_disk.items()) for epoch in sorted(grants)]

    def _is_ours(self, grant: Grant) -> bool:
        return (
            grant.vault == self._identity.vault
            and grant.process_server == self._identity.identifier
            and grant.process_server_key == self._public_key
        )


def save_grants(state: DurableDirectory, signed_grants: Sequence[bytes]) -> None:
    """Durable on return. Raises OSError."""
    keep(state, GRANTS_FILE, cast(bytes, msgpack.packb(list(signed_grants))))


def load_grants(state: DurableDirectory) -> list[bytes]:
    """What was saved, unverified; empty if nothing was. Raises OSError, StateUnreadable."""
    data = kept(state, GRANTS_FILE)
    if data is None:
        return []
    try:
        fields = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise StateUnreadable(name=GRANTS_FILE, reason=str(error)) from error
    if not isinstance(fields, list) or not all(isinstance(signed, bytes) for signed in fields):
        raise StateUnreadable(name=GRANTS_FILE, reason="not a list of grants")
    return fields
