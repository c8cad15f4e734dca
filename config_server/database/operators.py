"""Operator tokens, as hashes of their secrets, and the entries of the audit log."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from config_server.database.schema import audit_entries, operator_tokens
from protocol.audit_chain import ChainEnd
from protocol.operator_messages import AuditEntry, OperatorRole


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredOperatorToken:
    token: str
    name: str
    role: OperatorRole
    secret_hash: str = field(repr=False)
    created_ns: int
    expires_ns: int
    used_ns: int | None
    is_revoked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMark:
    """A request that its sender may repeat: the Idempotency-Key that it chose, and SHA-256 over what it asks for."""

    key: str
    content_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedOut:
    """What an earlier request with the same key did, and SHA-256 over what it asked for."""

    subject: str
    action: str
    content_hash: str


async def add_operator_token(connection: AsyncConnection, stored: StoredOperatorToken) -> None:
    await connection.execute(
        insert(operator_tokens).values(
            token=stored.token,
            name=stored.name,
            role=stored.role.value,
            secret_hash=stored.secret_hash,
            created_ns=stored.created_ns,
            expires_ns=stored.expires_ns,
            used_ns=stored.used_ns,
            is_revoked=stored.is_revoked,
        )
    )


async def find_operator_token(connection: AsyncConnection, token: str) -> StoredOperatorToken | None:
    row = (await connection.execute(select(operator_tokens).where(operator_tokens.c.token == token))).one_or_none()
    return None if row is None else _token(row)


async def list_operator_tokens(connection: AsyncConnection) -> list[StoredOperatorToken]:
    """All that there ever were, newest first: the audit log names them."""
    query = select(operator_tokens).order_by(operator_tokens.c.created_ns.desc(), operator_tokens.c.token)
    return [_token(row) for row in await connection.execute(query)]


async def mark_operator_token_used(connection: AsyncConnection, token: str, *, now_ns: int) -> None:
    await connection.execute(update(operator_tokens).where(operator_tokens.c.token == token).values(used_ns=now_ns))


async def revoke_operator_token(connection: AsyncConnection, token: str) -> None:
    await connection.execute(update(operator_tokens).where(operator_tokens.c.token == token).values(is_revoked=True))


async def add_audit_entry(connection: AsyncConnection, entry: AuditEntry, request: RequestMark | None) -> None:
    values = entry.model_dump() | {"details": json.dumps(entry.details, sort_keys=True)}
    if request is not None:
        values |= {"request_key": request.key, "request_hash": request.content_hash}
    await connection.execute(insert(audit_entries).values(**values))


async def find_request(connection: AsyncConnection, actor: str, key: str) -> CarriedOut | None:
    """What this actor's request with this key did."""
    query = select(audit_entries.c.subject, audit_entries.c.action, audit_entries.c.request_hash).where(
        audit_entries.c.actor == actor, audit_entries.c.request_key == key
    )
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else CarriedOut(subject=row.subject, action=row.action, content_hash=row.request_hash)


async def find_chain_end(connection: AsyncConnection) -> ChainEnd | None:
    """None before the first entry."""
    query = select(audit_entries.c.number, audit_entries.c.hash).order_by(audit_entries.c.number.desc()).limit(1)
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else ChainEnd(number=row.number, hash=row.hash)


async def list_audit_entries(connection: AsyncConnection, *, after: int, limit: int) -> list[AuditEntry]:
    query = select(audit_entries).where(audit_entries.c.number > after).order_by(audit_entries.c.number).limit(limit)
    rows = await connection.execute(query)
    return [AuditEntry.model_validate(dict(row._mapping) | {"details": _details(row.details)}) for row in rows]


def _details(stored: str) -> dict[str, str]:
    """As they were written; whatever somebody else has put there is told as it is, and the chain tells on it."""
    try:
        details = json.loads(stored)
    except ValueError:
        return {"unreadable": stored}
    if not isinstance(details, dict):
        return {"unreadable": stored}
    return {name: str(value) for name, value in details.items()}


def _token(row: Row[Any]) -> StoredOperatorToken:
    return StoredOperatorToken(**(dict(row._mapping) | {"role": OperatorRole(row.role)}))
