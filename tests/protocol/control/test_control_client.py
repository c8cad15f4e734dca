"""The control client against servers that misbehave: every answer is a typed error, and none takes for ever."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from aiohttp import web

from protocol.control import BODY_BYTES_MAX
from protocol.control_errors import (
    AnswerMalformed,
    JoinTokenUsed,
    RefusedByServer,
    ServerNotTrusted,
    ServerUnreachable,
    ServerUnwell,
)
from protocol.errors import CertificateUnusable, InvalidValue, ReplicationError
from protocol.operator_messages import MachineList
from protocol.transport.control_client import ControlConnection, check_server_url, client_context
from protocol.transport.operator_client import OperatorClient

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
AUTHORITY = trustme.CA(key_type=trustme.KeyType.ECDSA)
AUTHORITY_PEM = AUTHORITY.cert_pem.bytes()


@asynccontextmanager
async def answering(answer: Answer, *, name: str = "127.0.0.1") -> AsyncIterator[str]:
    """A TLS server that gives `answer` to everything; its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert(name, key_type=trustme.KeyType.ECDSA).configure_cert(context)
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield f"https://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def problem(code: str, status: int, **fields: object) -> Answer:
    async def answer(request: web.Request) -> web.Response:
        body = {
            "type": "about:blank", "title": "t", "status": status, "code": code, "detail": "why", "hint": "do this",
            "is_retryable": True, "fields": fields, "added_later": 1,
        }  # fmt: skip
        return web.json_response(body, status=status, content_type="application/problem+json")

    return answer


def plain(body: bytes, *, status: int = 200, content_type: str = "application/json") -> Answer:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=body, status=status, content_type=content_type)

    return answer


async def redirect(request: web.Request) -> web.Response:
    return web.Response(status=302, headers={"Location": "https://127.0.0.1:1/"})


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(BODY_BYTES_MAX // 65536 + 2):
        await response.write(bytes(65536))
    return response


async def cut_off(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def ask(url: str, *, seconds: float = 10.0) -> MachineList:
    async with OperatorClient(
        server_url=url, authority_pem=AUTHORITY_PEM, token="t", request_seconds_max=seconds
    ) as operator:
        return await operator.machines()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (plain(b"{}"), AnswerMalformed),
        (plain(b"<html>"), AnswerMalformed),
        (plain(b"<html>", status=502, content_type="text/html"), AnswerMalformed),
        (plain(b"{}", status=400, content_type="application/problem+json"), AnswerMalformed),
        (redirect, AnswerMalformed),
        (endless, AnswerMalformed),
        (cut_off, ServerUnreachable),
        (problem("server-unwell", 503, reason="busy"), ServerUnwell),
        (problem("of-a-newer-server", 503), ServerUnwell),
        (problem("of-a-newer-server", 409), RefusedByServer),
        (problem("join-token-used", 409, token="7"), JoinTokenUsed),
        (problem("join-token-used", 409), RefusedByServer),
    ],
)
async def test_every_bad_answer_has_its_error(answer: Answer, kind: type[ReplicationError]) -> None:
    async with answering(answer) as url:
        with pytest.raises(kind) as caught:
            await ask(url)
    assert type(caught.value) is kind


async def test_a_refusal_of_an_unknown_kind_keeps_what_the_server_says() -> None:
    async with answering(problem("of-a-newer-server", 409)) as url:
        with pytest.raises(RefusedByServer, match="of-a-newer-server: why") as caught:
            await ask(url)
    assert (caught.value.hint, caught.value.is_retryable) == ("do this", True)


async def test_a_good_answer_may_have_fields_of_a_newer_server() -> None:
    async with answering(plain(b'{"now_ns": 1, "machines": [], "added_later": {}}')) as url:
        assert (await ask(url)).machines == ()


async def test_an_answer_that_does_not_come_is_given_up() -> None:
    never = asyncio.Event()

    async def silent(request: web.Request) -> web.Response:
        await never.wait()
        return web.Response()

    async with answering(silent) as url:
        with pytest.raises(ServerUnreachable, match="in time"):
            await ask(url, seconds=0.2)


async def test_a_certificate_for_another_name_is_not_trusted() -> None:
    async with answering(plain(b"{}"), name="elsewhere.example") as url:
        with pytest.raises(ServerNotTrusted):
            await ask(url)


async def test_an_unusable_authority_or_credential_is_named(tmp_path: Path) -> None:
    with pytest.raises(CertificateUnusable):
        client_context(authority_pem=b"nothing")
    with pytest.raises(CertificateUnusable, match="absent"):
        client_context(authority_pem=AUTHORITY_PEM, credentials_path=str(tmp_path / "absent"))
    (tmp_path / "bad").write_text("bad")
    with pytest.raises(CertificateUnusable, match="bad"):
        client_context(authority_pem=AUTHORITY_PEM, credentials_path=str(tmp_path / "bad"))


@pytest.mark.parametrize(
    "url",
    [
        "http://h:1", "h:1", "https://", "https://h/path", "https://h?x=1", "https://u@h", "https://h:0",
        "https://h:99999", "https://h#f", "",
    ],
)  # fmt: skip
def test_only_an_https_origin_is_a_servers_url(url: str) -> None:
    with pytest.raises(InvalidValue):
        check_server_url(url)
    with pytest.raises(InvalidValue):
        ControlConnection(server_url=url, context=client_context(authority_pem=AUTHORITY_PEM))


@pytest.mark.parametrize("url", ["https://h", "https://h:8443/", "https://[::1]:8443"])
def test_a_servers_url_is_kept_without_its_trailing_slash(url: str) -> None:
    assert check_server_url(url) == url.rstrip("/")
