"""Turns intent and observations into what is signed and ordered.

Everything that it makes is stored in the caller's transaction before anybody is told; orders are read from what is
stored and nothing else, so the same state gives the same orders under the same revision, over restarts too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import blake3
from sqlalchemy.ext.asyncio import AsyncConnection

from config_server.core.assignment import ProcessServerLoad, choose_process_server
from config_server.core.grants import missing_grants, wanted_epochs
from config_server.core.machine_descriptions import describe_machine
from config_server.core.policies import Terms
from config_server.core.recovery_points import point_record
from config_server.core.registry import KnownDisk
from config_server.database.disks import (
    StoredDisk,
    StoredGrant,
    add_grant,
    list_disks,
    list_disks_of_process_server,
    list_grants,
)
from config_server.database.members import (
    StoredCertificate,
    StoredMachine,
    StoredProcessServer,
    address_of,
    assign_process_server,
    find_process_server,
    list_process_servers,
    read_revocation_list,
    record_description,
)
from config_server.database.points import (
    StoredPublication,
    add_publication,
    list_publications,
)
from config_server.database.policies import StoredPolicy, find_policy
from protocol.control import (
    ORDERS_PER_REPLY_MAX,
    AgentOrders,
    CommittedPoint,
    DiskOrder,
    HostDescription,
    ProcessServerOrders,
    PublishMachineDescription,
    PublishPoint,
)
from protocol.signed_records import AuthorityKey, Grant, sign_grant, sign_machine_description, sign_point
from protocol.vocabulary import MachineId, ProcessServerId

SILENT_HEARTBEATS: Final = 3
"""Nothing heard for so many heartbeats is silence."""
REVISION_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """What every member is told, in seconds."""

    heartbeat_seconds: float
    renew_after_seconds: float


class Reconciler:
    """Signs with the vault's authority key. Every method works within the transaction that it is given."""

    def __init__(self, authority: AuthorityKey, intervals: Intervals, terms: Terms) -> None:
        """terms: of machines without a replication policy."""
        self._authority = authority
        self._intervals = intervals
        self._terms = terms

    def terms_of(self, policy: StoredPolicy | None) -> Terms:
        """What a machine with this replication policy goes by."""
        return self._terms if policy is None else Terms.of(policy.content)

    async def reconcile_machine(
        self,
        connection: AsyncConnection,
        machine: StoredMachine,
        *,
        now_ns: int,
        disks: Sequence[StoredDisk] | None = None,
    ) -> set[str]:
        """Assigns, grants and describes as far as it is possible now. Returns the members whose orders changed.

        disks: the machine's, if they are at hand.
        """
        if disks is None:
            disks = await list_disks(connection, machine=machine.machine)
        if not any(stored.known.is_protected for stored in disks):
            return set()
        changed: set[str] = set()
        process_server = machine.process_server
        if process_server is None:
            process_server = await self._assign(connection, machine.machine, now_ns=now_ns)
            if process_server is None:
                return set()
            changed |= {machine.machine, process_server}
        changed |= await self._grant(connection, process_server, disks, now_ns=now_ns)
        changed |= await self._describe(connection, machine, process_server, disks, now_ns=now_ns)
        return changed

    async def order_point(
        self, connection: AsyncConnection, point: CommittedPoint, machine: MachineId, *, now_ns: int
    ) -> None:
        """A point that was just recorded is to be published."""
        record = point_record(point, vault=self._authority.vault, machine=machine)
        publication = StoredPublication(
            publication=point.point,
            machine=machine,
            point=point.point,
            version=None,
            record=sign_point(record, self._authority.private_key),
        )
        await add_publication(connection, publication, now_ns=now_ns)

    async def agent_orders(
        self,
        connection: AsyncConnection,
        machine: StoredMachine,
        certificate: StoredCertificate,
        *,
        now_ns: int,
        disks: Sequence[StoredDisk] | None = None,
    ) -> AgentOrders:
        """All that holds for this machine now. disks: the machine's, if they are at hand."""
        if disks is None:
            disks = await list_disks(connection, machine=machine.machine)
        address = await address_of(connection, machine.process_server)
        policy = None if machine.policy is None else await find_policy(connection, machine.policy)
        terms = self.terms_of(policy)
        orders = AgentOrders(
            revision="",
            now_ns=0,
            heartbeat_seconds=self._intervals.heartbeat_seconds,
            renew_certificate=self._is_renewal_due(certificate, now_ns),
            freeze_interval_seconds=terms.freeze_interval_seconds,
            application_interval_seconds=terms.application_interval_seconds,
            disks=tuple(
                DiskOrder(
                    disk=stored.disk,
                    process_server=address,
                    is_paused=stored.is_paused,
                    copy_interval_seconds=terms.copy_interval_seconds,
                    point_interval_seconds=terms.point_interval_seconds,
                )
                for stored in disks
                if stored.known.is_protected
            ),
            revoked=await read_revocation_list(connection, valid_at_ns=now_ns),
        )
        return orders.model_copy(update={"revision": _revision(orders.model_dump_json()), "now_ns": now_ns})

    async def process_server_orders(
        self,
        connection: AsyncConnection,
        process_server: ProcessServerId,
        certificate: StoredCertificate,
        *,
        now_ns: int,
    ) -> ProcessServerOrders:
        """All that holds for this process server now."""
        disks = await list_disks_of_process_server(connection, process_server)
        publications = await list_publications(connection, process_server, limit=ORDERS_PER_REPLY_MAX)
        orders = ProcessServerOrders(
            revision="",
            now_ns=0,
            heartbeat_seconds=self._intervals.heartbeat_seconds,
            renew_certificate=self._is_renewal_due(certificate, now_ns),
            grants=await _grants_for(connection, process_server, disks),
            revoked=await read_revocation_list(connection, valid_at_ns=now_ns),
            orders=tuple(_publish(publication) for publication in publications),
        )
        return orders.model_copy(update={"revision": _revision(orders.model_dump_json()), "now_ns": now_ns})

    def is_silent(self, heard_ns: int | None, *, now_ns: int) -> bool:
        silence_ns = SILENT_HEARTBEATS * self._intervals.heartbeat_seconds * 1e9
        return heard_ns is None or now_ns - heard_ns > silence_ns

    async def _assign(self, connection: AsyncConnection, machine: MachineId, *, now_ns: int) -> ProcessServerId | None:
        loads = [
            ProcessServerLoad(
                process_server=stored.process_server,
                disks=stored.protected_disks,
                is_silent=self.is_silent(stored.heard_ns, now_ns=now_ns),
            )
            for stored in await list_process_servers(connection)
            if stored.port is not None
        ]
        chosen = choose_process_server(loads)
        if chosen is not None:
            await assign_process_server(connection, machine, chosen)
        return chosen

    async def _grant(
        self,
        connection: AsyncConnection,
        process_server: ProcessServerId,
        disks: Sequence[StoredDisk],
        *,
        now_ns: int,
    ) -> set[str]:
        granted = await list_grants(connection, [stored.disk for stored in disks])
        receiver: StoredProcessServer | None = None
        for stored in disks:
            if not stored.known.is_protected:
                continue
            epochs = {grant.epoch for grant in granted if grant.disk == stored.disk}
            for need in missing_grants(stored.newest_used_epoch, epochs):
                receiver = receiver or await find_process_server(connection, process_server)
                if receiver is None:
                    return set()
                grant = Grant(
                    vault=self._authority.vault,
                    machine=stored.machine,
                    disk=stored.disk,
                    epoch=need.epoch,
                    parent_epoch=need.parent_epoch,
                    process_server=process_server,
                    process_server_key=receiver.signing_public_key,
                    issued_ns=now_ns,
                    disk_size_bytes=stored.known.identity.size_bytes,
                    sector_bytes=stored.known.identity.logical_sector_bytes,
                    is_spare=need.is_spare,
                )
                signed = StoredGrant(
                    disk=stored.disk,
                    epoch=need.epoch,
                    process_server=process_server,
                    record=sign_grant(grant, self._authority.private_key),
                )
                await add_grant(connection, signed, now_ns=now_ns)
        return set() if receiver is None else {process_server}

    async def _describe(
        self,
        connection: AsyncConnection,
        machine: StoredMachine,
        process_server: ProcessServerId,
        disks: Sequence[StoredDisk],
        *,
        now_ns: int,
    ) -> set[str]:
        if machine.host is None:
            return set()
        known = [stored.known for stored in disks]
        if machine.description == self._signed_description(machine, machine.host, known, machine.description_version):
            return set()
        version = machine.description_version + 1
        record = self._signed_description(machine, machine.host, known, version)
        await record_description(connection, machine.machine, version, record)
        publication = StoredPublication(
            publication=_order_id(machine.machine, version),
            machine=machine.machine,
            point=None,
            version=version,
            record=record,
        )
        await add_publication(connection, publication, now_ns=now_ns)
        return {process_server}

    def _signed_description(
        self, machine: StoredMachine, host: HostDescription, disks: Sequence[KnownDisk], version: int
    ) -> bytes:
        description = describe_machine(
            host, disks, vault=self._authority.vault, machine=machine.machine, version=max(version, 1)
        )
        return sign_machine_description(description, self._authority.private_key)

    def _is_renewal_due(self, certificate: StoredCertificate, now_ns: int) -> bool:
        return now_ns - certificate.valid_from_ns >= self._intervals.renew_after_seconds * 1e9


async def _grants_for(
    connection: AsyncConnection, process_server: ProcessServerId, disks: Iterable[StoredDisk]
) -> tuple[bytes, ...]:
    """Also for disks whose protection ended with their data kept: what was acknowledged is still to be committed."""
    wanted = {
        stored.disk: wanted_epochs(stored.newest_used_epoch)
        for stored in disks
        if stored.known.is_protected or stored.keeps_data
    }
    return tuple(
        grant.record
        for grant in await list_grants(connection, wanted)
        if grant.process_server == process_server and grant.epoch in wanted[grant.disk]
    )


def _publish(publication: StoredPublication) -> PublishPoint | PublishMachineDescription:
    if publication.point is not None:
        return PublishPoint(order=publication.publication, point=publication.point, record=publication.record)
    return PublishMachineDescription(
        order=publication.publication,
        machine=publication.machine,
        version=publication.version or 1,
        record=publication.record,
    )


def _order_id(machine: MachineId, version: int) -> str:
    return blake3.blake3(f"machine description {machine} {version}".encode()).hexdigest(length=16)


def _revision(content: str) -> str:
    return blake3.blake3(content.encode()).hexdigest(length=REVISION_BYTES)
