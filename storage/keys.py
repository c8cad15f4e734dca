"""The vault's keys: recovery key files, vault.json, and data keys wrapped to the vault (SEGMENT_FORMAT.md, "Keys").

The vault's private half exists only wrapped to recovery keys; a recovery key exists only in its file. All wrapping is
HPKE (X25519, HKDF-SHA256, AES-256-GCM). A reader trusts the authority fingerprint in its recovery key file and nothing
else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import unicodedata
from dataclasses import dataclass, field
from typing import Final, cast

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from protocol.errors import InvalidValue
from protocol.signed_records import INSTANT_NS_MAX, AuthorityKey, authority_fingerprint, check_key
from protocol.vocabulary import DiskId, MachineId, VaultId, check_identifier, check_range
from storage.errors import FormatNotSupported, NotAVault, ObjectCorrupt, WrongRecoveryKey

VAULT_VERSION: Final = 1
"""1: the first version."""
RECOVERY_KEY_VERSION: Final = 1
"""1: the first version."""

VAULT_BYTES_MAX: Final = 65536
RECOVERY_KEY_FILE_BYTES_MAX: Final = 8192
RECOVERY_KEYS_MAX: Final = 32
LABEL_LENGTH_MAX: Final = 255
DATA_KEY_BYTES: Final = 32

ARGON2_MEMORY_KIB: Final = 65536
ARGON2_ITERATIONS: Final = 3
ARGON2_LANES: Final = 4
ARGON2_MEMORY_KIB_MAX: Final = 2**20
ARGON2_ITERATIONS_MAX: Final = 16
ARGON2_LANES_MAX: Final = 16
"""A key file is input like any other: it cannot ask for more than this."""

_VAULT_FORMAT: Final = "farpoint-vault"
_RECOVERY_KEY_FORMAT: Final = "farpoint-recovery-key"
_VAULT_DOMAIN: Final = b"farpoint vault 1\0"
_VAULT_KEY_INFO: Final = b"farpoint vault key 1\0"
_DATA_KEY_INFO: Final = b"farpoint data key 1\0"
_RECOVERY_KEY_DOMAIN: Final = b"farpoint recovery key 1\0"
_SALT_BYTES: Final = 16
_NONCE_BYTES: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryKey:
    """What one recovery key file holds. path is where it was read, for messages."""

    vault: VaultId
    label: str
    authority_fingerprint: str
    private_key: X25519PrivateKey = field(repr=False)
    path: str = "-"

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")
        _check_label(self.label)
        if len(self.authority_fingerprint) != 64 or not set(self.authority_fingerprint) <= set("0123456789abcdef"):
            raise InvalidValue(what="authority_fingerprint", value="…", rule="must be 64 hexadecimal digits")

    @property
    def fingerprint(self) -> str:
        return recovery_key_fingerprint(self.private_key.public_key())


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedVaultKey:
    """The vault's private half, wrapped to one recovery key."""

    label: str
    recovery_key: bytes
    """The recovery key's raw public half."""
    wrapped: bytes

    @property
    def fingerprint(self) -> str:
        return recovery_key_fingerprint(X25519PublicKey.from_public_bytes(self.recovery_key))


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultDescription:
    """vault.json, verified against the authority key that it names: the reader must know that key otherwise."""

    vault: VaultId
    created_ns: int
    authority_key: bytes
    vault_key: bytes
    """The raw X25519 public key that data keys are wrapped to."""
    recovery_keys: tuple[WrappedVaultKey, ...]

    @property
    def authority(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self.authority_key)

    @property
    def authority_fingerprint(self) -> str:
        return authority_fingerprint(self.authority)

    @property
    def vault_public_key(self) -> X25519PublicKey:
        return X25519PublicKey.from_public_bytes(self.vault_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVault:
    """All that a vault begins with. Nothing of it is stored yet."""

    vault_json: bytes
    description: VaultDescription
    recovery_keys: tuple[RecoveryKey, ...]
    authority: AuthorityKey = field(repr=False)


def create_vault(*, vault: VaultId, created_ns: int, recovery_labels: tuple[str, ...]) -> NewVault:
    """New keys from the operating system's random source, one recovery key per label. Writes nothing.

    Afterwards the vault's private half is known to nobody but the holders of the recovery keys. Raises InvalidValue.
    """
    check_range(len(recovery_labels), "recovery keys", low=1, high=RECOVERY_KEYS_MAX)
    authority = AuthorityKey(vault=vault, private_key=Ed25519PrivateKey.generate())
    fingerprint = authority_fingerprint(authority.public_key)
    vault_key = X25519PrivateKey.generate()
    recovery_keys = tuple(
        RecoveryKey(
            vault=vault, label=label, authority_fingerprint=fingerprint, private_key=X25519PrivateKey.generate()
        )
        for label in recovery_labels
    )
    description = VaultDescription(
        vault=vault,
        created_ns=check_range(created_ns, "created_ns", low=0, high=INSTANT_NS_MAX),
        authority_key=authority.public_key.public_bytes_raw(),
        vault_key=vault_key.public_key().public_bytes_raw(),
        recovery_keys=tuple(
            WrappedVaultKey(
                label=key.label,
                recovery_key=key.private_key.public_key().public_bytes_raw(),
                wrapped=_suite().encrypt(
                    vault_key.private_bytes_raw(), key.private_key.public_key(), _vault_key_info(vault)
                ),
            )
            for key in recovery_keys
        ),
    )
    return NewVault(
        vault_json=serialise_vault(description, authority.private_key),
        description=description,
        recovery_keys=recovery_keys,
        authority=authority,
    )


def serialise_vault(description: VaultDescription, authority: Ed25519PrivateKey) -> bytes:
    """vault.json, signed. Deterministic."""
    fields = _vault_fields(description)
    signature = authority.sign(_VAULT_DOMAIN + _json(fields))
    return _json({**fields, "signature": _base64(signature)})


def parse_vault(data: bytes, *, name: str) -> VaultDescription:
    """Verified against the authority key in it; compare `authority_fingerprint` before you trust it.

    Raises ObjectCorrupt, FormatNotSupported.
    """
    if len(data) > VAULT_BYTES_MAX:
        raise ObjectCorrupt(name=name, reason=f"more than {VAULT_BYTES_MAX} bytes")
    fields = _parse_json(data)
    if fields is None or fields.get("format") != _VAULT_FORMAT:
        raise ObjectCorrupt(name=name, reason="it is not a vault description")
    version = fields.get("version")
    if type(version) is int and version > VAULT_VERSION:
        raise FormatNotSupported(name=name, version=version, supported=VAULT_VERSION)
    try:
        description = _vault_description(fields)
        signature = _bytes(fields, "signature", length=64)
        description.authority.verify(signature, _VAULT_DOMAIN + _json(_vault_fields(description)))
    except InvalidSignature as error:
        raise ObjectCorrupt(name=name, reason="it is not signed by the authority it names") from error
    except (InvalidValue, ValueError) as error:
        raise ObjectCorrupt(name=name, reason=str(error)) from error
    if _json({**_vault_fields(description), "signature": _base64(signature)}) != data:
        raise ObjectCorrupt(name=name, reason="it is not written canonically")
    return description


def check_recovery_key(description: VaultDescription, key: RecoveryKey, *, url: str) -> None:
    """Raises NotAVault unless vault and authority are those that the key file names."""
    if description.vault != key.vault:
        raise NotAVault(url=url, reason=f"it is vault {description.vault}, the key is for {key.vault}")
    if description.authority_fingerprint != key.authority_fingerprint:
        raise NotAVault(url=url, reason="it is signed by another authority than the one the key trusts")


def unwrap_vault_key(description: VaultDescription, key: RecoveryKey, *, url: str) -> X25519PrivateKey:
    """The vault's private half. Raises NotAVault, WrongRecoveryKey."""
    check_recovery_key(description, key, url=url)
    public_key = key.private_key.public_key().public_bytes_raw()
    for entry in description.recovery_keys:
        if entry.recovery_key == public_key:
            break
    else:
        raise WrongRecoveryKey(path=key.path, reason="the vault is not wrapped to this key")
    try:
        raw = _suite().decrypt(entry.wrapped, key.private_key, _vault_key_info(description.vault))
    except (InvalidTag, ValueError) as error:
        raise WrongRecoveryKey(path=key.path, reason="it does not open the vault") from error
    private_key = X25519PrivateKey.from_private_bytes(raw)
    if private_key.public_key().public_bytes_raw() != description.vault_key:
        raise WrongRecoveryKey(path=key.path, reason="what it opens is not the vault's key")
    return private_key


def serialise_recovery_key(key: RecoveryKey, *, passphrase: str | None) -> bytes:
    """The file's text. A secret even with a passphrase: write it with mode 0600 and never over an existing file."""
    fields = _recovery_key_fields(key.vault, key.label, key.authority_fingerprint)
    raw = key.private_key.private_bytes_raw()
    if passphrase is None:
        return _json({**fields, "private_key": _base64(raw)})
    salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
    derivation: dict[str, object] = {
        "function": "argon2id",
        "iterations": ARGON2_ITERATIONS,
        "lanes": ARGON2_LANES,
        "memory_kib": ARGON2_MEMORY_KIB,
        "salt": _base64(salt),
    }
    fields["key_derivation"] = derivation
    cipher = AESGCM(_derive(passphrase, derivation))
    sealed = cipher.encrypt(nonce, raw, _RECOVERY_KEY_DOMAIN + _json(fields))
    return _json({**fields, "nonce": _base64(nonce), "sealed_private_key": _base64(sealed)})


def recovery_key_needs_passphrase(data: bytes) -> bool:
    """False also for what is no recovery key file at all."""
    fields = _parse_json(data) or {}
    return "sealed_private_key" in fields


def parse_recovery_key(data: bytes, *, path: str, passphrase: str | None) -> RecoveryKey:
    """Raises WrongRecoveryKey (not such a file, damaged, passphrase missing or wrong), FormatNotSupported.

    With a passphrase this takes about a tenth of a second of CPU and 64 MiB.
    """
    fields = _parse_json(data) if len(data) <= RECOVERY_KEY_FILE_BYTES_MAX else None
    if fields is None or fields.get("format") != _RECOVERY_KEY_FORMAT:
        raise WrongRecoveryKey(path=path, reason="it is not a recovery key file")
    version = fields.get("version")
    if type(version) is int and version > RECOVERY_KEY_VERSION:
        raise FormatNotSupported(name=path, version=version, supported=RECOVERY_KEY_VERSION)
    try:
        return RecoveryKey(
            vault=VaultId(_text(fields, "vault")),
            label=_text(fields, "label"),
            authority_fingerprint=_text(fields, "authority_fingerprint"),
            private_key=X25519PrivateKey.from_private_bytes(_private_bytes(fields, path, passphrase)),
            path=path,
        )
    except (InvalidValue, ValueError, RecursionError) as error:
        raise WrongRecoveryKey(path=path, reason=f"it is damaged: {error}") from error


def recovery_key_fingerprint(public_key: X25519PublicKey) -> str:
    """SHA-256 of the raw public key, 64 lower-case hexadecimal digits."""
    return hashlib.sha256(public_key.public_bytes_raw()).hexdigest()


def wrap_data_key(
    data_key: bytes,
    vault_public_key: X25519PublicKey,
    *,
    vault: VaultId,
    machine: MachineId,
    disk: DiskId,
    epoch: int,
    ordinal: int,
) -> bytes:
    """The data key, to be opened by the vault's private half and only for this segment. Different at every call."""
    check_key(data_key, "data key")
    return _suite().encrypt(data_key, vault_public_key, _data_key_info(vault, machine, disk, epoch, ordinal))


def unwrap_data_key(
    wrapped: bytes,
    vault_private_key: X25519PrivateKey,
    *,
    name: str,
    vault: VaultId,
    machine: MachineId,
    disk: DiskId,
    epoch: int,
    ordinal: int,
) -> bytes:
    """Raises ObjectCorrupt with `name`, the segment's, if it was wrapped to another vault or for another segment."""
    try:
        data_key = _suite().decrypt(wrapped, vault_private_key, _data_key_info(vault, machine, disk, epoch, ordinal))
    except (InvalidTag, ValueError) as error:
        raise ObjectCorrupt(name=name, reason="its data key was not wrapped to this vault for it") from error
    if len(data_key) != DATA_KEY_BYTES:
        raise ObjectCorrupt(name=name, reason="its data key has the wrong length")
    return data_key


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _vault_key_info(vault: VaultId) -> bytes:
    return _VAULT_KEY_INFO + bytes.fromhex(vault)


def _data_key_info(vault: VaultId, machine: MachineId, disk: DiskId, epoch: int, ordinal: int) -> bytes:
    identity = bytes.fromhex(vault) + bytes.fromhex(machine) + bytes.fromhex(disk)
    return _DATA_KEY_INFO + identity + epoch.to_bytes(4, "big") + ordinal.to_bytes(8, "big")


def _vault_fields(description: VaultDescription) -> dict[str, object]:
    return {
        "format": _VAULT_FORMAT,
        "version": VAULT_VERSION,
        "vault": description.vault,
        "created_ns": description.created_ns,
        "authority_key": _base64(description.authority_key),
        "vault_key": _base64(description.vault_key),
        "recovery_keys": [
            {"label": key.label, "public_key": _base64(key.recovery_key), "wrapped_vault_key": _base64(key.wrapped)}
            for key in description.recovery_keys
        ],
    }


def _vault_description(fields: dict[str, object]) -> VaultDescription:
    rows = fields.get("recovery_keys")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InvalidValue(what="recovery_keys", value="…", rule="must be a list of objects")
    check_range(len(rows), "recovery keys", low=1, high=RECOVERY_KEYS_MAX)
    return VaultDescription(
        vault=VaultId(check_identifier(_text(fields, "vault"), "vault")),
        created_ns=check_range(cast(int, fields.get("created_ns")), "created_ns", low=0, high=INSTANT_NS_MAX),
        authority_key=_bytes(fields, "authority_key", length=32),
        vault_key=_bytes(fields, "vault_key", length=32),
        recovery_keys=tuple(
            WrappedVaultKey(
                label=_check_label(_text(row, "label")),
                recovery_key=_bytes(row, "public_key", length=32),
                wrapped=_bytes(row, "wrapped_vault_key", length=80),
            )
            for row in rows
        ),
    )


def _recovery_key_fields(vault: str, label: str, fingerprint: str) -> dict[str, object]:
    return {
        "format": _RECOVERY_KEY_FORMAT,
        "version": RECOVERY_KEY_VERSION,
        "vault": vault,
        "label": label,
        "authority_fingerprint": fingerprint,
    }


def _private_bytes(fields: dict[str, object], path: str, passphrase: str | None) -> bytes:
    if "sealed_private_key" not in fields:
        return _bytes(fields, "private_key", length=32)
    if passphrase is None:
        raise WrongRecoveryKey(path=path, reason="it needs its passphrase")
    derivation = fields.get("key_derivation")
    if not isinstance(derivation, dict):
        raise InvalidValue(what="key_derivation", value="…", rule="must be an object")
    nonce = _bytes(fields, "nonce", length=_NONCE_BYTES)
    sealed = _bytes(fields, "sealed_private_key", length=48)
    bound = {key: value for key, value in fields.items() if key not in ("nonce", "sealed_private_key")}
    try:
        return AESGCM(_derive(passphrase, derivation)).decrypt(nonce, sealed, _RECOVERY_KEY_DOMAIN + _json(bound))
    except InvalidTag as error:
        raise WrongRecoveryKey(path=path, reason="the passphrase is wrong, or the file was altered") from error


def _derive(passphrase: str, derivation: dict[str, object]) -> bytes:
    if derivation.get("function") != "argon2id":
        raise InvalidValue(what="key derivation", value=derivation.get("function"), rule="must be argon2id")
    iterations = check_range(cast(int, derivation.get("iterations")), "iterations", low=1, high=ARGON2_ITERATIONS_MAX)
    lanes = check_range(cast(int, derivation.get("lanes")), "lanes", low=1, high=ARGON2_LANES_MAX)
    memory_kib = check_range(
        cast(int, derivation.get("memory_kib")), "memory_kib", low=8 * lanes, high=ARGON2_MEMORY_KIB_MAX
    )
    salt = _bytes(derivation, "salt", length=_SALT_BYTES)
    function = Argon2id(salt=salt, length=32, iterations=iterations, lanes=lanes, memory_cost=memory_kib)
    # why: keyboards differ in how they compose a letter; the same passphrase must give the same key on all of them
    return function.derive(unicodedata.normalize("NFC", passphrase).encode())


def _json(fields: dict[str, object]) -> bytes:
    """One text per value: sorted keys, two spaces, ASCII."""
    return (json.dumps(fields, sort_keys=True, indent=2, ensure_ascii=True) + "\n").encode()


def _parse_json(data: bytes) -> dict[str, object] | None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _text(fields: dict[str, object], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise InvalidValue(what=key, value="…", rule="must be text")
    return value


def _bytes(fields: dict[str, object], key: str, *, length: int) -> bytes:
    try:
        value = base64.b64decode(_text(fields, key), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidValue(what=key, value="…", rule="must be base64") from error
    if len(value) != length:
        raise InvalidValue(what=key, value="…", rule=f"must be {length} bytes")
    return value


def _check_label(label: str) -> str:
    if not 1 <= len(label) <= LABEL_LENGTH_MAX or not label.isprintable():
        raise InvalidValue(what="label", value=label, rule=f"must be 1 to {LABEL_LENGTH_MAX} printable characters")
    return label
