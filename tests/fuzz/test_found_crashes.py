"""What fuzzing has found, kept: each input once made its parser raise what it does not document, or take too much."""

from __future__ import annotations

import json
import time
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]
import pytest
from pydantic import ValidationError

from mobility_agent.disk_identity import _contents
from protocol import control_errors
from protocol.control import (
    BODY_BYTES_MAX,
    COMMITTED_POINTS_PER_REPORT_MAX,
    DISKS_PER_PROCESS_SERVER_MAX,
    AgentReport,
    ProcessServerReport,
    has_too_many_values,
    reason_of,
)
from protocol.operator_messages import Problem
from tests.fuzz.registry import TARGETS
from tests.fuzz.target import run_bounded
from tests.fuzz.vault_targets import vector

_AUTHORITY_KEY: Final = json.loads(vector("authority-key.json"))
_UNKNOWN_KEY_TYPE: Final = (
    b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDk2VwBCIEICGh2SupR3tsBHAeHRi3trHELAH0wglFNCZrDrl708re\n"
    b"-----END PRIVATE KEY-----\n"
)
_UNKNOWN_TO_OPENSSL: Final = (
    b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VvBCIEIOUZdohQY3lqjx37qnlmNF0Gpj5HeabRcG9MCJBPmhMB"
    b"-----END PRIVATE KEY-----"
)
_GPT_FAR_AWAY: Final = bytes(512) + b"EFI PART".ljust(72, b"\0") + b"\xff" * 8 + b"\x04\0\0\0\x80\0\0\0" + bytes(512)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


FOUND: Final = {
    "a nested identity file": ("identity-file", b"[" * 100_000),
    "a signing key of a type that nobody knows": ("signing-key-file", _UNKNOWN_KEY_TYPE),
    "an authority key that is not ASCII": (
        "authority-key",
        json.dumps({**_AUTHORITY_KEY, "private_key": "ü"}, ensure_ascii=False).encode(),
    ),
    "a settings file nested deeply": ("settings-file", b"\x00a = " + b"[" * 5000),
    "a settings file with a number of 5000 digits": ("settings-file", b"\x00store = " + b"9" * 5000),
    "a size beyond all floats": ("settings-file", b"\x00cache_bytes_max = " + b"9" * 400),
    "a flag nested deeply": ("settings-flags", b"store=" + b"[" * 5000),
    "a flag with a number of 5000 digits": ("settings-flags", b"store=[" + b"9" * 5000 + b"]"),
    "flags that are a value and a section at once": ("settings-flags", b"log=1\nlog.level=info"),
    "a store URL with half an address": ("azure-address", b"azure://[account/container"),
    "a store URL with letters that only look like a slash": ("azure-address", "azure://a＃b/container".encode()),
    "an endpoint with half an address": ("azure-address", b"azure://account/container?endpoint=http://["),
    "an endpoint whose port is none": ("azure-address", b"azure://account/container?endpoint=https://h:x"),
    "an account key that is not ASCII": ("azure-address", "azure://account/container\n\n\nü".encode()),
    "a server URL with half an address": ("server-url", b"https://["),
    "a refusal with a field that is called self": (
        "refusal",
        b'{"type":"t","title":"t","status":404,"code":"not-found","detail":"d","hint":"h","is_retryable":false,'
        b'"fields":{"self":1,"what":"w","identifier":"i"}}',
    ),
    "a partition table that begins behind every disk": ("disk-sectors", _GPT_FAR_AWAY.ljust(1024, b"\0")),
    "a file system on the last bytes of a disk": ("disk-sectors", b"XFSB"),
    "a signing key that OpenSSL has no word for": ("signing-key-file", _UNKNOWN_TO_OPENSSL),
    "a signed grant whose epoch is nested": (
        "signed-record",
        b"\x80" + msgpack.packb([1, *[bytes(16)] * 3, _nested(400), *[0] * 7]),
    ),
    "an endpoint behind blanks": (
        "azure-address",
        b"azure://account/container?endpoint=%20%20http://127.0.0.1:10000/a",
    ),
    "a checkpoint of the cache that is no list of pairs": ("cache-payload", b"\x02\x91\x01"),
    "a checkpoint of the cache with an end below zero": ("cache-payload", b"\x02\x91\x92\x00\xff"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_found_crash_is_refused_now(name: str) -> None:
    target, data = FOUND[name]
    run_bounded(TARGETS[target], data)


def test_a_certificate_request_of_another_version_is_refused() -> None:
    request = TARGETS["certificate-request"].seeds()[0]
    lines = request.decode().split("\n")
    altered = "\n".join([lines[0], lines[1].replace("CAQAw", "CAQIw", 1), *lines[2:]])
    assert altered.encode() != request
    with pytest.raises(control_errors.CertificateRequestInvalid):
        TARGETS["certificate-request"].run(altered.encode())


def refusal_cost(model: type[Any], body: bytes) -> tuple[float, str]:
    begun = time.process_time()
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(body)
    reason = reason_of(caught.value)
    return time.process_time() - begun, reason


def test_a_body_of_more_values_than_any_report_has_is_not_even_parsed() -> None:
    """It once took a minute of the event loop and ten GiB."""
    for item in (b"{}", b"1", b'"k":1', b"[", b'{"k":'):
        body = b'{"disks":[' + b",".join([item] * (BODY_BYTES_MAX // (len(item) + 1)))
        assert has_too_many_values(body)


def test_a_list_is_refused_at_its_first_bad_item() -> None:
    seconds, reason = refusal_cost(AgentReport, b'{"disks":[' + b"{}," * 100_000 + b"{}]}")
    assert seconds < 1.0
    assert not reason.startswith("100")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_refusal_with_what_is_no_number_is_no_refusal(number: str) -> None:
    """It was read, and written again as null."""
    text = f'{{"type":"t","title":"t","status":404,"code":"not-found","detail":"d","fields":{{"what":{number}}}}}'
    with pytest.raises(ValidationError):
        Problem.model_validate_json(text)


def test_a_refusal_names_an_unknown_field_in_few_words() -> None:
    seconds, reason = refusal_cost(AgentReport, b'{"' + b"k" * 100_000 + b'":1}')
    assert seconds < 1.0
    assert len(reason) < 1000
    many = b"{" + b",".join(b'"k%d":1' % number for number in range(60_000)) + b"}"
    assert refusal_cost(AgentReport, many)[1].startswith("60003 of its fields")


def test_the_largest_report_has_no_more_values_than_a_body_may() -> None:
    identifier = "ab" * 16
    position = {
        "disk": identifier, "epoch": 1, "durable_sequence": 0, "committed_sequence": 0, "cached_bytes": 0,
        "received_bytes": 0, "stored_bytes": 0,
    }  # fmt: skip
    point = {
        "disk": identifier,
        "epoch": 1,
        "sequence": 1,
        "point": identifier,
        "instant_ns": 1,
        "consistency": "crash",
    }
    largest = ProcessServerReport.model_validate_json(
        json.dumps(
            {
                "version": "1", "host": "h", "port": 1, "cache_bytes": 0, "cache_limit_bytes": 1,
                "positions": [position] * DISKS_PER_PROCESS_SERVER_MAX,
                "committed_points": [point] * COMMITTED_POINTS_PER_REPORT_MAX,
                "faults": [{"code": "a", "detail": ', [{ ' * 300, "hint": "a: b"}] * 64,
            }
        )
    )  # fmt: skip
    assert not has_too_many_values(largest.model_dump_json().encode())


def test_a_disk_is_never_read_behind_its_end_by_what_its_own_sectors_say() -> None:
    offsets: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        offsets.append(offset)
        return _GPT_FAR_AWAY[offset : offset + length]

    assert _contents(read_at, 512)[0] is not None
    assert max(offsets) <= 2**57
