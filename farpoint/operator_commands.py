"""`farpoint operators create | list | revoke`: who may use the configuration server as a person, and as what."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import ValidationError

from farpoint.options import server_options
from farpoint.running import run_interruptible
from farpoint.server_connection import operator_of
from farpoint.settings import FarpointSettings
from protocol.control import reason_of
from protocol.control_errors import ResourceNotFound
from protocol.operator_messages import OPERATOR_TOKEN_SECONDS_DEFAULT, OperatorRole, OperatorTokenRequest
from recovery.core.instants import instant_text
from runtime.command_line import output_option
from runtime.exit_codes import ExitCode
from runtime.output import Output, notice
from runtime.secrets import refuse_existing, write_secret
from runtime.settings import Loaded
from runtime.units import parse_seconds

ROLES = {role.value: role for role in OperatorRole}


@click.group("operators")
def operators_group() -> None:
    """Tokens of people and programs that use the configuration server."""


@operators_group.command("create")
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(list(ROLES)),
    required=True,
    help="viewer: see; operator: change what is protected; recovery: see and recover; auditor: see all, the log too.",
)
@click.option(
    "--expires-in",
    default=f"{OPERATOR_TOKEN_SECONDS_DEFAULT // 86400} d",
    show_default=True,
    help="12 h, 30 d; 366 d at most.",
)
@click.option("--output", "path", type=click.Path(path_type=Path), help="Written 0600, never over a file; else stdout.")
@server_options
def create(loaded: Loaded[FarpointSettings], name: str, role: str, expires_in: str, path: Path | None) -> ExitCode:
    """Make a token for NAME, as the audit log will call its holder. Needs the admin token; shown this once."""
    try:
        seconds = round(parse_seconds(expires_in))
        request = OperatorTokenRequest.model_validate({"name": name, "role": ROLES[role], "lifetime_seconds": seconds})
    except ValidationError as error:
        raise click.UsageError(reason_of(error)) from error
    except ValueError as error:
        raise click.BadParameter("give 1 s to 366 d, such as `90 d`", param_hint="--expires-in") from error
    refuse_existing(path)

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            created = await operator.create_operator_token(request)
        if path is None:
            click.echo(created.secret_token)
        else:
            write_secret(path, created.secret_token.encode() + b"\n")
        notice(f"operator token {created.token}: {role} until {instant_text(created.expires_at_ns)}")

    return run_interruptible(work)


@operators_group.command("list")
@output_option
@server_options
def list_tokens(loaded: Loaded[FarpointSettings], output: Output) -> ExitCode:
    """All tokens that were ever made, without their secrets; newest first."""

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            listed = await operator.operator_tokens()
        output.rows(
            [
                {
                    "token": one.token,
                    "name": one.name,
                    "role": one.role,
                    "state": _state(is_revoked=one.is_revoked, is_expired=one.expires_at_ns <= listed.now_ns),
                    "created": instant_text(one.created_at_ns),
                    "expires": instant_text(one.expires_at_ns),
                    "used": None if one.used_at_ns is None else instant_text(one.used_at_ns),
                }
                for one in listed.tokens
            ]
        )

    return run_interruptible(work)


@operators_group.command("revoke")
@click.argument("token")
@server_options
def revoke(loaded: Loaded[FarpointSettings], token: str) -> ExitCode:
    """Let a token count no more, from the next request on. TOKEN: its identifier, or its holder's name if that has only
    one that is valid."""

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            listed = await operator.operator_tokens()
            named = [one for one in listed.tokens if one.name == token and not one.is_revoked]
            found = [one for one in listed.tokens if one.token == token] or [
                one for one in named if one.expires_at_ns > listed.now_ns
            ]
            if not found:
                raise ResourceNotFound(what="operator token", identifier=token)
            if len(found) > 1:
                raise click.UsageError(f"{token} has {len(found)} tokens; give the identifier of one")
            await operator.revoke_operator_token(found[0].token)
        notice(f"operator token {found[0].token} of {found[0].name} is revoked")

    return run_interruptible(work)


def _state(*, is_revoked: bool, is_expired: bool) -> str:
    if is_revoked:
        return "revoked"
    return "expired" if is_expired else "valid"
