"""The HTTP connections under the Azure SDK.

Invariants: a request is sent once, whatever becomes of it (`RetryingStore` alone repeats); neither a peer that reads
nothing nor one that is gone holds a request for longer than the silence that is allowed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp.connector import AddrInfoType
from azure.core.pipeline import PipelineRequest
from azure.core.pipeline.transport import AioHttpTransport


class ConnectionBroken(aiohttp.ClientConnectionError):
    """The connection ended while a request or its answer was on the way."""


class AnswerBroken(aiohttp.ClientPayloadError):
    """The connection ended in the middle of an answer's body."""


def make_transport(*, connect_seconds_max: float, silence_seconds_max: float) -> AioHttpTransport:
    """Needs a running event loop. Whoever closes the SDK's client closes it."""

    def make_socket(address: AddrInfoType) -> socket.socket:
        made = socket.socket(family=address[0], type=address[1], proto=address[2])
        # why: aiohttp bounds how long it waits for an answer, not for a peer that takes the request's body no further
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(silence_seconds_max * 1000))
        return made

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(socket_factory=make_socket),
        cookie_jar=aiohttp.DummyCookieJar(),
        # why: as the SDK makes its own; proxies by the usual environment variables, bodies as they lie in the store
        trust_env=True,
        auto_decompress=False,
        middlewares=(_send_once,),
    )
    return AioHttpTransport(session=session, connection_timeout=connect_seconds_max, read_timeout=silence_seconds_max)


async def _send_once(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        # why: aiohttp repeats a PUT by itself after these two, though the service may have done it
        raise ConnectionBroken(str(error)) from error


def asked_once() -> Callable[[PipelineRequest[Any]], None]:
    """A `raw_request_hook` for one download.

    The SDK's downloader asks again by itself when a body breaks off, twice and whatever its retry settings are; this
    raises AnswerBroken instead.
    """
    asked: set[str] = set()

    def hook(request: PipelineRequest[Any]) -> None:
        part = request.http_request.headers.get("x-ms-range", "")
        if part in asked:
            raise AnswerBroken("the answer broke off")
        asked.add(part)

    return hook
