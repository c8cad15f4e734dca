"""Join tokens and what an enrolled program keeps: written, read back, damaged."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.control_errors import JoinTokenMalformed
from protocol.enrollment import (
    IDENTITY_FILE,
    SIGNING_KEY_FILE,
    EnrolledIdentity,
    EnrollmentBundle,
    IdentityFileInvalid,
    make_signing_key,
    proof_key,
    prove,
    read_signing_key,
    signing_key_pem,
    transcript,
)
from protocol.errors import InvalidValue
from protocol.join_token import JoinToken
from protocol.vocabulary import PeerIdentity, Role, VaultId

TOKEN = JoinToken(identifier="0123456789abcdef" * 2, secret=bytes(range(32)), authority_key_hash=bytes(range(32, 64)))
IDENTITY = EnrolledIdentity(
    peer=PeerIdentity(vault=VaultId("a" * 32), role=Role.AGENT, identifier="b" * 32),
    name="db-1 — main",
    server_url="https://farpoint.example:8443",
    vault_authority_public_key=bytes(range(32)),
)


@given(secret=st.binary(min_size=32, max_size=32), digest=st.binary(min_size=32, max_size=32))
def test_a_token_comes_back_from_its_text(secret: bytes, digest: bytes) -> None:
    token = JoinToken(identifier="c" * 32, secret=secret, authority_key_hash=digest)
    assert JoinToken.parse(f"  {token.format()}\n") == token


@given(place=st.integers(0, len(TOKEN.format()) - 1), character=st.sampled_from("A.z9-_ \n\u00e9"))
def test_a_changed_token_is_another_token_or_none(place: int, character: str) -> None:
    text = TOKEN.format()
    changed = text[:place] + character + text[place + 1 :]
    parsed: JoinToken | None = None
    with contextlib.suppress(JoinTokenMalformed):
        parsed = JoinToken.parse(changed)
    assert (parsed == TOKEN) == (changed.strip() == text)


@pytest.mark.parametrize("text", ["", "a.b.c", TOKEN.format() + ".x", TOKEN.format()[:-1], TOKEN.format().upper()])
def test_what_is_not_a_token_is_told_without_showing_it(text: str) -> None:
    with pytest.raises(JoinTokenMalformed) as caught:
        JoinToken.parse(text)
    assert TOKEN.format().split(".")[1] not in str(caught.value)


def test_a_token_never_shows_its_secret_by_accident() -> None:
    assert TOKEN.format().split(".")[1] not in repr(TOKEN)
    assert repr(TOKEN.secret) not in repr(TOKEN)


def test_a_token_has_a_whole_secret_and_hash() -> None:
    with pytest.raises(InvalidValue):
        JoinToken(identifier="c" * 32, secret=bytes(31), authority_key_hash=bytes(32))


def test_the_transcript_is_unambiguous() -> None:
    def make(**change: object) -> bytes:
        values: dict[str, object] = {
            "token": "t", "role": Role.AGENT, "name": "ab", "request_pem": "cd", "signing_public_key": None,
            "authority_key_hash": b"h",
        }  # fmt: skip
        return transcript(**(values | change))  # type: ignore[arg-type]

    variants = [
        make(),
        make(name="abc", request_pem="d"),
        make(name="a", request_pem="bcd"),
        make(token="ta", name="b"),
    ]
    assert len(set(variants)) == len(variants)
    assert prove(proof_key(bytes(32)), make()) != prove(bytes(32), make()), "the key is derived, not the secret itself"


def test_an_identity_comes_back_from_its_file() -> None:
    assert EnrolledIdentity.decode(IDENTITY.encode()) == IDENTITY


@pytest.mark.parametrize(
    "damage",
    [
        (b'"format": 1', b'"format": 2'),
        (b'"agent"', b'"king"'),
        (b"aaaa", b"zzzz"),
        (b'"server_url"', b'"server"'),
        (b"0001", b""),
        (b"{", b""),
        (b'"name"', b'\xff"name"'),
    ],
)
def test_a_damaged_identity_file_is_told(damage: tuple[bytes, bytes]) -> None:
    with pytest.raises(IdentityFileInvalid):
        EnrolledIdentity.decode(IDENTITY.encode().replace(*damage))


def test_the_identity_is_written_last() -> None:
    key = make_signing_key()
    bundle = EnrollmentBundle(
        identity=IDENTITY, credentials_pem=b"c", authority_pem=b"a", signing_key_pem=signing_key_pem(key)
    )
    names = [name for name, _ in bundle.files()]
    assert names[-1] == IDENTITY_FILE
    assert SIGNING_KEY_FILE in names
    assert "PRIVATE KEY" not in repr(bundle)
    with pytest.raises(IdentityFileInvalid):
        read_signing_key(b"not a key")
