"""Writes the audit log: every change that somebody asked for, by whom, in the transaction that makes it.

Heartbeats are no changes that somebody asked for. What this server decides by itself is there only where somebody has
to deal with it: a quarantine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from config_server.database.operators import (
    RequestMark,
    add_audit_entry,
    find_chain_end,
    find_request,
)
from protocol.audit_chain import FORMAT, ChainEnd, entry_hash
from protocol.control_errors import IdempotencyKeyReused, RequestRepeated
from protocol.operator_messages import AuditEntry
from protocol.vocabulary import VaultId

ADMINISTRATOR: Final = "administrator"
NEWCOMER: Final = "newcomer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who asked: what kind of caller, which one, and what it calls itself."""

    kind: str
    identifier: str
    name: str
    request: RequestMark | None = None
    """Of a request that must not be carried out twice."""


class AuditLog:
    """Of one vault."""

    def __init__(self, vault: VaultId) -> None:
        self._beginning = ChainEnd.beginning(vault)

    async def record(
        self,
        connection: AsyncConnection,
        actor: Actor,
        action: str,
        subject: str,
        *,
        now_ns: int,
        **details: str,
    ) -> None:
        """Within a writing transaction, which keeps others from going on with the same end. No secrets."""
        previous = await find_chain_end(connection) or self._beginning
        entry = AuditEntry(
            format=FORMAT,
            number=previous.number + 1,
            at_ns=now_ns,
            actor_kind=actor.kind,
            actor=actor.identifier,
            actor_name=actor.name,
            action=action,
            subject=subject,
            details=details,
            hash="",
        )
        hashed = entry.model_copy(update={"hash": entry_hash(previous, entry)})
        await add_audit_entry(connection, hashed, actor.request)

    async def check_new(self, connection: AsyncConnection, actor: Actor) -> None:
        """At the beginning of the writing transaction of whatever somebody may ask for twice. Raises RequestRepeated,
        IdempotencyKeyReused."""
        if actor.request is None:
            return
        found = await find_request(connection, actor.identifier, actor.request.key)
        if found is None:
            return
        if found.content_hash != actor.request.content_hash:
            raise IdempotencyKeyReused
        raise RequestRepeated(action=found.action, subject=found.subject)
