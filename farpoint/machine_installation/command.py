"""`farpoint machines install HOST…`: what is asked for is read and checked here, once, before any host is touched."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Final

import click

from farpoint.machine_installation.agent_package import find_package
from farpoint.machine_installation.installation import HostReport, Site, install_on_all
from farpoint.machine_installation.remote_host import SSH_PORT, Access, read_key_file, read_known_hosts
from farpoint.options import server_options
from farpoint.running import run_interruptible
from farpoint.server_connection import operator_of, server_url_of
from farpoint.settings import FarpointSettings
from protocol.errors import ReplicationError
from runtime.command_line import output_option, show_error
from runtime.exit_codes import ExitCode, exit_code_of
from runtime.output import Output, notice
from runtime.settings import Loaded

AT_ONCE: Final = 4
AT_ONCE_MAX: Final = 64
KNOWN_HOSTS: Final = Path("~/.ssh/known_hosts")
COLUMNS: Final = {"host": "host", "result": "result", "machine": "machine", "version": "version", "error": "error"}

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("install")
@click.argument("hosts", nargs=-1, required=True, metavar="HOST…")
@click.option("--user", default=getpass.getuser, help="Who logs in: root, or who may `sudo -n`; you by default.")
@click.option("--key-file", type=FILE, help="The user's SSH key; by default ssh-agent's, and those in ~/.ssh.")
@click.option("--port", type=click.IntRange(1, 65535), default=SSH_PORT, show_default=True, help="Of SSH.")
@click.option("--known-hosts", type=FILE, help=f"The host keys that are known; {KNOWN_HOSTS} by default.")
@click.option("--host-key-fingerprint", metavar="SHA256:…", help="Accept this host key; for a single HOST.")
@click.option("--package", type=FILE, help="The agent's .deb; the one in dist/ by default.")
@click.option(
    "--machines-server", metavar="URL", help="The configuration server as the machines reach it; --server by default."
)
@click.option(
    "--at-once", type=click.IntRange(1, AT_ONCE_MAX), default=AT_ONCE, show_default=True, help="So many hosts."
)
@output_option
@server_options
def install_command(
    loaded: Loaded[FarpointSettings],
    output: Output,
    hosts: tuple[str, ...],
    user: str,
    key_file: Path | None,
    port: int,
    known_hosts: Path | None,
    host_key_fingerprint: str | None,
    package: Path | None,
    machines_server: str | None,
    at_once: int,
) -> ExitCode:
    """Put the mobility agent onto machines over SSH, enrol them, start it. What is done already is skipped.

    Exit code 3 if some hosts failed and others did not.
    """
    if host_key_fingerprint is not None and len(hosts) != 1:
        raise click.UsageError("--host-key-fingerprint goes with a single HOST; for several, use --known-hosts")
    if len(set(hosts)) != len(hosts):
        raise click.UsageError("a HOST is named twice")
    if host_key_fingerprint is not None and not host_key_fingerprint.startswith("SHA256:"):
        raise click.BadParameter("give it as `ssh-keygen -l` prints it: SHA256:…", param_hint="--host-key-fingerprint")
    access = Access(
        user=user,
        port=port,
        keys=() if key_file is None else (read_key_file(key_file),),
        known_hosts=read_known_hosts(known_hosts or KNOWN_HOSTS.expanduser(), must_exist=known_hosts is not None),
        fingerprint=host_key_fingerprint,
    )
    found = find_package(package)

    async def work() -> ExitCode:
        async with operator_of(loaded.settings) as operator:
            url = machines_server or server_url_of(loaded.settings)
            site = Site(access=access, package=found, operator=operator, machines_url=url, tell=notice)
            reports = await install_on_all(hosts, site, at_once=at_once)
        output.rows([_row(report) for report in reports], columns=COLUMNS)
        return _verdict(reports)

    return run_interruptible(work)


def _row(report: HostReport) -> dict[str, object]:
    error = report.error
    return {
        "host": report.host,
        "result": report.result,
        "machine": report.machine,
        "version": report.version,
        "steps": report.steps,
        "error": None if error is None else str(error),
        "error_code": error.code if isinstance(error, ReplicationError) else None,
    }


def _verdict(reports: list[HostReport]) -> ExitCode:
    """All well: 0. Some failed: 3. All failed: what the first failed with."""
    errors = [report.error for report in reports if report.error is not None]
    for error in errors:
        show_error(error)
    if not errors:
        return ExitCode.OK
    return ExitCode.PARTIAL if len(errors) < len(reports) else exit_code_of(errors[0])
