"""The program `farpoint`: the operator's command line. Composes, owns no logic.

A command's module is imported when it is called: a recovery needs nothing of the servers, not even their imports.
"""

from __future__ import annotations

import importlib
from typing import Final

import click

from farpoint.errors import ExtraMissing
from farpoint.settings import PROGRAM, FarpointSettings
from runtime.command_line import ProgramGroup, config_commands
from runtime.logs import LogSettings, configure_logs

COMMANDS: Final = {
    "audit": "farpoint.audit_commands:audit_group",
    "demo": "farpoint.demo.command:demo_command",
    "disks": "farpoint.listing_commands:disks_command",
    "machines": "farpoint.machine_commands:machines_group",
    "operators": "farpoint.operator_commands:operators_group",
    "points": "farpoint.listing_commands:points_command",
    "policies": "farpoint.policy_commands:policies_group",
    "process-servers": "farpoint.listing_commands:process_servers_command",
    "recover": "farpoint.recover_command:recover_command",
    "token": "farpoint.token_commands:token_group",
    "up": "farpoint.up_command:up_command",
    "vault": "farpoint.vault_commands:vault_group",
}

OWN_PACKAGES: Final = ("config_server", "farpoint", "process_server", "protocol", "recovery", "runtime", "storage")


class OperatorGroup(ProgramGroup):
    """Knows its commands by name before their modules are imported."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*COMMANDS, *super().list_commands(context)})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return super().get_command(context, name)
        module, _, attribute = COMMANDS[name].partition(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            return _not_installed(name, error)
        assert isinstance(command, click.Command)
        return command


def _not_installed(name: str, error: ModuleNotFoundError) -> click.Command:
    """Stands for a command whose extra was not installed, so that `--help` and all others work."""
    missing = error.name or ""
    if missing.partition(".")[0] in OWN_PACKAGES:
        raise error

    def refuse() -> None:
        raise ExtraMissing(command=name, module=missing) from error

    everything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(
        name, callback=refuse, context_settings=everything, add_help_option=False, short_help="(Not installed here.)"
    )


@click.group(PROGRAM, cls=OperatorGroup)
def main() -> None:
    """Disaster recovery and migration: vaults, join tokens, what is protected, and recovery."""
    configure_logs(LogSettings(level="warning"), program=PROGRAM)


main.add_command(config_commands(FarpointSettings, PROGRAM))

if __name__ == "__main__":
    main()
