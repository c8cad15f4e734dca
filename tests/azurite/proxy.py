"""Stands between the Azure SDK and Azurite, counts every request, and breaks those that a test names.

Requests are whole HTTP messages here, so that "the reply is lost after the commit" is exactly that: Azurite has
answered, and the client never hears it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from farpoint.demo.azurite import Azurite

PIECES = 20
SLOW_SECONDS = 0.01
"""Between the pieces of a slow reply."""


class Fault(enum.StrEnum):
    """What happens to one request."""

    NONE = "none"
    LOST_REPLY = "lost reply"
    """Done by the service; the connection is reset instead of its answer."""
    GATEWAY_ERROR = "gateway error"
    """Done by the service; somebody in between answers 500 instead."""
    BUSY = "busy"
    """503 ServerBusy with Retry-After, not done."""
    THROTTLED = "throttled"
    """429 with Retry-After, not done."""
    RESET = "reset"
    """The connection is reset when the request's head is there; not done."""
    HALF_REQUEST = "half request"
    """Half of the body reaches the service, then both connections are reset."""
    HALF_REPLY = "half reply"
    """Done; half of the answer's body comes, then the connection is reset."""
    SILENCE = "silence"
    """Done by the service; the client gets no answer and no end."""
    DEAF = "deaf"
    """The request's body is not read, and nothing is answered."""
    SLOW = "slow"
    """Done; the answer comes in small pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it arrived. name: of the object within its container; empty for the container itself."""

    number: int
    method: str
    name: str
    is_listing: bool
    range: str
    seconds: float
    """When it came, monotonic."""


@dataclass(slots=True)
class FaultyProxy:
    """`azurite` is what the client takes for the service. `choose` decides about each request."""

    azurite: Azurite
    retry_after: str = ""
    """The header of BUSY and THROTTLED; none if empty."""
    choose: Callable[[Request], Fault] = lambda request: Fault.NONE
    requests: list[tuple[Request, Fault]] = field(default_factory=list)
    answers: list[tuple[Request, int]] = field(default_factory=list)
    """What the service itself said, whether anybody heard it or not."""

    def of(self, method: str, name: str = "") -> list[Request]:
        """The requests of this method, to this object if it is given."""
        return [one for one, _ in self.requests if one.method == method and name in ("", one.name)]

    @property
    def created(self) -> list[str]:
        """The names for which the service said so."""
        return [request.name for request, status in self.answers if request.method == "PUT" and status == 201]


@asynccontextmanager
async def faulty_proxy(service: Azurite) -> AsyncIterator[FaultyProxy]:
    """A proxy on a port of its own; all its connections end with the block."""
    host, _, port = service.origin.removeprefix("http://").partition(":")
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not over.is_set() and await _exchange(proxy, reader, writer, host, int(port), over):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    async with contextlib.AsyncExitStack() as stack:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2**20)
        address = server.sockets[0].getsockname()
        proxy = FaultyProxy(Azurite(origin=f"http://127.0.0.1:{address[1]}"))
        await stack.enter_async_context(server)
        try:
            yield proxy
        finally:
            over.set()
            server.close()
            if hasattr(server, "abort_clients"):
                server.abort_clients()


async def _exchange(
    proxy: FaultyProxy,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    host: str,
    port: int,
    over: asyncio.Event,
) -> bool:
    """One request and its answer; whether the connection goes on."""
    head = await reader.readuntil(b"\r\n\r\n")
    request, body_bytes = _parse(head, len(proxy.requests))
    fault = proxy.choose(request)
    proxy.requests.append((request, fault))
    if fault is Fault.RESET:
        return False
    if fault is Fault.DEAF:
        await over.wait()
        return False
    body = await reader.readexactly(body_bytes)
    if fault in (Fault.BUSY, Fault.THROTTLED):
        writer.write(_refusal(fault, proxy.retry_after))
        await writer.drain()
        return True
    if fault is Fault.HALF_REQUEST:
        await _forward(head, body[: len(body) // 2], host, port, is_whole=False)
        return False
    reply = await _forward(head, body, host, port, is_whole=True)
    proxy.answers.append((request, int(reply.split(b" ", 2)[1])))
    return await _answer(fault, reply, writer, over)


async def _answer(fault: Fault, reply: bytes, writer: asyncio.StreamWriter, over: asyncio.Event) -> bool:
    """What the client gets of an answer of the service; Azurite closed its connection, so it goes on never."""
    if fault is Fault.SILENCE:
        await over.wait()
    elif fault is Fault.GATEWAY_ERROR:
        writer.write(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
    elif fault is Fault.HALF_REPLY:
        head, separator, body = reply.partition(b"\r\n\r\n")
        writer.write(head + separator + body[: len(body) // 2])
        await writer.drain()
    elif fault is Fault.SLOW:
        step = len(reply) // PIECES + 1
        for first in range(0, len(reply), step):
            writer.write(reply[first : first + step])
            await writer.drain()
            await asyncio.sleep(SLOW_SECONDS)
    elif fault is Fault.NONE:
        writer.write(reply)
        await writer.drain()
    if fault in (Fault.NONE, Fault.SLOW, Fault.GATEWAY_ERROR):
        writer.write_eof()
        await writer.wait_closed() if writer.is_closing() else None
        # why: what was written must arrive before the connection is cut
        while writer.transport.get_write_buffer_size():
            await asyncio.sleep(0.001)
        writer.close()
    return False


async def _forward(head: bytes, body: bytes, host: str, port: int, *, is_whole: bool) -> bytes:
    """The service's whole answer, on a connection for this request alone; nothing for a request that is cut off."""
    lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
    upstream_reader, upstream_writer = await asyncio.open_connection(host, port)
    try:
        upstream_writer.write(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
        await upstream_writer.drain()
        return await upstream_reader.read() if is_whole else b""
    finally:
        upstream_writer.transport.abort()


def _parse(head: bytes, number: int) -> tuple[Request, int]:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    parts = urlsplit(target)
    _, _, name = parts.path.strip("/").partition("/")[2].partition("/")
    request = Request(
        number=number,
        method=method,
        name=name,
        is_listing=parse_qs(parts.query).get("comp") == ["list"],
        range=headers.get("x-ms-range", ""),
        seconds=time.monotonic(),
    )
    return request, int(headers.get("content-length", "0"))


def _refusal(fault: Fault, retry_after: str) -> bytes:
    status, code = ("503 Busy", "ServerBusy") if fault is Fault.BUSY else ("429 Too Many", "TooManyRequests")
    waiting = f"Retry-After: {retry_after}\r\n" if retry_after else ""
    return f"HTTP/1.1 {status}\r\nx-ms-error-code: {code}\r\n{waiting}Content-Length: 0\r\n\r\n".encode()
