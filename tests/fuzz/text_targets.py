"""What people and other programs write: control messages, tokens, identities, requests, settings, units, addresses."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from config_server.authority import CertificateAuthority
from config_server.settings import ConfigServerSettings
from farpoint.settings import FarpointSettings
from mobility_agent.settings import AgentSettings
from process_server.settings import ProcessServerSettings
from protocol import control, enrollment, operator_messages
from protocol.control import DETAIL_LENGTH_MAX, ControlMessage, reason_of
from protocol.control_errors import CertificateRequestInvalid, JoinTokenMalformed
from protocol.enrollment import EnrolledIdentity, IdentityFileInvalid, make_certificate_key, read_signing_key
from protocol.errors import InvalidValue, ReplicationError
from protocol.join_token import JoinToken
from protocol.operator_messages import OperatorReply, Problem
from protocol.transport import tls
from protocol.transport.control_client import check_server_url, refusal_of
from protocol.vocabulary import PeerIdentity, Role, VaultId
from recovery.core.instants import instant_text, parse_instant
from runtime.errors import SecretUnreadable, SettingInvalid, SettingsFileInvalid, SettingUnknown
from runtime.settings import load, parse_assignments
from runtime.units import parse_bytes, parse_seconds
from storage.backends.azure_address import (
    CONNECTION_STRING_VARIABLE,
    KEY_VARIABLE,
    SIGNATURE_VARIABLE,
    read_address,
)
from storage.errors import StoreUrlInvalid
from tests.fuzz.target import Target

VAULT: Final = VaultId("0a" * 16)
_IDENTIFIER: Final = "0b" * 16
SETTINGS: Final = (
    ("process-server", ProcessServerSettings),
    ("mobility-agent", AgentSettings),
    ("config-server", ConfigServerSettings),
    ("farpoint", FarpointSettings),
)


@functools.cache
def models() -> tuple[type[BaseModel], ...]:
    """Every message of the control plane, in the order of their names."""
    found: dict[str, type[BaseModel]] = {
        name: value
        for module in (control, enrollment, operator_messages)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, ControlMessage | OperatorReply)
    }
    return tuple(model for _, model in sorted(found.items()))


def control_message(data: bytes) -> None:
    """The first byte: which message it is taken for. What is refused is told in few words."""
    if not data:
        return
    model = models()[data[0] % len(models())]
    try:
        message = model.model_validate_json(data[1:])
    except ValidationError as error:
        reason = reason_of(error)
        if len(reason) > DETAIL_LENGTH_MAX:
            raise AssertionError("a refusal in many words") from error
        return
    assert model.model_validate_json(message.model_dump_json()) == message


_DISK_IDENTITY: Final = '{"kind":"block_device","size_bytes":4096,"logical_sector_bytes":512,"wwn":"w"}'
_MESSAGES: Final = {
    "DiskRegistration": f'{{"path":"/dev/sda","identity":{_DISK_IDENTITY},"disk":null}}',
    "DiskAssignment": f'{{"disk":"{_IDENTIFIER}","machine":"{_IDENTIFIER}","vault":"{VAULT}","process_server":'
    f'{{"process_server":"{_IDENTIFIER}","host":"h","port":9443}}}}',
    "AgentReport": '{"boot_id":"b","agent_version":"1","host":{"name":"h","processors":1,"memory_bytes":1,"firmware":'
    f'"uefi"}},"disks":[{{"disk":"{_IDENTIFIER}","path":"/d","state":"paused","source":"scan","size_bytes":4096,'
    '"error":{"code":"a-b","detail":"d"}}]}',
    "ProcessServerReport": '{"version":"1","host":"h","port":1,"cache_bytes":0,"cache_limit_bytes":1,'
    f'"positions":[{{"disk":"{_IDENTIFIER}","epoch":1,"durable_sequence":1,"committed_sequence":0,"cached_bytes":0,"received_bytes":0,'
    f'"stored_bytes":0}}],"committed_points":[{{"disk":"{_IDENTIFIER}","epoch":1,"sequence":1,"point":"{_IDENTIFIER}",'
    f'"instant_ns":1,"consistency":"crash"}}],"completed_orders":["{_IDENTIFIER}"]}}',
    "ProcessServerOrders": '{"revision":"","now_ns":1,"heartbeat_seconds":1.0,"renew_certificate":false,'
    f'"grants":["AAAA"],"revoked":{{"number":1}},"orders":[{{"kind":"publish-point","order":"{_IDENTIFIER}","point":"{_IDENTIFIER}",'
    '"record":"AAAA"}]}',
    "EnrollmentRequest": f'{{"token":"{_IDENTIFIER}","role":"agent","name":"n","request_pem":"p",'
    f'"proof":"{"A" * 43}="}}',
    "Problem": '{"type":"t","title":"t","status":404,"code":"not-found","detail":"d","hint":"h","is_retryable":false,'
    '"fields":{"what":"disk","identifier":"x"}}',
    "CertificateRequest": '{"request_pem":"p"}',
    "PauseRequest": '{"is_paused":true}',
}  # fmt: skip


def control_message_seeds() -> list[bytes]:
    names = [model.__name__ for model in models()]
    return [bytes((names.index(name),)) + text.encode() for name, text in _MESSAGES.items()]


def refusal(data: bytes) -> None:
    """A problem description: whatever it says, there is an error for it."""
    assert isinstance(refusal_of(Problem.model_validate_json(data), status=404), ReplicationError)


def join_token(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    assert JoinToken.parse(text).format() == text.strip()


def identity_file(data: bytes) -> None:
    identity = EnrolledIdentity.decode(data)
    assert EnrolledIdentity.decode(identity.encode()) == identity


def _identity() -> bytes:
    peer = PeerIdentity(vault=VAULT, role=Role.AGENT, identifier=_IDENTIFIER)
    return EnrolledIdentity(
        peer=peer, name="n", server_url="https://h:9443", vault_authority_public_key=bytes(32)
    ).encode()


@functools.cache
def _authority() -> CertificateAuthority:
    return CertificateAuthority.make(VAULT, 1_760_000_000_000_000_000)


def certificate_request(data: bytes) -> None:
    """PEM, or what lies in it."""
    identity = PeerIdentity(vault=VAULT, role=Role.AGENT, identifier=_IDENTIFIER)
    text = data.decode("utf-8", "replace")
    _authority().issue(text, identity, name="n", now_ns=1_760_000_000_000_000_000)


def certificate_file(data: bytes) -> None:
    """Whom a program's own certificate speaks for."""
    _file("certificate.pem").write_bytes(data)
    tls._own_identity(_file("certificate.pem"))


def certificate_file_seeds() -> list[bytes]:
    identity = PeerIdentity(vault=VAULT, role=Role.AGENT, identifier=_IDENTIFIER)
    request = make_certificate_key("n").request_pem
    issued = _authority().issue(request, identity, name="n", now_ns=1_760_000_000_000_000_000)
    return [issued.certificate_pem.encode(), _authority().certificate_pem]


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="farpoint-fuzz-")


def _file(name: str) -> Path:
    return Path(_directory().name) / name


def settings_file(data: bytes) -> None:
    """The first byte: whose settings they are."""
    if not data:
        return
    program, kind = SETTINGS[data[0] % len(SETTINGS)]
    _file("settings.toml").write_bytes(data[1:])
    load(kind, program=program, file=_file("settings.toml"), environment={})


def settings_flags(data: bytes) -> None:
    """Lines: KEY=VALUE as a flag, or with a leading + as a variable of the environment."""
    lines = data.decode("utf-8", "surrogateescape").split("\n")[:8]
    flags = parse_assignments([line for line in lines if not line.startswith("+")])
    pairs = (line[1:].partition("=") for line in lines if line.startswith("+"))
    environment = {f"FARPOINT_PROCESS_SERVER_{name}": value for name, _, value in pairs}
    load(ProcessServerSettings, program="process-server", flags=flags, environment=environment)


def quantity(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    values: list[Any] = [text]
    if text.isascii() and text.isdigit() and len(text) < 4000:
        values.append(int(text))
    for value in values:
        for parse in (parse_seconds, parse_bytes):
            try:
                found = parse(value)
            except ValueError:
                continue
            assert math.isfinite(found)
            assert found >= 0


def instant(data: bytes) -> None:
    found = parse_instant(data.decode("utf-8", "surrogateescape"))
    if found is not None and 0 <= found < 2**63:
        assert parse_instant(instant_text(found)) == found


def azure_address(data: bytes) -> None:
    """Lines: the URL, then a connection string, a shared access signature, an account key."""
    url, *secrets = data.decode("utf-8", "surrogateescape").split("\n")
    names = (CONNECTION_STRING_VARIABLE, SIGNATURE_VARIABLE, KEY_VARIABLE)
    address = read_address(url, credentials_file=None, environment=dict(zip(names, secrets, strict=False)))
    assert address.endpoint.lower().startswith(("http://", "https://"))
    assert all(not secret or secret not in repr(address) for secret in secrets if len(secret) > 80)


def server_url(data: bytes) -> None:
    url = check_server_url(data.decode("utf-8", "surrogateescape"))
    assert check_server_url(url) == url


_AZURE: Final = (
    b"azure://account/container/prefix/more",
    b"azure://account/container?endpoint=http://127.0.0.1:10000/account\nAccountName=account;AccountKey=QUJD;"
    b"EndpointSuffix=core.windows.net",
    b"azure://account/container\n\nsv=2020&sig=abc",
    b"azure://account/container\n\n\nQUJD",
)

TEXT_TARGETS: Final = (
    Target(
        name="control-message",
        run=control_message,
        refusals=(),
        seeds=control_message_seeds,
        bytes_max=2**16,
    ),
    Target(
        name="refusal",
        run=refusal,
        refusals=(ValidationError,),
        seeds=lambda: [_MESSAGES["Problem"].encode(), _MESSAGES["Problem"].replace('"what"', '"self"').encode()],
    ),
    Target(
        name="join-token",
        run=join_token,
        refusals=(JoinTokenMalformed,),
        seeds=lambda: [
            JoinToken(identifier=_IDENTIFIER, secret=bytes(range(32)), authority_key_hash=bytes(32)).format().encode()
        ],
    ),
    Target(name="identity-file", run=identity_file, refusals=(IdentityFileInvalid,), seeds=lambda: [_identity()]),
    Target(
        name="signing-key-file",
        run=read_signing_key,
        refusals=(IdentityFileInvalid,),
        seeds=lambda: [enrollment.signing_key_pem(enrollment.make_signing_key())],
    ),
    Target(
        name="certificate-request",
        run=certificate_request,
        refusals=(CertificateRequestInvalid,),
        seeds=lambda: [make_certificate_key("n").request_pem.encode()],
    ),
    Target(
        name="certificate-file",
        run=certificate_file,
        refusals=(ValueError, InvalidValue, *tls.CERTIFICATE_ERRORS),
        seeds=certificate_file_seeds,
    ),
    Target(
        name="settings-file",
        run=settings_file,
        refusals=(SettingsFileInvalid, SettingUnknown, SettingInvalid),
        seeds=lambda: [
            b'\x00store = "file:///s"\ncache_bytes_max = "1.5 GiB"\nlisten = "[::]:9443"\n[log]\nlevel = "info"\n',
            b"\x00[observability]\naddress = '127.0.0.1:9444'\n",
            b"\x01state_directory = '/v'\n",
            b"\x02[log]\nformat = 'json'\n",
            b"\x03a.b.c = [1, 2.5, 1979-05-27T07:32:00Z, {x = 1}]\n",
        ],
        bytes_max=2**14,
    ),
    Target(
        name="settings-flags",
        run=settings_flags,
        refusals=(SettingsFileInvalid, SettingUnknown, SettingInvalid),
        seeds=lambda: [
            b"log.level=debug\ncache_bytes_max=1 TiB\n+IDLE_SECONDS_MAX=60\n+LOG__FORMAT=json",
            b"log={level = 'info'}\nlog.level=info",
            b"uploads_per_disk_max=[1, 2]",
            b"+OBSERVABILITY={}",
        ],
        bytes_max=2**14,
    ),
    Target(
        name="quantity",
        run=quantity,
        refusals=(),
        seeds=lambda: [b"30", b"1.5 GiB", b"250 ms", b"14 d", b"9" * 400],
        bytes_max=512,
    ),
    Target(
        name="instant",
        run=instant,
        refusals=(),
        seeds=lambda: [b"2026-11-20T09:00:00.25Z", b"2026-11-20 09:00:00+02:00", b"0001-01-01T00:00:00-23:59"],
        bytes_max=128,
    ),
    Target(
        name="azure-address",
        run=azure_address,
        refusals=(StoreUrlInvalid, SecretUnreadable),
        seeds=lambda: _AZURE,
    ),
    Target(
        name="server-url",
        run=server_url,
        refusals=(InvalidValue,),
        seeds=lambda: [b"https://server:9443/", b"https://[::1]:9443"],
        bytes_max=512,
    ),
)
