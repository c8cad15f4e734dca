"""Replication policies, and which machines go by them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from config_server.database.schema import machines, policies
from protocol.operator_messages import PolicyTerms
from protocol.vocabulary import MachineId


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPolicy:
    policy: str
    version: int
    content: PolicyTerms
    changed_ns: int


async def put_policy(connection: AsyncConnection, stored: StoredPolicy) -> None:
    """Adds it, or replaces the one of this identifier."""
    values = {
        "name": stored.content.name,
        "version": stored.version,
        "content": stored.content.model_dump_json(),
        "changed_ns": stored.changed_ns,
    }
    if await find_policy(connection, stored.policy) is None:
        await connection.execute(insert(policies).values(policy=stored.policy, **values))
    else:
        await connection.execute(update(policies).where(policies.c.policy == stored.policy).values(**values))


async def find_policy(connection: AsyncConnection, policy: str) -> StoredPolicy | None:
    row = (await connection.execute(select(policies).where(policies.c.policy == policy))).one_or_none()
    return None if row is None else _policy(row)


async def find_policy_named(connection: AsyncConnection, name: str) -> StoredPolicy | None:
    row = (await connection.execute(select(policies).where(policies.c.name == name))).one_or_none()
    return None if row is None else _policy(row)


async def list_policies(connection: AsyncConnection) -> list[StoredPolicy]:
    """By name."""
    return [_policy(row) for row in await connection.execute(select(policies).order_by(policies.c.name))]


async def delete_policy(connection: AsyncConnection, policy: str) -> None:
    """One that no machine goes by."""
    await connection.execute(delete(policies).where(policies.c.policy == policy))


async def assign_policy(connection: AsyncConnection, machine: MachineId, policy: str | None) -> None:
    await connection.execute(update(machines).where(machines.c.machine == machine).values(policy=policy))


async def list_machines_by_policy(connection: AsyncConnection) -> dict[str, list[MachineId]]:
    """Of each policy that has any, in the order of their names."""
    query = (
        select(machines.c.policy, machines.c.machine)
        .where(machines.c.policy.is_not(None))
        .order_by(machines.c.name, machines.c.machine)
    )
    found: dict[str, list[MachineId]] = defaultdict(list)
    for row in await connection.execute(query):
        found[row.policy].append(row.machine)
    return found


def _policy(row: Row[Any]) -> StoredPolicy:
    return StoredPolicy(
        policy=row.policy,
        version=row.version,
        content=PolicyTerms.model_validate_json(row.content),
        changed_ns=row.changed_ns,
    )
