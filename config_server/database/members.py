"""Machines, process servers, join tokens and certificates: who takes part, and by what right."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Row, Select, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from config_server.core.clones import BootHistory
from config_server.core.join_tokens import StoredJoinToken
from config_server.database.schema import certificates, disks, join_tokens, machines, process_servers
from protocol.control import (
    AgentReport,
    FaultReport,
    HostDescription,
    ProcessServerAddress,
    ProcessServerReport,
    RevocationList,
)
from protocol.vocabulary import MachineId, ProcessServerId, Role

_FAULTS = TypeAdapter(tuple[FaultReport, ...])


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMachine:
    machine: MachineId
    name: str
    process_server: ProcessServerId | None
    host: HostDescription | None
    agent_version: str
    boot_id: str
    heard_ns: int | None
    description_version: int
    description: bytes | None = field(repr=False)
    """The signed record of description_version, None before the first."""
    policy: str | None
    """Of the replication policy; None: the server's settings."""
    boots: BootHistory
    is_quarantined: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredProcessServer:
    process_server: ProcessServerId
    name: str
    signing_public_key: bytes
    host: str
    port: int | None
    version: str
    cache_bytes: int
    cache_limit_bytes: int
    faults: tuple[FaultReport, ...]
    heard_ns: int | None
    protected_disks: int

    @property
    def address(self) -> ProcessServerAddress | None:
        """None until its first report."""
        if self.port is None:
            return None
        return ProcessServerAddress(process_server=self.process_server, host=self.host, port=self.port)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCertificate:
    serial: str
    role: Role
    identifier: str
    name: str
    valid_from_ns: int
    valid_until_ns: int
    revocation_number: int | None

    @property
    def is_revoked(self) -> bool:
        return self.revocation_number is not None


async def add_machine(connection: AsyncConnection, machine: MachineId, *, name: str, now_ns: int) -> None:
    await connection.execute(
        insert(machines).values(
            machine=machine, name=name, enrolled_ns=now_ns, agent_version="", boot_id="", description_version=0
        )
    )


async def find_machine(connection: AsyncConnection, machine: MachineId) -> StoredMachine | None:
    row = (await connection.execute(select(machines).where(machines.c.machine == machine))).one_or_none()
    return None if row is None else _machine(row)


async def list_machines(
    connection: AsyncConnection, *, process_server: ProcessServerId | None = None
) -> list[StoredMachine]:
    """All, or those of one process server; by name."""
    query = select(machines).order_by(machines.c.name, machines.c.machine)
    if process_server is not None:
        query = query.where(machines.c.process_server == process_server)
    return [_machine(row) for row in await connection.execute(query)]


async def find_machines(
    connection: AsyncConnection, machine_ids: Collection[MachineId]
) -> dict[MachineId, StoredMachine]:
    """Those that exist."""
    query = select(machines).where(machines.c.machine.in_(machine_ids))
    return {stored.machine: stored for stored in map(_machine, await connection.execute(query))}


async def page_machines(connection: AsyncConnection, *, after: str, limit: int) -> list[StoredMachine]:
    """By identifier, behind `after`."""
    query = select(machines).where(machines.c.machine > after).order_by(machines.c.machine).limit(limit)
    return [_machine(row) for row in await connection.execute(query)]


async def list_unassigned_machines(connection: AsyncConnection) -> list[StoredMachine]:
    """Machines with a protected disk and no process server."""
    query = (
        select(machines)
        .where(machines.c.process_server.is_(None))
        .where(select(disks.c.disk).where(disks.c.machine == machines.c.machine, disks.c.is_protected).exists())
        .order_by(machines.c.enrolled_ns, machines.c.machine)
    )
    return [_machine(row) for row in await connection.execute(query)]


async def record_agent_report(
    connection: AsyncConnection, machine: MachineId, report: AgentReport, boots: BootHistory, *, now_ns: int
) -> None:
    """The machine's part of it. boots: with the report's."""
    await connection.execute(
        update(machines)
        .where(machines.c.machine == machine)
        .values(
            name=report.host.name,
            host=report.host.model_dump_json(),
            agent_version=report.agent_version,
            boot_id=boots.boot_id,
            ended_boot_ids=json.dumps(boots.ended),
            heard_ns=now_ns,
        )
    )


async def assign_process_server(
    connection: AsyncConnection, machine: MachineId, process_server: ProcessServerId
) -> None:
    await connection.execute(
        update(machines).where(machines.c.machine == machine).values(process_server=process_server)
    )


async def record_description(connection: AsyncConnection, machine: MachineId, version: int, record: bytes) -> None:
    await connection.execute(
        update(machines).where(machines.c.machine == machine).values(description_version=version, description=record)
    )


async def add_process_server(
    connection: AsyncConnection,
    process_server: ProcessServerId,
    *,
    name: str,
    signing_public_key: bytes,
    now_ns: int,
) -> None:
    await connection.execute(
        insert(process_servers).values(
            process_server=process_server,
            name=name,
            signing_public_key=signing_public_key,
            enrolled_ns=now_ns,
            host="",
            version="",
            cache_bytes=0,
            cache_limit_bytes=0,
            faults="[]",
        )
    )


async def list_process_servers(connection: AsyncConnection) -> list[StoredProcessServer]:
    """By name, each with the number of protected disks that it serves."""
    return [_process_server(row) for row in await connection.execute(_select_process_servers())]


async def find_process_server(
    connection: AsyncConnection, process_server: ProcessServerId
) -> StoredProcessServer | None:
    query = _select_process_servers().where(process_servers.c.process_server == process_server)
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else _process_server(row)


async def address_of(
    connection: AsyncConnection, process_server: ProcessServerId | None
) -> ProcessServerAddress | None:
    """None if there is none, or it has not said yet where it listens."""
    stored = None if process_server is None else await find_process_server(connection, process_server)
    return None if stored is None else stored.address


async def record_process_server_report(
    connection: AsyncConnection, process_server: ProcessServerId, report: ProcessServerReport, *, now_ns: int
) -> None:
    """The process server's own part of it."""
    await connection.execute(
        update(process_servers)
        .where(process_servers.c.process_server == process_server)
        .values(
            host=report.host,
            port=report.port,
            version=report.version,
            cache_bytes=report.cache_bytes,
            cache_limit_bytes=report.cache_limit_bytes,
            faults=_FAULTS.dump_json(report.faults).decode(),
            heard_ns=now_ns,
        )
    )


async def add_join_token(connection: AsyncConnection, token: StoredJoinToken) -> None:
    await connection.execute(
        insert(join_tokens).values(
            token=token.token, role=token.role.value, proof_key=token.proof_key, expires_ns=token.expires_ns
        )
    )


async def find_join_token(connection: AsyncConnection, token: str) -> tuple[StoredJoinToken, str | None] | None:
    """The token, and the reply that was given to who used it."""
    row = (await connection.execute(select(join_tokens).where(join_tokens.c.token == token))).one_or_none()
    if row is None:
        return None
    stored = StoredJoinToken(
        token=row.token,
        role=Role(row.role),
        proof_key=row.proof_key,
        expires_ns=row.expires_ns,
        used_by=row.used_by,
    )
    return stored, row.reply


async def use_join_token(connection: AsyncConnection, token: str, *, used_by: bytes, reply: str) -> None:
    await connection.execute(
        update(join_tokens).where(join_tokens.c.token == token).values(used_by=used_by, reply=reply)
    )


async def forget_join_tokens(connection: AsyncConnection, *, expired_before_ns: int) -> None:
    await connection.execute(delete(join_tokens).where(join_tokens.c.expires_ns < expired_before_ns))


async def add_certificate(connection: AsyncConnection, certificate: StoredCertificate) -> None:
    await connection.execute(
        insert(certificates).values(
            serial=certificate.serial,
            role=certificate.role.value,
            identifier=certificate.identifier,
            name=certificate.name,
            valid_from_ns=certificate.valid_from_ns,
            valid_until_ns=certificate.valid_until_ns,
        )
    )


async def find_certificate(connection: AsyncConnection, serial: str) -> StoredCertificate | None:
    row = (await connection.execute(select(certificates).where(certificates.c.serial == serial))).one_or_none()
    return None if row is None else _certificate(row)


async def page_certificates(
    connection: AsyncConnection, *, valid_at_ns: int, after: str, limit: int
) -> list[StoredCertificate]:
    """Those that have not expired, by serial, behind `after`."""
    query = (
        select(certificates)
        .where(certificates.c.valid_until_ns > valid_at_ns, certificates.c.serial > after)
        .order_by(certificates.c.serial)
        .limit(limit)
    )
    return [_certificate(row) for row in await connection.execute(query)]


async def revoke_certificates(connection: AsyncConnection, *, role: Role, identifier: str) -> None:
    """All of one holder, under the next number of the list. Those revoked before keep theirs."""
    number = await _newest_list_number(connection) + 1
    await connection.execute(
        update(certificates)
        .where(certificates.c.role == role.value, certificates.c.identifier == identifier)
        .where(certificates.c.revocation_number.is_(None))
        .values(revocation_number=number)
    )


async def quarantine_machine(connection: AsyncConnection, machine: MachineId) -> None:
    """Its certificates are on the list, under the next number, until it is released."""
    number = await _newest_list_number(connection) + 1
    await connection.execute(update(machines).where(machines.c.machine == machine).values(quarantine_number=number))


async def release_machine(connection: AsyncConnection, machine: MachineId) -> None:
    """Its certificates leave the list, under the next number; whoever reports first is taken for the machine."""
    number = await _newest_list_number(connection) + 1
    await connection.execute(
        update(machines)
        .where(machines.c.machine == machine)
        .values(release_number=number, boot_id="", ended_boot_ids="[]")
    )


async def read_revocation_list(connection: AsyncConnection, *, valid_at_ns: int) -> RevocationList:
    """Numbered by the newest revocation, quarantine or release; certificates that have expired anyway are left out."""
    number = await _newest_list_number(connection)
    quarantined = select(machines.c.machine).where(
        machines.c.quarantine_number > func.coalesce(machines.c.release_number, 0)
    )
    is_barred = certificates.c.revocation_number.is_not(None) | (
        (certificates.c.role == Role.AGENT.value) & certificates.c.identifier.in_(quarantined)
    )
    query = (
        select(certificates.c.serial)
        .where(is_barred, certificates.c.valid_until_ns > valid_at_ns)
        .order_by(certificates.c.serial)
    )
    return RevocationList(number=number, serials=tuple((await connection.execute(query)).scalars()))


async def _newest_list_number(connection: AsyncConnection) -> int:
    query = select(
        select(func.max(certificates.c.revocation_number)).scalar_subquery(),
        select(func.max(machines.c.quarantine_number)).scalar_subquery(),
        select(func.max(machines.c.release_number)).scalar_subquery(),
    )
    return max(number or 0 for number in (await connection.execute(query)).one())


def _select_process_servers() -> Select[*tuple[Any, ...]]:
    protected = (
        select(func.count())
        .select_from(disks.join(machines))
        .where(machines.c.process_server == process_servers.c.process_server, disks.c.is_protected)
        .scalar_subquery()
        .label("protected_disks")
    )
    return select(process_servers, protected).order_by(process_servers.c.name, process_servers.c.process_server)


def _machine(row: Row[tuple[object, ...]]) -> StoredMachine:
    return StoredMachine(
        machine=row.machine,
        name=row.name,
        process_server=row.process_server,
        host=None if row.host is None else HostDescription.model_validate_json(row.host),
        agent_version=row.agent_version,
        boot_id=row.boot_id,
        heard_ns=row.heard_ns,
        description_version=row.description_version,
        description=row.description,
        policy=row.policy,
        boots=BootHistory(boot_id=row.boot_id, ended=tuple(json.loads(row.ended_boot_ids))),
        is_quarantined=(row.quarantine_number or 0) > (row.release_number or 0),
    )


def _process_server(row: Row[tuple[object, ...]]) -> StoredProcessServer:
    return StoredProcessServer(
        process_server=row.process_server,
        name=row.name,
        signing_public_key=row.signing_public_key,
        host=row.host,
        port=row.port,
        version=row.version,
        cache_bytes=row.cache_bytes,
        cache_limit_bytes=row.cache_limit_bytes,
        faults=_FAULTS.validate_json(row.faults),
        heard_ns=row.heard_ns,
        protected_disks=row.protected_disks,
    )


def _certificate(row: Row[tuple[object, ...]]) -> StoredCertificate:
    return StoredCertificate(
        serial=row.serial,
        role=Role(row.role),
        identifier=row.identifier,
        name=row.name,
        valid_from_ns=row.valid_from_ns,
        valid_until_ns=row.valid_until_ns,
        revocation_number=row.revocation_number,
    )
