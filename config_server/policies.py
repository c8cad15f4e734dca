"""Replication policies: made, edited and given to machines by operators. An edit reaches all its machines at once.

What no policy says holds for a machine without one: the server's settings.
"""

from __future__ import annotations

import secrets

from config_server.announcements import Announcements
from config_server.audit import Actor, AuditLog
from config_server.clock import ServerClock
from config_server.database.engine import Database
from config_server.database.members import find_machine
from config_server.database.policies import (
    StoredPolicy,
    assign_policy,
    delete_policy,
    find_policy,
    find_policy_named,
    list_machines_by_policy,
    list_policies,
    put_policy,
)
from protocol.control_errors import PolicyChanged, PolicyInUse, PolicyNameTaken, ResourceNotFound
from protocol.operator_messages import PolicyList, PolicyStatus, PolicyTerms, ReplicationPolicy
from protocol.vocabulary import MachineId


class PolicyOffice:
    """All methods: what they state is durable on return; machines whose orders changed are woken then."""

    def __init__(
        self, *, database: Database, clock: ServerClock, announcements: Announcements, audit: AuditLog
    ) -> None:
        self._database = database
        self._clock = clock
        self._announcements = announcements
        self._audit = audit

    async def create(self, wanted: ReplicationPolicy, actor: Actor) -> PolicyStatus:
        """Raises PolicyNameTaken."""
        content = _terms(wanted)
        now_ns = (await self._clock.tick()).tick_ns
        stored = StoredPolicy(policy=secrets.token_hex(16), version=1, content=content, changed_ns=now_ns)
        async with self._database.writing() as connection:
            await self._audit.check_new(connection, actor)
            if await find_policy_named(connection, content.name) is not None:
                raise PolicyNameTaken(name=content.name)
            await put_policy(connection, stored)
            await self._audit.record(connection, actor, "create policy", stored.policy, now_ns=now_ns, **_told(content))
        return _status(stored, [])

    async def edit(self, policy: str, wanted: ReplicationPolicy, actor: Actor, *, version: int | None) -> PolicyStatus:
        """version: the one that the editor saw; None: whatever it is. Raises ResourceNotFound, PolicyChanged,
        PolicyNameTaken."""
        content = _terms(wanted)
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.writing() as connection:
            await self._audit.check_new(connection, actor)
            before = await find_policy(connection, policy)
            if before is None:
                raise ResourceNotFound(what="replication policy", identifier=policy)
            if version is not None and version != before.version:
                raise PolicyChanged(policy=before.content.name, version=before.version)
            namesake = await find_policy_named(connection, content.name)
            if namesake is not None and namesake.policy != policy:
                raise PolicyNameTaken(name=content.name)
            machines = (await list_machines_by_policy(connection)).get(policy, [])
            if content == before.content:
                return _status(before, machines)
            stored = StoredPolicy(policy=policy, version=before.version + 1, content=content, changed_ns=now_ns)
            await put_policy(connection, stored)
            await self._audit.record(connection, actor, "edit policy", policy, now_ns=now_ns, **_told(content))
        self._announcements.announce(machines)
        return _status(stored, machines)

    async def delete(self, policy: str, actor: Actor, *, version: int | None) -> None:
        """version: as for edit(). Raises ResourceNotFound, PolicyChanged, PolicyInUse."""
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.writing() as connection:
            await self._audit.check_new(connection, actor)
            stored = await find_policy(connection, policy)
            if stored is None:
                raise ResourceNotFound(what="replication policy", identifier=policy)
            if version is not None and version != stored.version:
                raise PolicyChanged(policy=stored.content.name, version=stored.version)
            machines = (await list_machines_by_policy(connection)).get(policy, [])
            if machines:
                raise PolicyInUse(policy=stored.content.name, machines=len(machines))
            await delete_policy(connection, policy)
            await self._audit.record(
                connection, actor, "delete policy", policy, now_ns=now_ns, name=stored.content.name
            )

    async def assign(self, machine: MachineId, policy: str | None, actor: Actor) -> None:
        """policy None: the server's settings. Raises ResourceNotFound."""
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.writing() as connection:
            await self._audit.check_new(connection, actor)
            stored = await find_machine(connection, machine)
            if stored is None:
                raise ResourceNotFound(what="machine", identifier=machine)
            if policy is not None and await find_policy(connection, policy) is None:
                raise ResourceNotFound(what="replication policy", identifier=policy)
            if stored.policy == policy:
                return
            await assign_policy(connection, machine, policy)
            await self._audit.record(
                connection, actor, "set policy of machine", machine, now_ns=now_ns, policy=policy or ""
            )
        self._announcements.announce([machine])

    async def policies(self) -> PolicyList:
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.reading() as connection:
            machines = await list_machines_by_policy(connection)
            stored = await list_policies(connection)
        return PolicyList(now_ns=now_ns, policies=tuple(_status(one, machines.get(one.policy, [])) for one in stored))

    async def policy(self, policy: str) -> PolicyStatus:
        """Raises ResourceNotFound."""
        async with self._database.reading() as connection:
            stored = await find_policy(connection, policy)
            if stored is None:
                raise ResourceNotFound(what="replication policy", identifier=policy)
            machines = (await list_machines_by_policy(connection)).get(policy, [])
        return _status(stored, machines)


def _terms(wanted: ReplicationPolicy) -> PolicyTerms:
    return PolicyTerms(**wanted.model_dump())


def _told(content: PolicyTerms) -> dict[str, str]:
    return {name: str(value) for name, value in content.model_dump().items()}


def _status(stored: StoredPolicy, machines: list[MachineId]) -> PolicyStatus:
    return PolicyStatus(
        policy=stored.policy,
        version=stored.version,
        content=stored.content,
        machines=tuple(machines),
        changed_at_ns=stored.changed_ns,
    )
