"""`farpoint up`: settings of both servers from their own files and environment, and from this command's flags."""

from __future__ import annotations

import socket
from typing import Final

import click

from config_server.settings import DEFAULT_PORT, ConfigServerSettings
from farpoint.settings import PROGRAM, FarpointSettings
from farpoint.up import Up, UpSettings
from farpoint.up_directory import UpDirectory
from process_server.settings import ProcessServerSettings
from runtime.command_line import with_settings
from runtime.exit_codes import ExitCode
from runtime.logs import LogSettings, configure_logs
from runtime.service import run_service
from runtime.settings import Loaded, load

DATA_PORT: Final = 9443
STOP_DEADLINE_SECONDS: Final = 40.0
ALL_INTERFACES: Final = "0.0.0.0"  # nosec B104 # noqa: S104


@click.command("up")
@click.option("--dir", "directory", type=click.Path(file_okay=False), help="Holds everything of both servers.")
@click.option("--store", metavar="URL", help="DIR/store by default; only the first run may choose.")
@click.option("--store-credentials-file", type=click.Path(), help="For azure; the last run's by default.")
@click.option("--port", type=click.IntRange(1, 65535), default=DATA_PORT, show_default=True, help="For agents' data.")
@click.option("--control-port", type=click.IntRange(1, 65535), default=DEFAULT_PORT, show_default=True)
@click.option("--host", default=socket.gethostname, help="Name or address by which agents reach this host.")
@with_settings(
    FarpointSettings,
    PROGRAM,
    flags={"directory": "dir", "store": "store", "store_credentials_file": "store_credentials_file"},
)
def up_command(loaded: Loaded[FarpointSettings], port: int, control_port: int, host: str) -> ExitCode:
    """Run a configuration server and a process server on this host. The first run makes all they need."""
    settings = loaded.settings
    if settings.dir is None:
        raise click.UsageError("--dir must be given")
    directory = UpDirectory(path=settings.dir)
    store_url = directory.store_url(settings.store)
    store_credentials_file = directory.store_credentials_file(settings.store_credentials_file)
    up = UpSettings(
        directory=directory,
        store_url=store_url,
        store_credentials_file=store_credentials_file,
        host=host,
        config_server=load(
            ConfigServerSettings,
            program="config-server",
            flags={
                "state_directory": directory.config_server,
                "listen": f"{ALL_INTERFACES}:{control_port}",
                "server_names": (host,),
            },
        ).settings,
        process_server=load(
            ProcessServerSettings,
            program="process-server",
            flags={
                "state_directory": directory.process_server,
                "store": store_url,
                "store_credentials_file": store_credentials_file,
                "listen": f"{ALL_INTERFACES}:{port}",
                "host": host,
            },
        ).settings,
    )
    configure_logs(LogSettings(), program=PROGRAM)
    return run_service(Up(up).run, stop_deadline_seconds=STOP_DEADLINE_SECONDS)
