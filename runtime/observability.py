"""The HTTP endpoint that operators and Prometheus ask: /metrics, /healthz (it runs), /readyz (it serves, or the
reasons why not).

Invariant: it only reads; nothing that it is asked can change or block the program.
"""

from __future__ import annotations

import errno
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import prometheus_client
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel, ConfigDict, model_validator

from protocol.errors import CannotListen, PortTaken

IDLE_SECONDS_MAX: Final = 75.0
"""How long a connection may wait for its next whole request: longer than Prometheus waits between two by default."""
SHUTDOWN_SECONDS_MAX: Final = 1.0

Readiness = Callable[[], Sequence[str]]
"""The reasons why the program does not serve at the moment; none means ready. Called on the event loop, so it is
quick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenAddress:
    """Where a program listens. Port 0 asks for any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @staticmethod
    def parse(text: str) -> ListenAddress:
        """Reads `host:port` or `[ipv6]:port`. Raises ValueError."""
        host, separator, port = text.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        if not separator or not bare or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{text!r} is not HOST:PORT")
        if (":" in bare) != host.startswith("["):
            raise ValueError(f"{text!r}: an IPv6 address stands in brackets, [::1]:9464")
        if ":" in bare:
            ipaddress.IPv6Address(bare)
        return ListenAddress(host=bare, port=int(port))


class ObservabilitySettings(BaseModel):
    """The `observability` section of every program's settings; each program has its own default port."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str
    """HOST:PORT; an empty text switches the endpoint off."""
    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> ObservabilitySettings:
        if self.address:
            ListenAddress.parse(self.address)
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_certificate_file and tls_key_file go together")
        return self


@contextmanager
def listening(address: ListenAddress) -> Iterator[None]:
    """Turns what the operating system says to bind() within the block into PortTaken or CannotListen."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(host=address.host, port=address.port) from error
        reason = error.strerror or str(error)
        raise CannotListen(host=address.host, port=address.port, reason=reason) from error


@asynccontextmanager
async def observability_endpoint(
    settings: ObservabilitySettings, *, registry: CollectorRegistry, readiness: Readiness
) -> AsyncIterator[ListenAddress | None]:
    """Serves the endpoint for the length of the block; gives the address it really listens on (None: switched off).

    Raises PortTaken or CannotListen.
    """
    if not settings.address:
        yield None
        return
    address = ListenAddress.parse(settings.address)
    # why: the *_created series double the output and say nothing that the process start time does not
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    application = web.Application()
    application.add_routes(
        [
            web.get("/metrics", _metrics(registry)),
            web.get("/healthz", _healthz),
            web.get("/readyz", _readyz(readiness)),
        ]
    )
    runner = web.AppRunner(
        application, access_log=None, keepalive_timeout=IDLE_SECONDS_MAX, shutdown_timeout=SHUTDOWN_SECONDS_MAX
    )
    await runner.setup()
    try:
        with listening(address):
            site = web.TCPSite(runner, address.host, address.port, ssl_context=_tls_context(settings))
            await site.start()
        host, port = runner.addresses[0][:2]
        yield ListenAddress(host=host, port=port)
    finally:
        await runner.cleanup()


def _tls_context(settings: ObservabilitySettings) -> ssl.SSLContext | None:
    if settings.tls_certificate_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.tls_certificate_file, settings.tls_key_file)
    return context


def _metrics(registry: CollectorRegistry) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    return handle


async def _healthz(request: web.Request) -> web.Response:
    return web.json_response({"status": "alive"})


def _readyz(readiness: Readiness) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        reasons = list(readiness())
        body = {"status": "not ready" if reasons else "ready", "reasons": reasons}
        return web.json_response(body, status=503 if reasons else 200)

    return handle
