"""`farpoint machines`: alone it lists them; `install` puts the agent onto new ones, `set-policy` says how they are
protected, `release` ends a quarantine."""

from __future__ import annotations

import click
from click.core import ParameterSource

from farpoint.listing_commands import list_machines
from farpoint.machine_installation.command import install_command
from farpoint.options import server_options
from farpoint.policy_commands import release_command, set_policy_command
from farpoint.settings import FarpointSettings
from runtime.command_line import output_option
from runtime.exit_codes import ExitCode
from runtime.output import Output
from runtime.settings import Loaded


@click.group("machines", invoke_without_command=True)
@output_option
@server_options
@click.pass_context
def machines_group(context: click.Context, loaded: Loaded[FarpointSettings], output: Output) -> ExitCode:
    """The protected machines, as the configuration server knows them; or a command on them."""
    command = context.invoked_subcommand
    if command is None:
        return list_machines(loaded, output)
    misplaced = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if misplaced:
        raise click.UsageError(f"options go behind `{command}`: {', '.join(sorted(misplaced))}")
    return ExitCode.OK


machines_group.add_command(install_command)
machines_group.add_command(set_policy_command)
machines_group.add_command(release_command)
