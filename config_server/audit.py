"""Writes the audit log: every change that somebody asked for, by whom, in the transaction that makes it.

Heartbeats and what this server decides by itself are no changes that somebody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from config_server.database.operators import (
    CarriedOut,
    RequestMark,
    add_audit_entry,
    find_chain_end,
    find_request,
)
from protocol.audit_chain import ChainEnd, entry_hash
from protocol.control import NAME_LENGTH_MAX
from protocol.control_errors import RequestInvalid, RequestRepeated
from protocol.operator_messages import AuditEntry
from protocol.vocabulary import VaultId

ADMINISTRATOR: Final = "administrator"
NEWCOMER: Final = "newcomer"
_UNHASHED: Final = "0" * 64


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
        """Within a writing transaction, which keeps others from going on with the same end. No secrets.

        Raises RequestRepeated, RequestInvalid: what the actor asks for was carried out already.
        """
        if actor.request is not None:
            earlier = await self.find_earlier(connection, actor)
            if earlier is not None:
                raise RequestRepeated(action=earlier.action, subject=earlier.subject)
        previous = await find_chain_end(connection) or self._beginning
        entry = AuditEntry(
            number=previous.number + 1,
            at_ns=now_ns,
            actor_kind=actor.kind,
            actor=actor.identifier,
            actor_name=actor.name,
            action=action,
            subject=subject,
            details={name: value[:NAME_LENGTH_MAX] for name, value in details.items()},
            hash=_UNHASHED,
        )
        hashed = entry.model_copy(update={"hash": entry_hash(previous, entry)})
        await add_audit_entry(connection, hashed, actor.request)

    async def find_earlier(self, connection: AsyncConnection, actor: Actor) -> CarriedOut | None:
        """What the actor's request did when it was made before. Raises RequestInvalid if that was another request."""
        if actor.request is None:
            return None
        found = await find_request(connection, actor.identifier, actor.request.key)
        if found is not None and found.content_hash != actor.request.content_hash:
            raise RequestInvalid(reason="its Idempotency-Key was used for another request")
        return found
