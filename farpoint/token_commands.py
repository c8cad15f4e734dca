"""`farpoint token create`: one join token, expiring, single use."""

from __future__ import annotations

from pathlib import Path

import click

from farpoint.options import server_options
from farpoint.running import run_interruptible
from farpoint.server_connection import operator_of
from farpoint.settings import FarpointSettings
from protocol.operator_messages import JOIN_TOKEN_SECONDS_DEFAULT, JoinTokenRequest
from protocol.vocabulary import Role
from recovery.core.instants import instant_text
from runtime.exit_codes import ExitCode
from runtime.output import notice
from runtime.secrets import refuse_existing, write_secret
from runtime.settings import Loaded
from runtime.units import parse_seconds

ROLES = {role.value: role for role in (Role.AGENT, Role.PROCESS_SERVER, Role.RECOVERY_WORKER)}


@click.group("token")
def token_group() -> None:
    """Join tokens for newcomers."""


@token_group.command("create")
@click.option("--role", type=click.Choice(list(ROLES)), required=True)
@click.option("--expires-in", default=f"{JOIN_TOKEN_SECONDS_DEFAULT} s", show_default=True, help="10 min, 1 h, 2 d.")
@click.option("--output", "path", type=click.Path(path_type=Path), help="Written 0600, never over a file; else stdout.")
@server_options
def create(loaded: Loaded[FarpointSettings], role: str, expires_in: str, path: Path | None) -> ExitCode:
    """Make one join token; this is the only time that it is shown."""
    try:
        request = JoinTokenRequest.model_validate(
            {"role": ROLES[role], "lifetime_seconds": round(parse_seconds(expires_in))}
        )
    except ValueError as error:
        raise click.BadParameter("give 1 s to 7 d, such as `10 min`", param_hint="--expires-in") from error
    refuse_existing(path)

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            created = await operator.create_token(request)
        if path is None:
            click.echo(created.token)
        else:
            write_secret(path, created.token.encode() + b"\n")
        notice(f"good for one {role} until {instant_text(created.expires_at_ns)}")

    return run_interruptible(work)
