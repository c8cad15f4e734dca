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

from protocol.control_errors import AuditChainBroken
from protocol.operator_messages import AuditEntry
from protocol.vocabulary import VaultId

FORMAT: Final = 1
"""Of what is hashed; a part of it."""


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
    """SHA-256 over the previous hash and the entry's fields as JSON: keys sorted, no blanks, ASCII. entry.hash does not
    count."""
    fields = entry.model_dump(mode="json", exclude={"hash"})
    text = json.dumps({"format": FORMAT, **fields}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(bytes.fromhex(previous.hash) + text.encode("ascii")).hexdigest()


def follow_chain(previous: ChainEnd, entries: Iterable[AuditEntry]) -> ChainEnd:
    """The end of the chain when these entries follow. Raises AuditChainBroken at the first that does not fit."""
    for entry in entries:
        if entry.number != previous.number + 1:
            raise AuditChainBroken(number=previous.number + 1, reason=f"entry {entry.number} stands in its place")
        if entry.hash != entry_hash(previous, entry):
            raise AuditChainBroken(number=entry.number, reason="its hash is not that of its contents and what precedes")
        previous = ChainEnd(number=entry.number, hash=entry.hash)
    return previous
