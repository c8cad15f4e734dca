"""The options that several commands share, with the settings that they fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from farpoint.settings import PROGRAM, FarpointSettings
from runtime.command_line import with_settings

Command = TypeVar("Command", bound=Callable[..., Any])

PATH = click.Path()


def _options(command: Command, rows: dict[str, tuple[str, Any]]) -> Command:
    for flag, (text, kind) in reversed(rows.items()):
        command = click.option(flag, type=kind, metavar=None if kind is PATH else "URL", help=text)(command)
    return command


_VAULT = {
    "--store": ("The store that holds the vault.", str),
    "--store-credentials-file": ("For azure; else the usual Azure environment counts.", PATH),
    "--recovery-key": ("A recovery key file of the vault.", PATH),
    "--passphrase-file": ("Its first line is the recovery key's passphrase.", PATH),
}
_SERVER = {
    "--server": ("https://HOST:PORT of the configuration server.", str),
    "--ca": ("Its authority.pem.", PATH),
    "--token-file": ("An operator token, or the admin token that `config-server init` wrote.", PATH),
    "--dir": ("The directory of `farpoint up`, instead of the three above.", PATH),
}


def vault_options(command: Command) -> Command:
    """Store and recovery key; the command gets `loaded: Loaded[FarpointSettings]`."""
    return _with(command, _VAULT)


def server_options(command: Command) -> Command:
    """The configuration server; the command gets `loaded: Loaded[FarpointSettings]`."""
    return _with(command, _SERVER)


def vault_or_server_options(command: Command) -> Command:
    """Both; a recovery key means: from storage alone."""
    return _with(command, _VAULT | _SERVER)


def _with(command: Command, rows: dict[str, tuple[str, Any]]) -> Command:
    names = [flag.removeprefix("--").replace("-", "_") for flag in rows]
    return _options(with_settings(FarpointSettings, PROGRAM, flags={name: name for name in names})(command), rows)
