"""The audit log as a chain: the hash of an entry covers the one before it, so that none can be changed, left out or put
in between without every later hash being another.

What a chain cannot show by itself is that its end was cut off: whoever checks it remembers how far it went.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from protocol.control_errors import AuditChainBroken, AuditFormatUnknown
from protocol.operator_messages import AuditEntry
from protocol.vocabulary import VaultId

FORMAT: Final = 1
FIELDS: Final = {1: ("format", "number", "at_ns", "actor_kind", "actor", "actor_name", "action", "subject", "details")}
"""By format, what of an entry is hashed: what later formats add does not change what older entries say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainEnd:
    """How far a chain goes: the number and the hash (64 hexadecimal digits) of its last entry."""

    number: int
    hash: str

    @staticmethod
    def beginning(vault: VaultId) -> ChainEnd:
        """Before the first entry: no vault's chain goes on with another's."""
        return ChainEnd(number=0, hash=hashlib.sha256(f"farpoint audit {vault}".encode()).hexdigest())


def entry_hash(previous: ChainEnd, entry: AuditEntry) -> str:
    """SHA-256 over the previous hash, a line end, and the fields of the entry's format as JSON: keys sorted, no blanks,
    ASCII. Raises AuditFormatUnknown."""
    names = FIELDS.get(entry.format)
    if names is None:
        raise AuditFormatUnknown(number=entry.number, format=entry.format)
    fields = entry.model_dump(mode="json", include=set(names))
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(f"{previous.hash}\n{text}".encode()).hexdigest()


def follow_chain(previous: ChainEnd, entries: Iterable[AuditEntry]) -> ChainEnd:
    """The end of the chain when these entries follow. Raises AuditChainBroken at the first that does not fit,
    AuditFormatUnknown at one that this program cannot judge."""
    for entry in entries:
        if entry.number != previous.number + 1:
            raise AuditChainBroken(number=previous.number + 1, reason=f"entry {entry.number} stands in its place")
        if entry.hash != entry_hash(previous, entry):
            raise AuditChainBroken(number=entry.number, reason="its hash is not that of its contents and what precedes")
        previous = ChainEnd(number=entry.number, hash=entry.hash)
    return previous
