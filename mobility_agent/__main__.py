"""`mobility-agent`: enroll, protect, unprotect, run, status, doctor, scan-now, freeze-now, thaw, config show|check."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import Any, Final

import click

from mobility_agent.consistency.freezer import thaw_what_was_left
from mobility_agent.control_socket import Request, ask
from mobility_agent.core.checkup import Weight
from mobility_agent.core.freeze_point import FreezeKind
from mobility_agent.disk_identity import whole_disks
from mobility_agent.disk_reader import identify
from mobility_agent.doctor import check_up
from mobility_agent.errors import AgentNotRunning
from mobility_agent.machine_facts import this_machine
from mobility_agent.program import LOCK_FILE, PROGRAM, AgentProgram
from mobility_agent.protection import Protection, read_protection, write_protection
from mobility_agent.restarts import begin_tracking, note_stop
from mobility_agent.settings import AgentSettings
from mobility_agent.status import records_at_rest
from protocol.vocabulary import Role
from runtime.command_line import ProgramGroup, config_commands, output_option, with_settings
from runtime.exit_codes import ExitCode
from runtime.local_directory import LocalDirectory
from runtime.locks import exclusive_lock
from runtime.logs import configure_logs
from runtime.membership import enroll_state_directory
from runtime.output import Output, notice
from runtime.service import run_service
from runtime.settings import Loaded

COLUMNS: Final = {
    "path": "path",
    "disk": "disk",
    "state": "state",
    "source": "source",
    "size_bytes": "size",
    "copied_bytes": "copied",
    "backlog_bytes": "backlog",
    "epoch": "epoch",
    "durable_sequence": "durable",
    "committed_sequence": "committed",
    "points": "points",
    "note": "note",
}

_FLAGS: Final = {"directory": "state_directory"}
_directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="The state directory; /var/lib/farpoint/mobility-agent by default.",
)


@click.group(cls=ProgramGroup)
def main() -> None:
    """The mobility agent: replicates this machine's disks to a process server."""


@main.command("enroll")
@click.option("--server", required=True, metavar="URL", help="The configuration server, https://host:port.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File with the join token that `farpoint token create --role agent` printed.",
)
@click.option("--name", default="", help="What operators call this machine; its host name by default.")
@_directory_option
@output_option
@with_settings(AgentSettings, PROGRAM, flags=_FLAGS)
def enroll(loaded: Loaded[AgentSettings], output: Output, server: str, token_file: Path, name: str) -> None:
    """Make this machine a member of the server's vault."""
    path = loaded.settings.state_directory
    identity = enroll_state_directory(
        path, lock_file=LOCK_FILE, server_url=server, token_file=token_file, role=Role.AGENT, name=name
    )
    output.record({"machine": identity.peer.identifier, "vault": identity.peer.vault, "directory": str(path)})


@main.command("protect")
@click.argument("paths", nargs=-1, metavar="PATH…")
@click.option("--all", "all_disks", is_flag=True, help="All disks of this machine.")
@click.option("--exclude", multiple=True, metavar="PATH", help="With --all: not this one; can be repeated.")
@_directory_option
@output_option
@with_settings(AgentSettings, PROGRAM, flags=_FLAGS)
def protect(
    loaded: Loaded[AgentSettings], output: Output, paths: tuple[str, ...], all_disks: bool, exclude: tuple[str, ...]
) -> None:
    """Protect disks: block devices or image files. Works whether or not the agent runs."""
    if all_disks == bool(paths):
        raise click.UsageError("name the disks to protect, or say --all")
    if exclude and not all_disks:
        raise click.UsageError("--exclude goes with --all")
    wanted = [os.path.abspath(path) for path in paths]
    if all_disks:
        left_out = {os.path.realpath(path) for path in exclude}
        wanted = [path for path in whole_disks() if os.path.realpath(path) not in left_out]
        if not wanted:
            raise click.UsageError("this machine has no disks to protect")
    _tell_or_write(loaded.settings, output, [Request(command="protect", path=path) for path in wanted])


@main.command("unprotect")
@click.argument("paths", nargs=-1, required=True, metavar="PATH…")
@click.option("--keep", "fate", flag_value="keep", help="Keep the recovery points.")
@click.option("--delete", "fate", flag_value="delete", help="Let the recovery points be deleted.")
@_directory_option
@output_option
@with_settings(AgentSettings, PROGRAM, flags=_FLAGS)
def unprotect(loaded: Loaded[AgentSettings], output: Output, paths: tuple[str, ...], fate: str | None) -> None:
    """End the protection of disks. Works whether or not the agent runs."""
    if fate is None:
        raise click.UsageError("say what becomes of the recovery points: --keep or --delete")
    requests = [Request(command="unprotect", path=os.path.abspath(path), keep=fate == "keep") for path in paths]
    _tell_or_write(loaded.settings, output, requests)


@main.command("run")
@_directory_option
@with_settings(AgentSettings, PROGRAM, flags=_FLAGS)
def run(loaded: Loaded[AgentSettings]) -> ExitCode:
    """Replicate until SIGTERM. SIGUSR1 begins a round of every disk at once."""
    configure_logs(loaded.settings.log, program=PROGRAM)
    return run_service(AgentProgram(loaded.settings).run)


@main.command("scan-now")
@_directory_option
@output_option
@with_settings(AgentSettings, PROGRAM, flags=_FLAGS)
def scan_now(loaded: Loaded[AgentSettings], output: Output) -> None:
    """Begin the next round of every disk at once, without waiting for its interval."""
    _show(output, asyncio.run(ask(loaded.settings.state_directory, Request(command="scan-now"))))


@main.command("freeze-now")
@click.option("--application", is_flag=True, help="With the scripts around it that quiesce applications.")
@_directory_option
@output_option
@with_settings(AgentSettings, PROGRAM, flags=_FLAGS)
def freeze_now(loaded: Loaded[AgentSettings], output: Output, application: bool) -> ExitCode:
    """Freeze this machine's file systems for a moment, and mark recovery points of its live disks."""
    kind = FreezeKind.APPLICATION if application else FreezeKind.FILE_SYSTEM
    (record,) = asyncio.run(ask(loaded.settings.state_directory, Request(command="freeze-now", kind=kind)))
    output.record(record)
    if record["result"] == kind.value:
        return ExitCode.OK
    return ExitCode.FAILURE if record["result"] in ("failed", "unsettled") else ExitCode.PARTIAL


@main.command("doctor")
@click.argument("paths", nargs=-1, metavar="PATH…")
@_directory_option
@output_option
@with_settings(AgentSettings, PROGRAM, flags=_FLAGS)
def doctor(loaded: Loaded[AgentSettings], output: Output, paths: tuple[str, ...]) -> ExitCode:
    """Say what stands in the way of better protection, and what to do about it; exit code 3 if something must be."""
    findings = check_up(loaded.settings, [os.path.abspath(path) for path in paths])
    output.rows([dataclasses.asdict(finding) for finding in findings])
    return ExitCode.PARTIAL if any(finding.weight is Weight.PROBLEM for finding in findings) else ExitCode.OK


@main.command("thaw")
@_directory_option
@output_option
@with_settings(AgentSettings, PROGRAM, flags=_FLAGS)
def thaw(loaded: Loaded[AgentSettings], output: Output) -> None:
    """Thaw what an agent that was killed has left frozen; its service does so by itself."""
    path = loaded.settings.state_directory
    thawed = thaw_what_was_left(LocalDirectory(path), this_machine().boot_id) if path.is_dir() else []
    output.record({"thawed": thawed})


@main.command("begin-tracking")
@_directory_option
@with_settings(AgentSettings, PROGRAM, flags=_FLAGS)
def begin_tracking_command(loaded: Loaded[AgentSettings]) -> None:
    """Early in a boot, before anything is mounted: track the protected disks. For a unit, not for people."""
    configure_logs(loaded.settings.log, program=PROGRAM)
    begin_tracking(loaded.settings)


@main.command("note-stop")
@_directory_option
@with_settings(AgentSettings, PROGRAM, flags=_FLAGS)
def note_stop_command(loaded: Loaded[AgentSettings]) -> None:
    """Last in a shutdown, after all was unmounted: note what was not sent yet. For a unit, not for people."""
    configure_logs(loaded.settings.log, program=PROGRAM)
    note_stop(loaded.settings)


@main.command("status")
@_directory_option
@output_option
@with_settings(AgentSettings, PROGRAM, flags=_FLAGS)
def status(loaded: Loaded[AgentSettings], output: Output) -> None:
    """Show what is protected, and how far it is."""
    path = loaded.settings.state_directory
    try:
        _show(output, asyncio.run(ask(path, Request(command="status"))))
    except AgentNotRunning:
        if not path.is_dir():
            raise
        notice("the agent is not running")
        _show(output, records_at_rest(read_protection(LocalDirectory(path))))


def _tell_or_write(settings: AgentSettings, output: Output, requests: list[Request]) -> None:
    """Tells the running agent; where none runs, writes the intent down for the next one."""
    path = settings.state_directory
    try:
        records: list[dict[str, Any]] = []
        for request in requests:
            records = asyncio.run(ask(path, request))
    except AgentNotRunning:
        with exclusive_lock(path / LOCK_FILE):
            directory = LocalDirectory(path)
            protection = read_protection(directory)
            for request in requests:
                protection = _intend(protection, request)
            write_protection(directory, protection)
        notice("the agent is not running; it begins when it runs")
        records = records_at_rest(protection)
    _show(output, records)


def _intend(protection: Protection, request: Request) -> Protection:
    if request.command == "unprotect":
        return protection.releasing(request.path, "keep" if request.keep else "delete")
    known = protection.at(request.path)
    return protection.protecting(request.path, identify(request.path, None if known is None else known.identity))


def _show(output: Output, records: list[dict[str, Any]]) -> None:
    output.rows([record | {"note": _note(record)} for record in records], columns=COLUMNS)


def _note(record: dict[str, Any]) -> str:
    if record["error"]:
        return f"{record['error']['detail']} ({record['error']['hint']})"
    if record["release"]:
        return f"ending, recovery points: {record['release']}"
    better = f"{record['source']}, because {record['source_reason']}" if record["source_reason"] else ""
    return "; ".join(text for text in (str(record["unsettled_reason"]), better) if text)


main.add_command(config_commands(AgentSettings, PROGRAM))

if __name__ == "__main__":
    main()
