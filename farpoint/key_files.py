"""Reads recovery key files, asking for a passphrase where one is needed and a terminal is there."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from farpoint.errors import PassphraseEmpty, PassphraseMissing
from runtime.secrets import read_secret
from storage.keys import RecoveryKey, parse_recovery_key, recovery_key_needs_passphrase


def read_passphrase(path: Path) -> str:
    """The first line of a passphrase file. Raises SecretMissing, SecretUnreadable, PassphraseEmpty."""
    first_line = read_secret(path).decode("utf-8", "surrogateescape").partition("\n")[0].rstrip("\r")
    if not first_line:
        raise PassphraseEmpty(path=path)
    return first_line


def read_recovery_key(path: Path, *, passphrase_file: Path | None) -> RecoveryKey:
    """Raises WrongRecoveryKey, PassphraseMissing, SecretMissing, SecretUnreadable."""
    data = read_secret(path)
    passphrase = None
    if recovery_key_needs_passphrase(data):
        if passphrase_file is not None:
            passphrase = read_passphrase(passphrase_file)
        elif sys.stdin.isatty():
            passphrase = click.prompt(f"Passphrase of {path}", hide_input=True, err=True)
        else:
            raise PassphraseMissing(path=path)
    return parse_recovery_key(data, path=str(path), passphrase=passphrase)
