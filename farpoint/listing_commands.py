"""`farpoint machines | disks | points | process-servers`: what is protected and how well.

With a recovery key, disks and points are read from storage alone; else the configuration server is asked.
"""

from __future__ import annotations

import click

from farpoint.options import server_options, vault_or_server_options
from farpoint.running import run_interruptible
from farpoint.server_connection import operator_of
from farpoint.settings import FarpointSettings
from farpoint.vault_connection import vault_of
from protocol.operator_messages import DiskStatus, RpoStatus
from protocol.vocabulary import DiskId
from recovery.core.instants import instant_text
from recovery.opened_vault import DiskCatalogue, OpenedVault, StoredDisk
from runtime.command_line import output_option
from runtime.exit_codes import ExitCode
from runtime.output import Output, notice
from runtime.settings import Loaded
from storage.history import HistoryPoint

POINT_COLUMNS = {
    "point": "point",
    "instant": "instant",
    "consistency": "consistency",
    "disk": "disk",
    "position": "position",
    "recoverable": "recoverable",
}


def list_machines(loaded: Loaded[FarpointSettings], output: Output) -> ExitCode:
    """`farpoint machines`: as the configuration server knows them."""

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            listed = await operator.machines()
        output.rows(
            [
                {
                    "machine": machine.machine,
                    "name": machine.name,
                    "disks": list(machine.disks),
                    "policy": machine.policy,
                    "agent_version": machine.agent_version,
                    "last_heard": _instant(machine.last_heard_ns),
                    "is_silent": machine.is_silent,
                    "is_quarantined": machine.is_quarantined,
                }
                for machine in listed.machines
            ]
        )

    return run_interruptible(work)


@click.command("process-servers")
@output_option
@server_options
def process_servers_command(loaded: Loaded[FarpointSettings], output: Output) -> ExitCode:
    """The process servers, their caches and their faults."""

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            listed = await operator.process_servers()
        output.rows(
            [
                {
                    "process_server": server.process_server,
                    "name": server.name,
                    "address": f"{server.host}:{server.port}" if server.port else None,
                    "cache_bytes": server.cache_bytes,
                    "cache_limit_bytes": server.cache_limit_bytes,
                    "disks": len(server.disks),
                    "last_heard": _instant(server.last_heard_ns),
                    "is_silent": server.is_silent,
                    "faults": [fault.detail for fault in server.faults],
                }
                for server in listed.process_servers
            ]
        )

    return run_interruptible(work)


@click.command("disks")
@output_option
@vault_or_server_options
def disks_command(loaded: Loaded[FarpointSettings], output: Output) -> ExitCode:
    """The protected disks: state, progress, lag. Exit code 3 if a recovery point objective is missed."""

    async def work() -> ExitCode:
        if loaded.settings.recovery_key is not None:
            async with vault_of(loaded.settings) as vault:
                return await _list_stored_disks(vault, output)
        async with operator_of(loaded.settings) as operator:
            disks = (await operator.disks()).disks
        output.rows([_disk_row(disk) for disk in disks])
        is_missed = any(disk.is_protected and disk.rpo.status is RpoStatus.MISSED for disk in disks)
        return ExitCode.PARTIAL if is_missed else ExitCode.OK

    return run_interruptible(work)


@click.command("points")
@click.option("--disk", help="Of this disk only: an identifier, a prefix of it, or machine-name:disk-name.")
@output_option
@vault_or_server_options
def points_command(loaded: Loaded[FarpointSettings], output: Output, disk: str | None) -> ExitCode:
    """The recovery points. From storage: exit code 3 if something there is damaged."""

    async def work() -> ExitCode:
        if loaded.settings.recovery_key is not None:
            async with vault_of(loaded.settings) as vault:
                return await _list_stored_points(vault, output, disk)
        async with operator_of(loaded.settings) as operator:
            listed = await operator.points(disk=None if disk is None else DiskId(disk))
        output.rows(
            [
                {
                    "point": point.point,
                    "instant": instant_text(point.instant_ns),
                    "consistency": point.consistency,
                    "disk": point.disk,
                    "machine": point.machine,
                    "position": f"{point.epoch}:{point.sequence}",
                    "is_published": point.is_published,
                }
                for point in listed.points
            ]
        )
        return ExitCode.OK

    return run_interruptible(work)


async def _list_stored_disks(vault: OpenedVault, output: Output) -> ExitCode:
    disks, damage = await vault.disks()
    rows = []
    for disk in disks:
        catalogue = await vault.catalogue(disk.disk)
        newest = catalogue.points[-1] if catalogue.points else None
        rows.append(
            {
                "disk": disk.disk,
                "name": disk.full_name,
                "size_bytes": disk.size_bytes,
                "points": len(catalogue.points),
                "newest_point": newest.point if newest else None,
                "newest_instant": instant_text(newest.instant_ns) if newest else None,
            }
        )
        damage += (*catalogue.history.damage, *catalogue.record_damage)
    output.rows(rows)
    return _tell_damage([str(fault) for fault in damage])


async def _list_stored_points(vault: OpenedVault, output: Output, selector: str | None) -> ExitCode:
    disks, damage = await vault.disks()
    if selector is not None:
        disks = (await vault.find_disk(selector),)
    rows = []
    for disk in disks:
        catalogue = await vault.catalogue(disk.disk)
        rows += [_point_row(catalogue, disk, point) for point in catalogue.points]
        damage += (*catalogue.history.damage, *catalogue.record_damage)
    output.rows(rows, columns=POINT_COLUMNS)
    return _tell_damage([str(fault) for fault in damage])


def _tell_damage(damage: list[str]) -> ExitCode:
    for text in dict.fromkeys(damage):
        notice(f"damage: {text}")
    return ExitCode.PARTIAL if damage else ExitCode.OK


def _point_row(catalogue: DiskCatalogue, disk: StoredDisk, point: HistoryPoint) -> dict[str, object]:
    return {
        "point": point.point,
        "instant": instant_text(point.instant_ns),
        "instant_ns": point.instant_ns,
        "consistency": point.consistency,
        "disk": disk.disk,
        "name": disk.full_name,
        "position": str(point.position),
        "recoverable": catalogue.is_recoverable(point),
        "is_published": point.point in catalogue.published,
    }


def _disk_row(disk: DiskStatus) -> dict[str, object]:
    return {
        "disk": disk.disk,
        "machine": disk.machine_name,
        "path": disk.path,
        "state": "unprotected" if not disk.is_protected else disk.state,
        "copied": _share(disk.copied_bytes, disk.copy_total_bytes),
        "backlog_bytes": disk.backlog_bytes,
        "lag_seconds": disk.rpo.age_seconds,
        "rpo": disk.rpo.status,
        "rpo_reason": disk.rpo.reason,
        "newest_point": disk.newest_point,
        "newest_instant": _instant(disk.newest_point_instant_ns),
        "error": disk.error.detail if disk.error else None,
    }


def _share(copied_bytes: int, total_bytes: int) -> str | None:
    return f"{100 * copied_bytes // total_bytes} %" if total_bytes else None


def _instant(instant_ns: int | None) -> str | None:
    return None if instant_ns is None else instant_text(instant_ns)
