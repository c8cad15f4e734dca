"""What a command prints: data as a table or as JSON on stdout, everything else on stderr.

Invariant: with `-o json` stdout holds nothing but one JSON document (or, for progress, one JSON object a line).
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final, Literal

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

OutputFormat = Literal["table", "json"]
_WIDTH_WITHOUT_TERMINAL: Final = 10_000
UNPRINTABLE: Final = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Prints data in the format that `-o` asks for."""

    format: OutputFormat

    def rows(self, records: Sequence[Mapping[str, object]], *, columns: Mapping[str, str] | None = None) -> None:
        """Prints records one below the other; as JSON, an array of whole records.

        columns: which keys the table shows, in which order, and under which heading; all of the first record's by
        default.
        """
        if self.format == "json":
            print_json(list(records))
            return
        columns = columns or {key: key.replace("_", " ") for key in (records[0] if records else {})}
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in columns.values():
            table.add_column(heading, overflow="fold")
        for record in records:
            table.add_row(*(Text(cell_text(record.get(key))) for key in columns))
        _console().print(table)

    def record(self, record: Mapping[str, object], *, headings: Mapping[str, str] | None = None) -> None:
        """Prints one record; as a table, a line for each of its keys (those in `headings` only, if given)."""
        if self.format == "json":
            print_json(record)
            return
        headings = headings or {key: key.replace("_", " ") for key in record}
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for key, heading in headings.items():
            table.add_row(heading, Text(cell_text(record.get(key))))
        _console().print(table)


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Prints one JSON document to stdout; `indent=None` makes it one line, for streams of them."""
    click.echo(json.dumps(value, indent=indent, default=json_value, ensure_ascii=False))


def notice(text: str) -> None:
    """Tells the operator something that is not data, on stderr. Lines stay lines; nothing else moves the terminal."""
    click.echo("\n".join(printable(line) for line in text.split("\n")), err=True)


def printable(text: str) -> str:
    """The text for a terminal. Names and paths are chosen by machines that may be hostile: no escape sequence of theirs
    reaches it."""
    return "".join(character if character.isprintable() else UNPRINTABLE for character in text)


def json_value(value: object) -> Any:
    """What json.dumps cannot print itself: values of ours, instants, paths. Raises TypeError for anything else, bytes
    too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"no JSON form for {type(value).__name__}")


def cell_text(value: object) -> str:
    """How a value reads in a table cell."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, datetime.datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(cell_text(member) for member in value)
    return printable(str(value))


def _console() -> Console:
    # why: without a terminal rich assumes 80 columns and folds identifiers, which breaks `grep`
    width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    return Console(file=sys.stdout, width=width, highlight=False)
