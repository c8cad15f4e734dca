"""`farpoint audit list | verify`: what was changed by whom, and whether the log of it is what was written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import click
from pydantic import Field

from farpoint.options import server_options
from farpoint.running import run_interruptible
from farpoint.server_connection import operator_of
from farpoint.settings import FarpointSettings
from protocol.audit_chain import ChainEnd, follow_chain
from protocol.control import ControlMessage, Vault
from protocol.control_errors import AuditChainBroken
from protocol.errors import MalformedInput
from protocol.operator_messages import AuditEntry
from protocol.transport.operator_client import OperatorClient
from protocol.vocabulary import VaultId
from recovery.core.instants import instant_text
from runtime.command_line import output_option
from runtime.exit_codes import ExitCode
from runtime.local_directory import LocalDirectory
from runtime.output import Output
from runtime.settings import Loaded

COLUMNS = {
    "number": "number",
    "at": "at",
    "actor_name": "by",
    "actor_kind": "as",
    "action": "action",
    "subject": "subject",
    "details": "details",
}


class _Kept(ControlMessage):
    """What --remember keeps."""

    vault: Vault
    number: Annotated[int, Field(ge=0)]
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@click.group("audit")
def audit_group() -> None:
    """The audit log: every change that somebody asked for."""


@audit_group.command("list")
@click.option("--after", type=click.IntRange(min=0), default=0, help="Only entries with higher numbers.")
@output_option
@server_options
def list_entries(loaded: Loaded[FarpointSettings], output: Output, after: int) -> ExitCode:
    """The entries, oldest first."""

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            entries = [entry async for page in _pages(operator, after) for entry in page]
        output.rows([_row(entry, output) for entry in entries], columns=COLUMNS)

    return run_interruptible(work)


@audit_group.command("verify")
@click.option(
    "--remember",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keeps here how far the log went, and says if any of that is gone the next time. Keep it off the server.",
)
@output_option
@server_options
def verify(loaded: Loaded[FarpointSettings], output: Output, path: Path | None) -> ExitCode:
    """Whether no entry was changed, left out or put in; with --remember, also whether none is gone from the end."""

    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no directory {path.parent}", param_hint="--remember")

    async def work() -> None:
        async with operator_of(loaded.settings) as operator:
            vault = (await operator.describe()).vault
            remembered = None if path is None else _read(path, vault)
            end = await _follow(operator, ChainEnd.beginning(vault), remembered)
        if path is not None:
            kept = _Kept(vault=vault, number=end.number, hash=end.hash)
            LocalDirectory(path.absolute().parent).replace(path.name, kept.model_dump_json().encode() + b"\n")
        known = None if remembered is None else remembered.number
        output.record({"entries": end.number, "hash": end.hash, "is_whole": True, "remembered_entries": known})

    return run_interruptible(work)


def _row(entry: AuditEntry, output: Output) -> dict[str, object]:
    row = entry.model_dump(mode="json") | {"at": instant_text(entry.at_ns)}
    if output.format == "table":
        row["details"] = ", ".join(f"{name}: {value}" for name, value in sorted(entry.details.items()))
    return row


async def _follow(operator: OperatorClient, end: ChainEnd, remembered: ChainEnd | None) -> ChainEnd:
    """Raises AuditChainBroken."""
    async for page in _pages(operator, 0):
        for entry in page:
            end = follow_chain(end, [entry])
            if remembered is not None and end.number == remembered.number and end.hash != remembered.hash:
                raise AuditChainBroken(number=end.number, reason="it was another one when it was last verified")
    if remembered is not None and end.number < remembered.number:
        raise AuditChainBroken(
            number=end.number + 1, reason=f"there were {remembered.number} entries when it was last verified"
        )
    return end


async def _pages(operator: OperatorClient, after: int) -> AsyncIterator[tuple[AuditEntry, ...]]:
    while entries := (await operator.audit_page(after=after)).entries:
        yield entries
        after = entries[-1].number


def _read(path: Path, vault: VaultId) -> ChainEnd | None:
    """None without a file. Raises MalformedInput."""
    try:
        kept = _Kept.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise MalformedInput(what=str(path), reason="it is not what `farpoint audit verify` keeps") from error
    if kept.vault != vault:
        raise MalformedInput(what=str(path), reason="it is about another vault's log")
    return ChainEnd(number=kept.number, hash=kept.hash)
