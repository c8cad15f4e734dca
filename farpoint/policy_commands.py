"""`farpoint policies create | list | edit | delete`, and which one a machine goes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click
from pydantic import ValidationError

from farpoint.options import server_options
from farpoint.running import run_interruptible
from farpoint.server_connection import operator_of
from farpoint.settings import FarpointSettings
from protocol.control import reason_of
from protocol.control_errors import ResourceNotFound
from protocol.operator_messages import MachineStatus, PolicyStatus, ReplicationPolicy
from protocol.transport.operator_client import OperatorClient
from recovery.core.instants import instant_text
from runtime.command_line import output_option
from runtime.exit_codes import ExitCode
from runtime.output import Output, notice
from runtime.settings import Loaded
from runtime.units import parse_seconds

Command = TypeVar("Command", bound=Callable[..., Any])

OPTIONS: Final = {
    "rpo_threshold_seconds": ("--rpo-threshold", "Missed when the newest point is older; alerts only. New: 15 min."),
    "point_interval_seconds": ("--points-every", "Points while nothing changes: 5 s to 1 h. New: 5 min."),
    "application_interval_seconds": (
        "--application-every",
        "With the machine's scripts: 1 to 12 h; 0: never. New: 1 h.",
    ),
    "freeze_interval_seconds": (
        "--freeze-after",
        "Of live disks that do not settle: 30 s to 1 d; 0: never. New: 5 min.",
    ),
    "copy_interval_seconds": ("--copy-every", "Sources that cannot capture: 30 s, 5 min or 15 min. New: 30 s."),
}
"""By field."""
NEW: Final = {"rpo_threshold_seconds": 900.0, "point_interval_seconds": 300.0}


def _terms(command: Command) -> Command:
    for field, (flag, text) in reversed(OPTIONS.items()):
        command = click.option(flag, field, metavar="DURATION", help=text)(command)
    return command


@click.group("policies")
def policies_group() -> None:
    """Replication policies: what machines are protected for, and how often points are made."""


@policies_group.command("create")
@click.argument("name")
@_terms
@server_options
def create(loaded: Loaded[FarpointSettings], name: str, **terms: str | None) -> ExitCode:
    """Make a policy. NAME: 1 to 63 letters, digits and hyphens."""
    content = _content(NEW | {"name": name}, terms)

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            made = await operator.create_policy(content)
        notice(f"replication policy {made.content.name} ({made.policy})")

    return run_interruptible(work)


@policies_group.command("list")
@output_option
@server_options
def list_policies(loaded: Loaded[FarpointSettings], output: Output) -> ExitCode:
    """All policies, in seconds, and how many machines go by them."""

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            listed = await operator.policies()
        output.rows(
            [
                one.content.model_dump()
                | {
                    "machines": len(one.machines),
                    "version": one.version,
                    "changed": instant_text(one.changed_at_ns),
                    "policy": one.policy,
                }
                for one in listed.policies
            ]
        )

    return run_interruptible(work)


@policies_group.command("edit")
@click.argument("name")
@click.option("--name", "new_name", help="A new name.")
@_terms
@server_options
def edit(loaded: Loaded[FarpointSettings], name: str, new_name: str | None, **terms: str | None) -> ExitCode:
    """Change what is given and leave the rest; all machines of the policy are told at once."""
    if new_name is None and not any(text is not None for text in terms.values()):
        raise click.UsageError("say what to change")

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            before = await find_policy(operator, name)
            content = _content(
                before.content.model_dump() | {"name": before.content.name if new_name is None else new_name}, terms
            )
            edited = await operator.edit_policy(before.policy, content, version=before.version)
        notice(f"replication policy {edited.content.name}: version {edited.version}, {len(edited.machines)} machines")

    return run_interruptible(work)


@policies_group.command("delete")
@click.argument("name")
@server_options
def delete(loaded: Loaded[FarpointSettings], name: str) -> ExitCode:
    """Delete a policy that no machine goes by."""

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            found = await find_policy(operator, name)
            await operator.delete_policy(found.policy, version=found.version)
        notice(f"replication policy {found.content.name} is deleted")

    return run_interruptible(work)


@click.command("set-policy")
@click.argument("machine")
@click.argument("policy", required=False)
@click.option("--none", "is_none", is_flag=True, help="No policy: the server's settings count.")
@server_options
def set_policy_command(loaded: Loaded[FarpointSettings], machine: str, policy: str | None, is_none: bool) -> ExitCode:
    """Let MACHINE (name or identifier) go by the replication policy POLICY from now on."""
    if is_none == (policy is not None):
        raise click.UsageError("give a POLICY, or --none")

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            found = await _find_machine(operator, machine)
            chosen = None if policy is None else (await find_policy(operator, policy)).policy
            await operator.set_policy(found.machine, chosen)
        notice(f"machine {found.name} goes by {policy or 'the settings of the server'}")

    return run_interruptible(work)


@click.command("release")
@click.argument("machine")
@server_options
def release_command(loaded: Loaded[FarpointSettings], machine: str) -> ExitCode:
    """End the quarantine of MACHINE (name or identifier), when the copy of its agent is stopped and its state removed.
    Whoever reports first is taken for the machine."""

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            found = await _find_machine(operator, machine)
            await operator.release_machine(found.machine)
        notice(f"machine {found.name} is {'released' if found.is_quarantined else 'not in quarantine'}")

    return run_interruptible(work)


async def find_policy(operator: OperatorClient, name: str) -> PolicyStatus:
    """By its name or identifier. Raises ResourceNotFound."""
    policies = (await operator.policies()).policies
    found = [one for one in policies if one.policy == name] or [one for one in policies if one.content.name == name]
    if not found:
        raise ResourceNotFound(what="replication policy", identifier=name)
    return found[0]


async def _find_machine(operator: OperatorClient, name: str) -> MachineStatus:
    """Raises ResourceNotFound, click.UsageError."""
    machines = (await operator.machines()).machines
    found = [one for one in machines if one.machine == name] or [one for one in machines if one.name == name]
    if not found:
        raise ResourceNotFound(what="machine", identifier=name)
    if len(found) > 1:
        raise click.UsageError(f"{len(found)} machines are called {name}; give one's identifier")
    return found[0]


def _content(values: dict[str, Any], terms: dict[str, str | None]) -> ReplicationPolicy:
    """Raises click.UsageError."""
    try:
        given = {field: parse_seconds(text) for field, text in terms.items() if text is not None}
        return ReplicationPolicy.model_validate(values | given)
    except ValidationError as error:
        reason = reason_of(error).removeprefix("it: ").replace("Value error, ", "")
        for field, (flag, _) in OPTIONS.items():
            reason = reason.replace(field, flag)
        raise click.UsageError(reason) from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error
