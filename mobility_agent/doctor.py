"""Looks at this machine as the agent would, and at what the running agent says, for `mobility-agent doctor`.

Changes nothing but this: devices are opened exclusively for an instant. Calls block.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Sequence
from typing import Any, Final

from mobility_agent.consistency.freeze_points import held_exclusively
from mobility_agent.consistency.mount_table import freeze_plan
from mobility_agent.consistency.scripts import FreezeScripts, check_only_roots
from mobility_agent.control_socket import Request, ask
from mobility_agent.core.checkup import DiskFacts, Finding, MachineFacts, check_disk, check_machine
from mobility_agent.disk_identity import whole_disks
from mobility_agent.disk_reader import LocalDisk
from mobility_agent.errors import AgentNotRunning, DiskFault, ScriptFailed
from mobility_agent.protection import read_protection
from mobility_agent.settings import AgentSettings
from mobility_agent.tracking.abilities import may_freeze, may_lock_memory
from mobility_agent.tracking.selection import SourceSelection
from protocol.enrollment import CREDENTIALS_FILE
from protocol.vocabulary import DiskId
from runtime.local_directory import LocalDirectory

ANY_DISK: Final = DiskId("0" * 32)


def check_up(settings: AgentSettings, paths: Sequence[str]) -> list[Finding]:
    """paths: of disks; those that are protected if there are none, and all of the machine's if none is."""
    directory = settings.state_directory
    try:
        rows = asyncio.run(ask(directory, Request(command="status")))
        is_running = True
    except AgentNotRunning:
        rows, is_running = [], False
    known = read_protection(LocalDirectory(directory)) if directory.is_dir() else None
    protected = [] if known is None else [entry.path for entry in known.disks if entry.release is None]
    by_path = {row["path"]: row for row in rows}
    selection = SourceSelection(settings.tracking, settings.pin_directory)
    findings = check_machine(_machine(settings, is_running=is_running))
    for path in paths or protected or whole_disks():
        findings += check_disk(_disk(selection, path, by_path.get(path), is_protected=path in protected))
    return findings


def _machine(settings: AgentSettings, *, is_running: bool) -> MachineFacts:
    scripts = FreezeScripts(settings.freeze.scripts_directory, seconds_max=settings.freeze.script_seconds_max)
    fault, found = "", []
    try:
        found = scripts.found()
        for script in found:
            check_only_roots(script)
    except ScriptFailed as error:
        fault = str(error)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    is_limited = locked != resource.RLIM_INFINITY and not is_running and not may_lock_memory()
    return MachineFacts(
        is_enrolled=(settings.state_directory / CREDENTIALS_FILE).exists(),
        is_running=is_running,
        may_freeze=is_running or may_freeze(),
        locked_bytes_max=locked if is_limited else None,
        scripts=[script.name for script in found],
        script_fault=fault,
    )


def _disk(selection: SourceSelection, path: str, row: dict[str, Any] | None, *, is_protected: bool) -> DiskFacts:
    try:
        source = LocalDisk(path, expected=None)
    except DiskFault as error:
        return DiskFacts(path=path, is_protected=is_protected, fault=str(error))
    try:
        choice = selection.choose(source)
        device = source.device
    finally:
        source.close()
    plan = None if device is None else freeze_plan({ANY_DISK: device})
    row = row or {}
    now = row.get("error") or {}
    return DiskFacts(
        path=path,
        is_protected=is_protected,
        choice=choice,
        source_in_use=row.get("source", ""),
        reason_in_use=row.get("source_reason", ""),
        is_disconnected=row.get("state") == "disconnected",
        file_systems=[] if plan is None else [(system.path, system.kind) for system in plan.file_systems],
        held_elsewhere=[] if plan is None else held_exclusively(plan.to_probe[ANY_DISK]),
        error=now.get("detail", ""),
        hint=now.get("hint", ""),
        unsettled_reason=row.get("unsettled_reason", ""),
        rounds=row.get("rounds", 0),
        points=row.get("points", 0),
        settled_seconds_ago=row.get("settled_seconds_ago"),
        freeze_fault=(row.get("newest_freeze") or {}).get("reason", ""),
        audit_alarms=row.get("audit_alarms", 0),
        resyncs=sum(row.get("resyncs", {}).values()),
    )
