"""`farpoint vault init` and `farpoint vault check-key`.

A vault's keys are written before the vault, each file once and 0600; should anything fail, what this command wrote is
removed again, so that no key is left that opens nothing.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Final

import click

from farpoint.errors import OptionMissing, TooFewRecoveryKeys
from farpoint.key_files import read_passphrase
from farpoint.options import vault_options
from farpoint.running import run_interruptible
from farpoint.settings import FarpointSettings
from farpoint.vault_connection import vault_of
from protocol.signed_records import serialise_authority_key
from protocol.vocabulary import VaultId
from runtime.command_line import output_option
from runtime.exit_codes import ExitCode
from runtime.output import Output, notice
from runtime.secrets import write_secret
from runtime.settings import Loaded
from storage.backends.object_store import ObjectStore
from storage.backends.open_store import open_store
from storage.disk_archive import create_vault_object
from storage.keys import NewVault, create_vault, serialise_recovery_key

PATH = click.Path(path_type=Path)
KEEP_KEYS: Final = (
    "Keep the recovery keys in separate safe places: one of them and the store recover everything; without one, "
    "nothing can.\nThe authority key goes to the configuration server and nowhere else."
)


@click.group("vault")
def vault_group() -> None:
    """Make a vault, and check its recovery keys."""


@vault_group.command("init")
@click.option("--store", required=True, metavar="URL", help="file:///DIRECTORY or azure://ACCOUNT/CONTAINER/PREFIX.")
@click.option("--store-credentials-file", type=PATH, help="For azure; else the usual Azure environment counts.")
@click.option("--recovery-key", "key_paths", type=PATH, multiple=True, required=True, help="Written; give it twice.")
@click.option("--authority-key", type=PATH, help="Written, for `config-server init`; vault-authority.key by default.")
@click.option("--passphrase-file", type=PATH, help="Its first line protects the recovery key files.")
@click.option("--single-recovery-key", is_flag=True, help="Accept that losing one file loses everything.")
@output_option
def init(
    output: Output,
    store: str,
    store_credentials_file: Path | None,
    key_paths: tuple[Path, ...],
    authority_key: Path | None,
    passphrase_file: Path | None,
    single_recovery_key: bool,
) -> ExitCode:
    """Make a new vault: its keys in files, its description in the store. Nothing is ever overwritten."""
    if len(set(key_paths)) < 2 and not single_recovery_key:
        raise TooFewRecoveryKeys(count=len(set(key_paths)))
    passphrase = None if passphrase_file is None else read_passphrase(passphrase_file)
    authority_path = authority_key or key_paths[0].parent / "vault-authority.key"

    async def work() -> None:
        opened = open_store(store, credentials_file=store_credentials_file, create=True)
        try:
            made = await make_vault(opened, key_paths, authority_path, passphrase=passphrase)
        finally:
            await opened.close()
        output.record(
            {
                "vault": made.description.vault,
                "store": opened.url,
                "recovery_keys": [str(path) for path in key_paths],
                "authority_key": str(authority_path),
                "authority_fingerprint": made.description.authority_fingerprint,
            }
        )

        notice(KEEP_KEYS)

    return run_interruptible(work)


async def make_vault(
    store: ObjectStore, key_paths: tuple[Path, ...], authority_path: Path, *, passphrase: str | None
) -> NewVault:
    """Writes the key files, then vault.json; all durable on return, and nothing left of it on failure.

    Raises SecretExists (nothing was changed), SecretUnreadable, StoreFault.
    """
    labels = tuple(path.stem for path in key_paths)
    made = create_vault(vault=VaultId(secrets.token_hex(16)), created_ns=time.time_ns(), recovery_labels=labels)
    texts = [serialise_recovery_key(key, passphrase=passphrase) for key in made.recovery_keys]
    written: list[Path] = []
    try:
        for path, text in [
            *zip(key_paths, texts, strict=True),
            (authority_path, serialise_authority_key(made.authority)),
        ]:
            write_secret(path, text)
            written.append(path)
        await create_vault_object(store, made.description.vault, made.vault_json)
    except BaseException:
        for path in written:
            path.unlink()
        raise
    return made


@vault_group.command("check-key")
@output_option
@vault_options
def check_key(loaded: Loaded[FarpointSettings], output: Output) -> ExitCode:
    """Prove that a recovery key opens its vault in the store."""
    settings = loaded.settings
    if settings.recovery_key is None:
        raise OptionMissing(option="--recovery-key", purpose="the recovery key file to check")

    async def work() -> None:
        async with vault_of(settings) as vault:
            description = await vault.archive.read_vault()
            output.record(
                {
                    "vault": description.vault,
                    "recovery_key": str(settings.recovery_key),
                    "opens": True,
                    "recovery_keys": [key.label for key in description.recovery_keys],
                    "authority_fingerprint": description.authority_fingerprint,
                }
            )

    return run_interruptible(work)
