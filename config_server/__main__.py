"""`config-server`: init, run, admin-token, openapi, config show|check."""

from __future__ import annotations

from pathlib import Path

import click

from config_server.api.openapi import openapi_document
from config_server.api.routes import ROUTES
from config_server.errors import NotInitialised
from config_server.installation import (
    ADMIN_TOKEN_FILE,
    AUTHORITY_FILE,
    initialise,
    replace_admin_token,
)
from config_server.service import ConfigServer
from config_server.settings import ConfigServerSettings
from protocol.signed_records import parse_authority_key
from runtime.clock import SystemClock
from runtime.command_line import ProgramGroup, config_commands, output_option, with_settings
from runtime.exit_codes import ExitCode
from runtime.local_directory import LocalDirectory
from runtime.logs import configure_logs
from runtime.output import Output, print_json
from runtime.privileges import become_owner_of
from runtime.secrets import read_secret
from runtime.service import run_service
from runtime.settings import Loaded

PROGRAM = "config-server"

_directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="The state directory; /var/lib/farpoint/config-server by default.",
)


@click.group(cls=ProgramGroup)
def main() -> None:
    """The configuration server: enrolment, certificates, grants, RPO, recovery points; never on the data path."""


@main.command("init")
@_directory_option
@click.option(
    "--authority-key",
    "authority_key",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The vault's authority key file, as `farpoint vault init` wrote it.",
)
@output_option
@with_settings(ConfigServerSettings, PROGRAM, flags={"directory": "state_directory"})
def init(loaded: Loaded[ConfigServerSettings], output: Output, authority_key: Path) -> None:
    """Make a configuration server for a vault. Never overwrites one."""
    key = parse_authority_key(read_secret(authority_key))
    path = loaded.settings.state_directory
    LocalDirectory(path)
    become_owner_of(path)
    installation = initialise(path, authority_key=key, now_ns=SystemClock().now_ns())
    output.record(
        {
            "vault": installation.vault,
            "directory": str(path),
            "admin_token_file": str(path / ADMIN_TOKEN_FILE),
            "authority_file": str(path / AUTHORITY_FILE),
        }
    )


@main.command("admin-token")
@_directory_option
@output_option
@with_settings(ConfigServerSettings, PROGRAM, flags={"directory": "state_directory"})
def admin_token(loaded: Loaded[ConfigServerSettings], output: Output) -> None:
    """Make a new admin token; the old one counts no more. The server must be stopped. For a token that is lost, or that
    somebody else may have seen."""
    path = loaded.settings.state_directory
    if not path.is_dir():
        raise NotInitialised(path=path)
    become_owner_of(path)
    replace_admin_token(path)
    output.record({"admin_token_file": str(path / ADMIN_TOKEN_FILE)})


@main.command("run")
@_directory_option
@click.option("--listen", help="HOST:PORT to serve HTTPS on.")
@with_settings(ConfigServerSettings, PROGRAM, flags={"directory": "state_directory", "listen": "listen"})
def run(loaded: Loaded[ConfigServerSettings]) -> ExitCode:
    """Serve until SIGTERM."""
    configure_logs(loaded.settings.log, program=PROGRAM)
    return run_service(ConfigServer(loaded.settings).run)


@main.command("openapi")
def openapi() -> None:
    """Print what its HTTPS interface takes and gives, as an OpenAPI 3.1 document."""
    print_json(openapi_document(ROUTES))


main.add_command(config_commands(ConfigServerSettings, PROGRAM))

if __name__ == "__main__":
    main()
