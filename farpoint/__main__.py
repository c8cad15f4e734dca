"""The program `farpoint`: the operator's command line. Composes, owns no logic."""

from __future__ import annotations

import click

from farpoint.demo.command import demo_command
from farpoint.listing_commands import disks_command, machines_command, points_command, process_servers_command
from farpoint.recover_command import recover_command
from farpoint.settings import PROGRAM, FarpointSettings
from farpoint.token_commands import token_group
from farpoint.up_command import up_command
from farpoint.vault_commands import vault_group
from runtime.command_line import ProgramGroup, config_commands
from runtime.logs import LogSettings, configure_logs


@click.group(PROGRAM, cls=ProgramGroup)
def main() -> None:
    """Disaster recovery and migration: vaults, join tokens, what is protected, and recovery."""
    configure_logs(LogSettings(level="warning"), program=PROGRAM)
    configure_logs(LogSettings(level="warning"), program=PROGRAM)


for command in (
    vault_group,
    token_group,
    machines_command,
    process_servers_command,
    disks_command,
    points_command,
    recover_command,
    up_command,
    demo_command,
    config_commands(FarpointSettings, PROGRAM),
):
    main.add_command(command)


if __name__ == "__main__":
    main()
