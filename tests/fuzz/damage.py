"""Small files of every format, each damaged by every single bit and cut at every length: what may come of them.

A check returns normally if the damage was told, or if it changes nothing that the file says; it fails if something
else is taken from the file than what was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from mobility_agent.core.ledger import LedgerContents, replay
from mobility_agent.errors import AgentStateDamaged
from process_server.errors import CacheDamaged, CacheFormatNotSupported
from protocol.errors import InvalidValue, MalformedInput, VersionNotSupported
from protocol.signed_records import SignatureInvalid, verify_grant
from storage.errors import FormatNotSupported, NotAVault, ObjectCorrupt, WrongRecoveryKey
from storage.keys import parse_recovery_key, parse_vault, unwrap_vault_key
from tests.fuzz import agent_targets, cache_files, vault_targets
from tests.fuzz.vault_targets import CLOSING_NAME, DATA_NAME, vector
from tests.vectors.make_segment import AUTHORITY, DESCRIBED_VAULT, RECOVERY, VAULT_KEY


@dataclass(frozen=True, slots=True, kw_only=True)
class Damageable:
    """One sound file, and what its reader may make of it once it is damaged."""

    name: str
    data: Callable[[], bytes]
    check: Callable[[bytes], None]

    def every_bit(self) -> Iterator[tuple[str, bytes]]:
        """Each (description, data with one bit flipped)."""
        data = bytearray(self.data())
        for place in range(8 * len(data)):
            data[place // 8] ^= 1 << place % 8
            yield f"bit {place}", bytes(data)
            data[place // 8] ^= 1 << place % 8

    def every_length(self) -> Iterator[tuple[str, bytes]]:
        """Each (description, data cut at that length)."""
        data = self.data()
        for length in range(len(data)):
            yield f"length {length}", data[:length]


class UndetectedError(Exception):
    """Something else was read than what was written, and nothing told of it."""


def refused(read: Callable[[bytes], object], *refusals: type[Exception]) -> Callable[[bytes], None]:
    """Every damage is refused."""

    def check(data: bytes) -> None:
        try:
            found = read(data)
        except refusals:
            return
        raise UndetectedError(f"read as {found!r}")

    return check


def _recovery_key(data: bytes) -> None:
    """Of a file without a passphrase nothing but its label may change: the vault tells everything else."""
    try:
        key = parse_recovery_key(data, path="p", passphrase=None)
        opened = unwrap_vault_key(DESCRIBED_VAULT, key, url="u")
    except (WrongRecoveryKey, FormatNotSupported, NotAVault):
        return
    if opened.private_bytes_raw() != VAULT_KEY.private_bytes_raw() or key.vault != RECOVERY.vault:
        raise UndetectedError("it opens another vault")


def _sealed_recovery_key(data: bytes) -> None:
    """All of it is bound but the blanks between its fields. A file that asks for much work is left out: the salt and
    the rest of the derivation are bound like everything else.
    """
    try:
        derivation = json.loads(data)["key_derivation"]
        is_light = derivation["memory_kib"] <= 64 and derivation["iterations"] <= 2 and derivation["lanes"] <= 1
    except (ValueError, TypeError, KeyError):
        is_light = True
    if not is_light:
        return
    try:
        key = parse_recovery_key(data, path="p", passphrase=vault_targets.PASSPHRASE)
    except (WrongRecoveryKey, FormatNotSupported):
        return
    if (key.vault, key.label, key.fingerprint) != (RECOVERY.vault, RECOVERY.label, RECOVERY.fingerprint):
        raise UndetectedError("it was read as another key")


def _cache_file(name: str) -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        try:
            cache_files.check_taken({**cache_files.cache_bytes(), name: data})
        except (CacheFormatNotSupported, CacheDamaged):
            return
        except AssertionError as error:
            raise UndetectedError(f"taken for acknowledged: {error}") from error

    return check


def _ledger(data: bytes) -> None:
    """What is read was written, and if entries are missing they are those of the end, or the file says so."""
    try:
        contents = replay(data)
    except InvalidValue:
        return
    if not contents.is_damaged and _read(contents) not in _ledger_states():
        raise UndetectedError(f"replayed as {contents}")


def _read(contents: LedgerContents) -> object:
    extents = [(record.first_sequence, record.last_sequence, list(record.extents)) for record in contents.records]
    return contents.epoch, contents.sent_sequence, contents.acknowledged_sequence, extents


def _ledger_states() -> list[object]:
    """After each entry but the newest ones: an entry that is lost in the middle has whole ones behind it."""
    entries = agent_targets.ledger_entries()
    return [_read(replay(b"".join(entries[:count]))) for count in range(1, len(entries) + 1)]


def _digest_file(data: bytes) -> None:
    """Each block's entry is what was written, or it is unknown, and then sent again."""
    try:
        found = agent_targets.read_digests(data)
    except AgentStateDamaged:
        return
    sound = agent_targets.read_digests(agent_targets.digest_bytes())
    for (digest, sequence), (known, at) in zip(found, sound, strict=True):
        if digest is not None and (digest, sequence) != (known, at):
            raise UndetectedError(f"{digest.hex()} in change set {sequence}")


_SEGMENT: Final = (ObjectCorrupt, FormatNotSupported)

DAMAGEABLE: Final = (
    Damageable(
        name="data.seg",
        data=lambda: vector("data.seg"),
        check=refused(lambda data: vault_targets.read_segment(data, DATA_NAME), *_SEGMENT),
    ),
    Damageable(
        name="closing.seg",
        data=lambda: vector("closing.seg"),
        check=refused(lambda data: vault_targets.read_segment(data, CLOSING_NAME), *_SEGMENT),
    ),
    Damageable(
        name="vault.json",
        data=lambda: vector("vault.json"),
        check=refused(
            lambda data: unwrap_vault_key(parse_vault(data, name="n"), RECOVERY, url="u"),
            *_SEGMENT,
            NotAVault,
            WrongRecoveryKey,
        ),
    ),
    Damageable(name="recovery key", data=lambda: vector("recovery-key.json"), check=_recovery_key),
    Damageable(
        name="recovery key with a passphrase", data=vault_targets.light_recovery_key, check=_sealed_recovery_key
    ),
    Damageable(
        name="grant",
        data=lambda: vector("grant.bin"),
        check=refused(
            lambda data: verify_grant(data, AUTHORITY.public_key()),
            SignatureInvalid,
            MalformedInput,
            VersionNotSupported,
        ),
    ),
    Damageable(name="ledger", data=lambda: b"".join(agent_targets.ledger_entries()), check=_ledger),
    Damageable(name="digest file", data=agent_targets.digest_bytes, check=_digest_file),
    *(
        Damageable(
            name=f"cache file {number}",
            data=lambda name=name: cache_files.cache_bytes()[name],  # type: ignore[misc]
            check=_cache_file(name),
        )
        for number, name in enumerate(sorted(cache_files.cache_bytes()))
    ),
)
