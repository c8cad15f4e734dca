"""What the vault's authority key signs (grants, machine descriptions, recovery points), and the file that holds it.

A signed record is `payload | 64-byte Ed25519 signature`. The payload is a canonical msgpack array that starts with the
record's version; the signature is over the record's domain and the payload, so that no record can be taken for one of
another kind. Nothing of a payload is interpreted before its signature is verified. Ed25519 is deterministic: one
record, one key, one text.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from typing import Final, cast

import msgpack  # type: ignore[import-untyped]
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.errors import InvalidValue, MalformedInput, NotPermitted, VersionNotSupported
from protocol.vocabulary import (
    DISK_SIZE_BYTES_MAX,
    EPOCH_MAX,
    SEQUENCE_MAX,
    Consistency,
    DiskId,
    MachineId,
    PointId,
    ProcessServerId,
    VaultId,
    check_identifier,
    check_range,
)

RECORD_VERSION: Final = 1
"""1: the first version of all three records."""

SIGNATURE_BYTES: Final = 64
KEY_BYTES: Final = 32
SIGNED_RECORD_BYTES_MAX: Final = 2**20
SECTOR_BYTES_MAX: Final = 65536
TEXT_LENGTH_MAX: Final = 255
MACHINE_DISKS_MAX: Final = 1024
MACHINE_NICS_MAX: Final = 256
NIC_ADDRESSES_MAX: Final = 64
POINT_MEMBERS_MAX: Final = 8192
INSTANT_NS_MAX: Final = 2**63 - 1
MACHINE_VERSION_MAX: Final = 2**32 - 1
AUTHORITY_KEY_FILE_BYTES_MAX: Final = 4096

_GRANT_DOMAIN: Final = b"farpoint grant 1\0"
_MACHINE_DOMAIN: Final = b"farpoint machine description 1\0"
_POINT_DOMAIN: Final = b"farpoint recovery point 1\0"
_AUTHORITY_KEY_FORMAT: Final = "farpoint-authority-key"
_AUTHORITY_KEY_VERSION: Final = 1


class SignatureInvalid(NotPermitted):
    """The record was not signed by the key that it was checked against. Fields: subject, reason."""

    code = "signature-invalid"
    hint = "It was altered, or made by another vault's authority. Nothing of it was used."


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Leave for one process server's key to extend one disk's history for one epoch. At most one is ever signed for an
    epoch.

    parent_epoch is the epoch whose history this one continues, 0 for a history that begins at nothing. is_spare:
    signed ahead of need, to be used only while the configuration server is away.
    """

    vault: VaultId
    machine: MachineId
    disk: DiskId
    epoch: int
    parent_epoch: int
    process_server: ProcessServerId
    process_server_key: bytes
    """The raw Ed25519 public key with which the epoch's trailers are signed, 32 bytes."""
    issued_ns: int
    disk_size_bytes: int
    sector_bytes: int
    is_spare: bool = False

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")
        check_identifier(self.machine, "machine")
        check_identifier(self.disk, "disk")
        check_identifier(self.process_server, "process_server")
        check_range(self.epoch, "epoch", low=1, high=EPOCH_MAX)
        check_range(self.parent_epoch, "parent_epoch", low=0, high=self.epoch - 1)
        check_key(self.process_server_key, "process_server_key")
        check_range(self.issued_ns, "issued_ns", low=0, high=INSTANT_NS_MAX)
        check_sectors(self.disk_size_bytes, self.sector_bytes)
        _check_flag(self.is_spare, "is_spare")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskDescription:
    """One disk of a machine. boot_order: 0 is tried first, None is not booted from."""

    disk: DiskId
    name: str
    size_bytes: int
    sector_bytes: int
    boot_order: int | None = None

    def __post_init__(self) -> None:
        check_identifier(self.disk, "disk")
        _check_text(self.name, "disk name")
        check_sectors(self.size_bytes, self.sector_bytes)
        if self.boot_order is not None:
            check_range(self.boot_order, "boot_order", low=0, high=MACHINE_DISKS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class NicDescription:
    """One network interface: its name, its hardware address, its addresses with prefix lengths, all as the machine
    writes them.
    """

    name: str
    hardware_address: str
    addresses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_text(self.name, "interface name")
        _check_text(self.hardware_address, "hardware_address")
        check_range(len(self.addresses), "address count", low=0, high=NIC_ADDRESSES_MAX)
        for address in self.addresses:
            _check_text(address, "address")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineDescription:
    """What a machine looked like: enough to make one like it. What is not known is None. Versions rise by one."""

    vault: VaultId
    machine: MachineId
    version: int
    name: str
    disks: tuple[DiskDescription, ...]
    firmware: str | None = None
    """`bios` or `uefi`."""
    processors: int | None = None
    memory_bytes: int | None = None
    nics: tuple[NicDescription, ...] | None = None

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")
        check_identifier(self.machine, "machine")
        check_range(self.version, "version", low=1, high=MACHINE_VERSION_MAX)
        _check_text(self.name, "machine name")
        check_range(len(self.disks), "disk count", low=0, high=MACHINE_DISKS_MAX)
        check_range(
            len({disk.disk for disk in self.disks}), "distinct disks", low=len(self.disks), high=len(self.disks)
        )
        if self.firmware is not None and self.firmware not in ("bios", "uefi"):
            raise InvalidValue(what="firmware", value=self.firmware, rule="must be bios or uefi")
        if self.processors is not None:
            check_range(self.processors, "processors", low=1, high=65536)
        if self.memory_bytes is not None:
            check_range(self.memory_bytes, "memory_bytes", low=1, high=DISK_SIZE_BYTES_MAX)
        if self.nics is not None:
            check_range(len(self.nics), "interface count", low=0, high=MACHINE_NICS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class PointMember:
    """One disk's position in a recovery point."""

    machine: MachineId
    disk: DiskId
    epoch: int
    sequence: int

    def __post_init__(self) -> None:
        check_identifier(self.machine, "machine")
        check_identifier(self.disk, "disk")
        check_range(self.epoch, "epoch", low=1, high=EPOCH_MAX)
        check_range(self.sequence, "sequence", low=0, high=SEQUENCE_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class PointRecord:
    """A recovery point: every member's settled, committed position. Members are sorted by disk, each disk once."""

    vault: VaultId
    point: PointId
    instant_ns: int
    consistency: Consistency
    members: tuple[PointMember, ...]

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")
        check_identifier(self.point, "point")
        check_range(self.instant_ns, "instant_ns", low=0, high=INSTANT_NS_MAX)
        check_range(len(self.members), "member count", low=1, high=POINT_MEMBERS_MAX)
        if not self.consistency.is_settled:
            raise InvalidValue(what="consistency", value=self.consistency.value, rule="a point is settled")
        disks = [member.disk for member in self.members]
        if any(first >= second for first, second in itertools.pairwise(disks)):
            raise InvalidValue(what="members", value=disks, rule="must be sorted by disk, each disk once")


def sign_grant(grant: Grant, key: Ed25519PrivateKey) -> bytes:
    """The signed record; the same bytes whenever the same grant is signed."""
    return _sign(
        _GRANT_DOMAIN,
        [
            bytes.fromhex(grant.vault),
            bytes.fromhex(grant.machine),
            bytes.fromhex(grant.disk),
            grant.epoch,
            grant.parent_epoch,
            bytes.fromhex(grant.process_server),
            grant.process_server_key,
            grant.issued_ns,
            grant.disk_size_bytes,
            grant.sector_bytes,
            grant.is_spare,
        ],
        key,
    )


def verify_grant(data: bytes, key: Ed25519PublicKey) -> Grant:
    """Raises SignatureInvalid, VersionNotSupported (signed, but of a later version), MalformedInput."""
    fields = _verify(_GRANT_DOMAIN, data, key, what="grant", arity=11)
    (
        vault,
        machine,
        disk,
        epoch,
        parent_epoch,
        process_server,
        server_key,
        issued_ns,
        size_bytes,
        sector_bytes,
        spare,
    ) = fields
    try:
        return Grant(
            vault=VaultId(_identifier(vault)),
            machine=MachineId(_identifier(machine)),
            disk=DiskId(_identifier(disk)),
            epoch=cast(int, epoch),
            parent_epoch=cast(int, parent_epoch),
            process_server=ProcessServerId(_identifier(process_server)),
            process_server_key=cast(bytes, server_key),
            issued_ns=cast(int, issued_ns),
            disk_size_bytes=cast(int, size_bytes),
            sector_bytes=cast(int, sector_bytes),
            is_spare=cast(bool, spare),
        )
    except InvalidValue as error:
        raise MalformedInput(what="grant", reason=str(error)) from error


def sign_machine_description(description: MachineDescription, key: Ed25519PrivateKey) -> bytes:
    """The signed record; the same bytes whenever the same description is signed."""
    return _sign(
        _MACHINE_DOMAIN,
        [
            bytes.fromhex(description.vault),
            bytes.fromhex(description.machine),
            description.version,
            description.name,
            [
                [bytes.fromhex(disk.disk), disk.name, disk.size_bytes, disk.sector_bytes, disk.boot_order]
                for disk in description.disks
            ],
            description.firmware,
            description.processors,
            description.memory_bytes,
            None
            if description.nics is None
            else [[nic.name, nic.hardware_address, list(nic.addresses)] for nic in description.nics],
        ],
        key,
    )


def verify_machine_description(data: bytes, key: Ed25519PublicKey) -> MachineDescription:
    """Raises SignatureInvalid, VersionNotSupported (signed, but of a later version), MalformedInput."""
    fields = _verify(_MACHINE_DOMAIN, data, key, what="machine description", arity=9)
    vault, machine, version, name, disks, firmware, processors, memory_bytes, nics = fields
    try:
        return MachineDescription(
            vault=VaultId(_identifier(vault)),
            machine=MachineId(_identifier(machine)),
            version=cast(int, version),
            name=cast(str, name),
            disks=tuple(_disk_description(row) for row in _rows(disks, arity=5)),
            firmware=cast("str | None", firmware),
            processors=cast("int | None", processors),
            memory_bytes=cast("int | None", memory_bytes),
            nics=None if nics is None else tuple(_nic_description(row) for row in _rows(nics, arity=3)),
        )
    except InvalidValue as error:
        raise MalformedInput(what="machine description", reason=str(error)) from error


def sign_point(record: PointRecord, key: Ed25519PrivateKey) -> bytes:
    """The signed record; the same bytes whenever the same point is signed."""
    return _sign(
        _POINT_DOMAIN,
        [
            bytes.fromhex(record.vault),
            bytes.fromhex(record.point),
            record.instant_ns,
            record.consistency.value,
            [
                [bytes.fromhex(member.machine), bytes.fromhex(member.disk), member.epoch, member.sequence]
                for member in record.members
            ],
        ],
        key,
    )


def verify_point(data: bytes, key: Ed25519PublicKey) -> PointRecord:
    """Raises SignatureInvalid, VersionNotSupported (signed, but of a later version), MalformedInput."""
    vault, point, instant_ns, consistency, members = _verify(_POINT_DOMAIN, data, key, what="recovery point", arity=5)
    try:
        return PointRecord(
            vault=VaultId(_identifier(vault)),
            point=PointId(_identifier(point)),
            instant_ns=cast(int, instant_ns),
            consistency=_consistency(consistency),
            members=tuple(
                PointMember(
                    machine=MachineId(_identifier(machine)),
                    disk=DiskId(_identifier(disk)),
                    epoch=cast(int, epoch),
                    sequence=cast(int, sequence),
                )
                for machine, disk, epoch, sequence in _rows(members, arity=4)
            ),
        )
    except InvalidValue as error:
        raise MalformedInput(what="recovery point", reason=str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorityKey:
    """The vault's signing key. Only the configuration server holds it; in files it is JSON, mode 0600."""

    vault: VaultId
    private_key: Ed25519PrivateKey = field(repr=False)

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")

    @property
    def public_key(self) -> Ed25519PublicKey:
        return self.private_key.public_key()


def authority_fingerprint(public_key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, 64 lower-case hexadecimal digits: what a recovery key file trusts."""
    return hashlib.sha256(public_key.public_bytes_raw()).hexdigest()


def serialise_authority_key(key: AuthorityKey) -> bytes:
    """The file's text. A secret: write it with mode 0600 and never over an existing file."""
    fields = {
        "format": _AUTHORITY_KEY_FORMAT,
        "version": _AUTHORITY_KEY_VERSION,
        "vault": key.vault,
        "private_key": base64.b64encode(key.private_key.private_bytes_raw()).decode(),
    }
    return (json.dumps(fields, indent=2) + "\n").encode()


def parse_authority_key(data: bytes) -> AuthorityKey:
    """Raises MalformedInput, VersionNotSupported."""
    what = "authority key file"
    if len(data) > AUTHORITY_KEY_FILE_BYTES_MAX:
        raise MalformedInput(what=what, reason=f"more than {AUTHORITY_KEY_FILE_BYTES_MAX} bytes")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedInput(what=what, reason="not JSON") from error
    if not isinstance(fields, dict) or fields.get("format") != _AUTHORITY_KEY_FORMAT:
        raise MalformedInput(what=what, reason=f"not of format {_AUTHORITY_KEY_FORMAT}")
    if fields.get("version") != _AUTHORITY_KEY_VERSION:
        raise VersionNotSupported(what=what, version=fields.get("version"), supported=_AUTHORITY_KEY_VERSION)
    if set(fields) != {"format", "version", "vault", "private_key"}:
        raise MalformedInput(what=what, reason="unknown or missing fields")
    try:
        raw = base64.b64decode(fields["private_key"], validate=True)
        check_key(raw, "private_key")
        return AuthorityKey(vault=fields["vault"], private_key=Ed25519PrivateKey.from_private_bytes(raw))
    except (InvalidValue, TypeError, ValueError) as error:
        raise MalformedInput(what=what, reason="vault or private_key is not valid") from error


def check_key(value: bytes, what: str) -> bytes:
    """Returns `value`. Raises InvalidValue unless it is 32 bytes. The value is not told: it may be a secret."""
    if not isinstance(value, bytes) or len(value) != KEY_BYTES:
        raise InvalidValue(what=what, value="…", rule=f"must be {KEY_BYTES} bytes")
    return value


def check_sectors(size_bytes: int, sector_bytes: int) -> None:
    """Raises InvalidValue unless sector_bytes is a power of two from 512 and size_bytes a whole, positive number of
    bytes.
    """
    check_range(size_bytes, "disk size", low=1, high=DISK_SIZE_BYTES_MAX)
    check_range(sector_bytes, "sector_bytes", low=512, high=SECTOR_BYTES_MAX)
    if sector_bytes & (sector_bytes - 1):
        raise InvalidValue(what="sector_bytes", value=sector_bytes, rule="must be a power of two")


def _sign(domain: bytes, fields: list[object], key: Ed25519PrivateKey) -> bytes:
    payload = cast(bytes, msgpack.packb([RECORD_VERSION, *fields]))
    check_range(len(payload), "record bytes", low=1, high=SIGNED_RECORD_BYTES_MAX - SIGNATURE_BYTES)
    return payload + key.sign(domain + payload)


def _verify(domain: bytes, data: bytes, key: Ed25519PublicKey, *, what: str, arity: int) -> list[object]:
    if not SIGNATURE_BYTES < len(data) <= SIGNED_RECORD_BYTES_MAX:
        raise MalformedInput(what=what, reason=f"{len(data)} bytes")
    payload, signature = data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
    try:
        key.verify(signature, domain + payload)
    except InvalidSignature as error:
        raise SignatureInvalid(subject=what, reason="not signed by this vault's authority") from error
    try:
        fields = msgpack.unpackb(payload, max_map_len=0, max_ext_len=0, max_array_len=POINT_MEMBERS_MAX)
        is_canonical = msgpack.packb(fields) == payload
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise MalformedInput(what=what, reason="not msgpack within the limits") from error
    if not isinstance(fields, list) or not fields or not is_canonical:
        raise MalformedInput(what=what, reason="not a canonical array")
    if type(fields[0]) is not int or fields[0] != RECORD_VERSION:
        raise VersionNotSupported(what=what, version=fields[0], supported=RECORD_VERSION)
    if len(fields) != arity + 1:
        raise MalformedInput(what=what, reason=f"{len(fields) - 1} fields instead of {arity}")
    return fields[1:]


def _identifier(value: object) -> str:
    if not isinstance(value, bytes) or len(value) != 16:
        raise InvalidValue(what="identifier", value=value, rule="must be 16 bytes")
    return value.hex()


def _rows(value: object, *, arity: int) -> list[list[object]]:
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == arity for row in value):
        raise InvalidValue(what="rows", value="…", rule=f"must be an array of arrays of {arity}")
    return value


def _disk_description(row: list[object]) -> DiskDescription:
    disk, name, size_bytes, sector_bytes, boot_order = row
    return DiskDescription(
        disk=DiskId(_identifier(disk)),
        name=cast(str, name),
        size_bytes=cast(int, size_bytes),
        sector_bytes=cast(int, sector_bytes),
        boot_order=cast("int | None", boot_order),
    )


def _nic_description(row: list[object]) -> NicDescription:
    name, hardware_address, addresses = row
    if not isinstance(addresses, list):
        raise InvalidValue(what="addresses", value="…", rule="must be an array")
    return NicDescription(
        name=cast(str, name), hardware_address=cast(str, hardware_address), addresses=tuple(addresses)
    )


def _consistency(value: object) -> Consistency:
    if not isinstance(value, str) or value not in {member.value for member in Consistency}:
        raise InvalidValue(what="consistency", value=value, rule="must be a known consistency")
    return Consistency(value)


def _check_text(value: str, what: str) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= TEXT_LENGTH_MAX or not value.isprintable():
        raise InvalidValue(what=what, value=value, rule=f"must be 1 to {TEXT_LENGTH_MAX} printable characters")


def _check_flag(value: bool, what: str) -> None:
    if type(value) is not bool:
        raise InvalidValue(what=what, value=value, rule="must be true or false")
