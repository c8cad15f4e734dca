"""`process-server`: enroll, run, config show|check."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from process_server.program import LOCK_FILE, ProcessServerProgram
from process_server.settings import PROGRAM, ProcessServerSettings
from protocol.vocabulary import Role
from runtime.command_line import ProgramGroup, config_commands, output_option, with_settings
from runtime.exit_codes import ExitCode
from runtime.logs import configure_logs
from runtime.membership import enroll_state_directory
from runtime.output import Output
from runtime.service import run_service
from runtime.settings import Loaded

STOP_MARGIN_SECONDS: Final = 10.0
"""Beyond the service's own deadline, for what is left to close."""

_FLAGS: Final = {"directory": "state_directory"}
_directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="The state directory; /var/lib/farpoint/process-server by default.",
)


@click.group(cls=ProgramGroup)
def main() -> None:
    """The process server: receives, seals, caches and uploads what mobility agents send."""


@main.command("enroll")
@click.option("--server", required=True, metavar="URL", help="The configuration server, https://host:port.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File with the join token that `farpoint token create --role process-server` printed.",
)
@click.option("--name", default="", help="What operators call it; this machine's host name by default.")
@_directory_option
@output_option
@with_settings(ProcessServerSettings, PROGRAM, flags=_FLAGS)
def enroll(loaded: Loaded[ProcessServerSettings], output: Output, server: str, token_file: Path, name: str) -> None:
    """Make this process server a member of the server's vault."""
    path = loaded.settings.state_directory
    identity = enroll_state_directory(
        path, lock_file=LOCK_FILE, server_url=server, token_file=token_file, role=Role.PROCESS_SERVER, name=name
    )
    output.record({"process_server": identity.peer.identifier, "vault": identity.peer.vault, "directory": str(path)})


@main.command("run")
@_directory_option
@with_settings(ProcessServerSettings, PROGRAM, flags=_FLAGS)
def run(loaded: Loaded[ProcessServerSettings]) -> ExitCode:
    """Serve agents until SIGTERM; then make durable, acknowledge and upload what is there."""
    configure_logs(loaded.settings.log, program=PROGRAM)
    deadline_seconds = loaded.settings.stop_seconds_max + STOP_MARGIN_SECONDS
    return run_service(ProcessServerProgram(loaded.settings).run, stop_deadline_seconds=deadline_seconds)


main.add_command(config_commands(ProcessServerSettings, PROGRAM))

if __name__ == "__main__":
    main()
