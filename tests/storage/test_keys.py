"""Who holds a recovery key of the vault opens it; nobody else does, and nothing altered is believed."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocol.errors import InvalidValue
from protocol.signed_records import authority_fingerprint
from protocol.vocabulary import VaultId
from storage.errors import FormatNotSupported, NotAVault, ObjectCorrupt, WrongRecoveryKey
from storage.keys import (
    ARGON2_MEMORY_KIB_MAX,
    RecoveryKey,
    create_vault,
    parse_recovery_key,
    parse_vault,
    recovery_key_needs_passphrase,
    serialise_recovery_key,
    unwrap_data_key,
    unwrap_vault_key,
    wrap_data_key,
)
from tests.storage.segment_writer import DISK, MACHINE, OTHER_DISK, VAULT, new_vault

URL = "memory://test"
PLACE: dict[str, Any] = {"vault": VAULT, "machine": MACHINE, "disk": DISK, "epoch": 1, "ordinal": 1}


def test_every_recovery_key_opens_the_vault() -> None:
    vault = new_vault()
    opened = [unwrap_vault_key(vault.description, key, url=URL) for key in vault.recovery_keys]
    assert len(opened) == 2
    assert {key.public_key().public_bytes_raw() for key in opened} == {vault.description.vault_key}


def test_a_vault_comes_back_as_it_was_written() -> None:
    vault = new_vault()
    assert parse_vault(vault.vault_json, name="vault.json") == vault.description
    assert vault.description.authority_fingerprint == authority_fingerprint(vault.authority.public_key)
    assert [key.fingerprint for key in vault.description.recovery_keys] == [
        key.fingerprint for key in vault.recovery_keys
    ]


def test_a_vault_with_any_byte_altered_or_cut_is_refused() -> None:
    data = new_vault().vault_json
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1
        for wrong in (bytes(altered), data[:place], data + b" "):
            with pytest.raises((ObjectCorrupt, FormatNotSupported)):
                parse_vault(wrong, name="vault.json")


def test_a_vault_of_a_later_format_is_told_apart() -> None:
    fields = json.loads(new_vault().vault_json)
    with pytest.raises(FormatNotSupported) as caught:
        parse_vault(json.dumps({**fields, "version": 2}).encode(), name="vault.json")
    assert caught.value.fields["version"] == 2


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"[" * 60000, b"\xff", bytes(70000)])
def test_what_is_no_vault_description_is_refused(data: bytes) -> None:
    with pytest.raises(ObjectCorrupt):
        parse_vault(data, name="vault.json")


def test_a_key_of_another_vault_is_told_so() -> None:
    vault = new_vault()
    other = create_vault(vault=VaultId("f0" * 16), created_ns=1, recovery_labels=("one",))
    with pytest.raises(NotAVault, match="the key is for"):
        unwrap_vault_key(vault.description, other.recovery_keys[0], url=URL)


def test_a_vault_that_another_authority_signed_is_not_the_keys_vault() -> None:
    impostor = create_vault(vault=VAULT, created_ns=1, recovery_labels=("one",))
    with pytest.raises(NotAVault, match="another authority"):
        unwrap_vault_key(impostor.description, new_vault().recovery_keys[0], url=URL)


def test_a_key_that_the_vault_is_not_wrapped_to_is_wrong() -> None:
    vault = new_vault()
    stranger = RecoveryKey(
        vault=VAULT,
        label="stranger",
        authority_fingerprint=vault.description.authority_fingerprint,
        private_key=X25519PrivateKey.generate(),
        path="/keys/stranger",
    )
    with pytest.raises(WrongRecoveryKey, match="/keys/stranger"):
        unwrap_vault_key(vault.description, stranger, url=URL)


def test_a_recovery_key_file_comes_back_without_a_passphrase() -> None:
    key = new_vault().recovery_keys[0]
    data = serialise_recovery_key(key, passphrase=None)
    parsed = parse_recovery_key(data, path="first.key", passphrase=None)
    assert not recovery_key_needs_passphrase(data)
    assert (parsed.vault, parsed.label, parsed.authority_fingerprint) == (VAULT, "first", key.authority_fingerprint)
    assert unwrap_vault_key(new_vault().description, parsed, url=URL)


def test_a_recovery_key_file_with_a_passphrase_opens_with_it_alone() -> None:
    key = new_vault().recovery_keys[1]
    data = serialise_recovery_key(key, passphrase="correct horse")
    assert recovery_key_needs_passphrase(data)
    assert key.private_key.private_bytes_raw() not in data
    assert unwrap_vault_key(
        new_vault().description, parse_recovery_key(data, path="k", passphrase="correct horse"), url=URL
    )
    with pytest.raises(WrongRecoveryKey, match="passphrase is wrong"):
        parse_recovery_key(data, path="k", passphrase="Correct horse")
    with pytest.raises(WrongRecoveryKey, match="needs its passphrase"):
        parse_recovery_key(data, path="k", passphrase=None)


def test_a_passphrase_is_the_same_however_its_letters_are_composed() -> None:
    data = serialise_recovery_key(new_vault().recovery_keys[0], passphrase="Zu\u0308rich")
    assert parse_recovery_key(data, path="k", passphrase="Z\u00fcrich").label == "first"


def test_what_a_passphrase_protects_cannot_be_pointed_at_another_authority() -> None:
    fields = json.loads(serialise_recovery_key(new_vault().recovery_keys[0], passphrase="p"))
    fields["authority_fingerprint"] = "0" * 64
    with pytest.raises(WrongRecoveryKey):
        parse_recovery_key(json.dumps(fields).encode(), path="k", passphrase="p")


def test_a_key_file_cannot_ask_for_boundless_memory() -> None:
    fields = json.loads(serialise_recovery_key(new_vault().recovery_keys[0], passphrase="p"))
    fields["key_derivation"]["memory_kib"] = ARGON2_MEMORY_KIB_MAX + 1
    with pytest.raises(WrongRecoveryKey, match="memory_kib"):
        parse_recovery_key(json.dumps(fields).encode(), path="k", passphrase="p")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"vault": "x"},
        {"vault": None},
        {"label": ""},
        {"authority_fingerprint": "x"},
        {"private_key": "AA=="},
        {"private_key": 5},
    ],
    ids=str,
)
def test_a_damaged_recovery_key_file_is_told_so(change: dict[str, Any]) -> None:
    fields = json.loads(serialise_recovery_key(new_vault().recovery_keys[0], passphrase=None))
    with pytest.raises(WrongRecoveryKey):
        parse_recovery_key(json.dumps({**fields, **change}).encode(), path="k", passphrase=None)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"-----BEGIN PRIVATE KEY-----", bytes(10000)])
def test_what_is_no_recovery_key_file_is_told_so(data: bytes) -> None:
    with pytest.raises(WrongRecoveryKey):
        parse_recovery_key(data, path="k", passphrase=None)


def test_a_recovery_key_file_of_a_later_version_is_told_apart() -> None:
    fields = json.loads(serialise_recovery_key(new_vault().recovery_keys[0], passphrase=None))
    with pytest.raises(FormatNotSupported):
        parse_recovery_key(json.dumps({**fields, "version": 2}).encode(), path="k", passphrase=None)


@pytest.mark.parametrize(
    "change",
    [{"vault": "f0" * 16}, {"machine": "f0" * 16}, {"disk": OTHER_DISK}, {"epoch": 2}, {"ordinal": 2}],
    ids=str,
)
def test_a_data_key_opens_for_its_own_segment_only(change: dict[str, Any]) -> None:
    vault = new_vault()
    private_key = unwrap_vault_key(vault.description, vault.recovery_keys[0], url=URL)
    data_key = os.urandom(32)
    wrapped = wrap_data_key(data_key, vault.description.vault_public_key, **PLACE)
    assert unwrap_data_key(wrapped, private_key, name="s", **PLACE) == data_key
    with pytest.raises(ObjectCorrupt):
        unwrap_data_key(wrapped, private_key, name="s", **{**PLACE, **change})
    with pytest.raises(ObjectCorrupt):
        unwrap_data_key(wrapped, X25519PrivateKey.generate(), name="s", **PLACE)


def test_a_vault_needs_a_recovery_key() -> None:
    with pytest.raises(InvalidValue):
        create_vault(vault=VAULT, created_ns=1, recovery_labels=())


def test_no_secret_shows_in_a_representation() -> None:
    vault = new_vault()
    assert "X25519PrivateKey" not in repr(vault)
    assert "Ed25519PrivateKey" not in repr(vault)
