"""A signed record is what the authority signed, byte for byte, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import InvalidValue, MalformedInput, VersionNotSupported
from protocol.signed_records import (
    SIGNATURE_BYTES,
    SIGNED_RECORD_BYTES_MAX,
    AuthorityKey,
    DiskDescription,
    Grant,
    MachineDescription,
    NicDescription,
    PointMember,
    PointRecord,
    SignatureInvalid,
    authority_fingerprint,
    parse_authority_key,
    serialise_authority_key,
    sign_grant,
    sign_machine_description,
    sign_point,
    verify_grant,
    verify_machine_description,
    verify_point,
)
from protocol.vocabulary import Consistency, DiskId, MachineId, PointId, ProcessServerId, VaultId

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
VAULT = VaultId("a1" * 16)
MACHINE = MachineId("b2" * 16)
DISK = DiskId("c3" * 16)

GRANT = Grant(
    vault=VAULT,
    machine=MACHINE,
    disk=DISK,
    epoch=3,
    parent_epoch=2,
    process_server=ProcessServerId("d4" * 16),
    process_server_key=bytes(32),
    issued_ns=5,
    disk_size_bytes=2**30,
    sector_bytes=512,
    is_spare=True,
)
MACHINE_DESCRIPTION = MachineDescription(
    vault=VAULT,
    machine=MACHINE,
    version=2,
    name="Zoë's server",
    disks=(DiskDescription(disk=DISK, name="/dev/vda", size_bytes=2**30, sector_bytes=4096, boot_order=0),),
    firmware="uefi",
    processors=4,
    memory_bytes=2**33,
    nics=(NicDescription(name="eth0", hardware_address="52:54:00:00:00:01", addresses=("10.0.0.2/24",)),),
)
BARE_DESCRIPTION = MachineDescription(vault=VAULT, machine=MACHINE, version=1, name="bare", disks=())
POINT = PointRecord(
    vault=VAULT,
    point=PointId("e5" * 16),
    instant_ns=9,
    consistency=Consistency.FILE_SYSTEM,
    members=(PointMember(machine=MACHINE, disk=DISK, epoch=3, sequence=17),),
)

CASES: list[tuple[Any, Callable[..., bytes], Callable[..., Any], bytes]] = [
    (GRANT, sign_grant, verify_grant, b"farpoint grant 1\0"),
    (MACHINE_DESCRIPTION, sign_machine_description, verify_machine_description, b"farpoint machine description 1\0"),
    (BARE_DESCRIPTION, sign_machine_description, verify_machine_description, b"farpoint machine description 1\0"),
    (POINT, sign_point, verify_point, b"farpoint recovery point 1\0"),
]
IDS = ["grant", "machine description", "bare machine description", "recovery point"]


def signed(domain: bytes, payload: bytes) -> bytes:
    return payload + KEY.sign(domain + payload)


@pytest.mark.parametrize(("record", "sign", "verify", "domain"), CASES, ids=IDS)
class TestEveryRecord:
    def test_comes_back_as_it_was_signed_and_has_one_text(
        self, record: Any, sign: Any, verify: Any, domain: Any
    ) -> None:
        data = sign(record, KEY)
        assert verify(data, KEY.public_key()) == record
        assert sign(record, KEY) == data

    def test_is_refused_with_any_byte_altered(self, record: Any, sign: Any, verify: Any, domain: Any) -> None:
        data = sign(record, KEY)
        for place in range(len(data)):
            altered = bytearray(data)
            altered[place] ^= 1
            with pytest.raises(SignatureInvalid):
                verify(bytes(altered), KEY.public_key())

    def test_is_refused_cut_or_prolonged(self, record: Any, sign: Any, verify: Any, domain: Any) -> None:
        data = sign(record, KEY)
        for end in range(len(data)):
            with pytest.raises((SignatureInvalid, MalformedInput)):
                verify(data[:end], KEY.public_key())
        with pytest.raises(SignatureInvalid):
            verify(data + b"\0", KEY.public_key())

    def test_is_refused_under_another_key(self, record: Any, sign: Any, verify: Any, domain: Any) -> None:
        with pytest.raises(SignatureInvalid):
            verify(sign(record, KEY), Ed25519PrivateKey.generate().public_key())

    def test_of_a_later_version_is_told_apart(self, record: Any, sign: Any, verify: Any, domain: bytes) -> None:
        fields = msgpack.unpackb(sign(record, KEY)[:-SIGNATURE_BYTES])
        with pytest.raises(VersionNotSupported):
            verify(signed(domain, msgpack.packb([2, *fields[1:], "new"])), KEY.public_key())

    def test_is_malformed_with_a_field_more_or_less(self, record: Any, sign: Any, verify: Any, domain: bytes) -> None:
        fields = msgpack.unpackb(sign(record, KEY)[:-SIGNATURE_BYTES])
        for wrong in ([*fields, 0], fields[:-1], [], fields[0], {0: fields}):
            with pytest.raises((MalformedInput, VersionNotSupported)):
                verify(signed(domain, msgpack.packb(wrong)), KEY.public_key())

    def test_is_malformed_with_a_field_of_another_type(
        self, record: Any, sign: Any, verify: Any, domain: bytes
    ) -> None:
        fields = msgpack.unpackb(sign(record, KEY)[:-SIGNATURE_BYTES])
        for place in range(1, len(fields)):
            for wrong in (1.5, -1, [[1]], b"\xff"):
                altered = [*fields]
                altered[place] = wrong
                with pytest.raises(MalformedInput):
                    verify(signed(domain, msgpack.packb(altered)), KEY.public_key())

    def test_is_malformed_if_not_canonical(self, record: Any, sign: Any, verify: Any, domain: bytes) -> None:
        payload = sign(record, KEY)[:-SIGNATURE_BYTES]
        assert payload[1] == 1
        for other in (payload[:1] + b"\xcc\x01" + payload[2:], payload + b"\xc0", b"\xc1"):
            with pytest.raises(MalformedInput):
                verify(signed(domain, other), KEY.public_key())


@pytest.mark.parametrize(("record", "sign", "verify", "domain"), CASES, ids=IDS)
def test_no_record_passes_for_one_of_another_kind(record: Any, sign: Any, verify: Any, domain: bytes) -> None:
    for _, other_sign, other_verify, _ in CASES:
        if other_sign is not sign:
            with pytest.raises(SignatureInvalid):
                other_verify(sign(record, KEY), KEY.public_key())


def test_a_record_larger_than_the_limit_is_refused_before_it_is_looked_at() -> None:
    with pytest.raises(MalformedInput):
        verify_grant(bytes(SIGNED_RECORD_BYTES_MAX + 1), KEY.public_key())


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 0},
        {"parent_epoch": 3},
        {"process_server_key": bytes(31)},
        {"sector_bytes": 1000},
        {"disk_size_bytes": 0},
        {"disk": "nobody"},
        {"is_spare": 1},
    ],
    ids=str,
)
def test_a_grant_that_makes_no_sense_cannot_be_made(change: dict[str, Any]) -> None:
    fields = {name: getattr(GRANT, name) for name in GRANT.__slots__}
    with pytest.raises(InvalidValue):
        Grant(**{**fields, **change})


def test_a_point_is_settled_and_names_each_disk_once() -> None:
    member = POINT.members[0]
    for change in ({"consistency": Consistency.UNSETTLED}, {"members": ()}, {"members": (member, member)}):
        fields: dict[str, Any] = {name: getattr(POINT, name) for name in POINT.__slots__}
        with pytest.raises(InvalidValue):
            PointRecord(**{**fields, **change})


def test_an_authority_key_file_comes_back_and_tells_its_fingerprint() -> None:
    key = AuthorityKey(vault=VAULT, private_key=KEY)
    parsed = parse_authority_key(serialise_authority_key(key))
    assert parsed.vault == VAULT
    assert parsed.private_key.private_bytes_raw() == KEY.private_bytes_raw()
    assert authority_fingerprint(parsed.public_key) == authority_fingerprint(KEY.public_key())
    assert "private_key" not in repr(key)


@pytest.mark.parametrize(
    "change",
    [{"format": "another"}, {"vault": "x"}, {"vault": 5}, {"private_key": "?"}, {"private_key": None}, {"more": 1}],
    ids=str,
)
def test_a_damaged_authority_key_file_is_malformed(change: dict[str, Any]) -> None:
    fields = json.loads(serialise_authority_key(AuthorityKey(vault=VAULT, private_key=KEY)))
    with pytest.raises(MalformedInput):
        parse_authority_key(json.dumps({**fields, **change}).encode())


def test_an_authority_key_file_of_a_later_version_is_told_apart() -> None:
    fields = json.loads(serialise_authority_key(AuthorityKey(vault=VAULT, private_key=KEY)))
    with pytest.raises(VersionNotSupported):
        parse_authority_key(json.dumps({**fields, "version": 2}).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 5000, b"{}"])
def test_what_is_no_authority_key_file_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedInput):
        parse_authority_key(data)
