"""The endpoint: metrics, health, readiness with reasons, TLS, a taken port; stages with their outcomes; logs without
secrets.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
import structlog
import trustme
from prometheus_client import CollectorRegistry, Counter
from pydantic import ValidationError

from protocol.errors import CannotListen, ConnectionLost, PortTaken
from runtime.logs import LogFormat, LogLevel, LogSettings, configure_logs
from runtime.metrics import StageMetrics, register_process_metrics
from runtime.observability import ListenAddress, ObservabilitySettings, observability_endpoint

ANY_PORT = ObservabilitySettings(address="127.0.0.1:0")


async def get(url: str, context: ssl.SSLContext | None = None) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url, ssl=context or True) as response:
        return response.status, await response.text()


async def test_metrics_health_and_readiness_are_served() -> None:
    registry = CollectorRegistry()
    Counter("farpoint_example_total", "Examples", registry=registry).inc(3)
    register_process_metrics(registry, program="example")
    reasons = ["no grant yet"]
    async with observability_endpoint(ANY_PORT, registry=registry, readiness=lambda: reasons) as address:
        status, text = await get(f"http://{address}/metrics")
        assert status == 200
        assert "farpoint_example_total 3.0" in text
        assert 'farpoint_build_info{program="example",version="' in text
        assert "farpoint_process_resident_memory_bytes" in text
        assert {line.split("_")[0] for line in text.splitlines() if not line.startswith("#")} == {"farpoint"}
        assert await get(f"http://{address}/healthz") == (200, '{"status": "alive"}')
        status, text = await get(f"http://{address}/readyz")
        assert (status, json.loads(text)) == (503, {"status": "not ready", "reasons": ["no grant yet"]})
        reasons.clear()
        assert (await get(f"http://{address}/readyz"))[0] == 200
        assert (await get(f"http://{address}/other"))[0] == 404
    with pytest.raises(aiohttp.ClientConnectorError):
        await get(f"http://{address}/healthz")


async def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = ObservabilitySettings(address=f"127.0.0.1:{port}")
        with pytest.raises(PortTaken) as caught:
            async with observability_endpoint(settings, registry=CollectorRegistry(), readiness=list):
                pytest.fail("served on a taken port")
        assert (caught.value.host, caught.value.port) == ("127.0.0.1", port)


async def test_an_address_of_another_machine_is_unusable() -> None:
    settings = ObservabilitySettings(address="192.0.2.1:9464")
    with pytest.raises(CannotListen):
        async with observability_endpoint(settings, registry=CollectorRegistry(), readiness=list):
            pytest.fail("served on a foreign address")


async def test_an_empty_address_switches_it_off() -> None:
    settings = ObservabilitySettings(address="")
    async with observability_endpoint(settings, registry=CollectorRegistry(), readiness=list) as address:
        assert address is None


async def test_it_speaks_tls_when_it_has_a_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    settings = ObservabilitySettings(
        address="127.0.0.1:0",
        tls_certificate_file=tmp_path / "certificate.pem",
        tls_key_file=tmp_path / "key.pem",
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with observability_endpoint(settings, registry=CollectorRegistry(), readiness=list) as address:
        assert (await get(f"https://{address}/healthz", context))[0] == 200
    with pytest.raises(ValidationError, match="go together"):
        ObservabilitySettings(address="127.0.0.1:0", tls_key_file=tmp_path / "key.pem")


@pytest.mark.parametrize("text", ["", "9464", ":9464", "host:", "host:x", "host:65536", "::1:9464", "[host]:1", "a:-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|brackets|address|\d"):
        ListenAddress.parse(text)


@pytest.mark.parametrize("text", ["127.0.0.1:0", "localhost:65535", "[::1]:9464"])
def test_an_address_reads_as_it_was_written(text: str) -> None:
    assert str(ListenAddress.parse(text)) == text


def test_a_stage_counts_its_bytes_and_outcomes() -> None:
    now = 0.0
    registry = CollectorRegistry()
    metrics = StageMetrics(registry, monotonic_seconds=lambda: now)
    with metrics.stage("seal", size_bytes=100) as stage:
        stage.size_bytes += 5
        now += 2.0
    for error in (ConnectionLost(peer="p", reason="r"), asyncio.CancelledError(), OSError(), ZeroDivisionError()):
        with pytest.raises(type(error)), metrics.stage("seal", size_bytes=1000):
            raise error

    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"farpoint_stage_{name}", labels)

    assert sample("bytes_total", stage="seal") == 105
    assert sample("duration_seconds_sum", stage="seal", outcome="ok") == 2.0
    for outcome in ("ok", "connection-lost", "cancelled", "os-error", "unexpected"):
        assert sample("duration_seconds_count", stage="seal", outcome=outcome) == 1


@pytest.fixture
def restored_logs() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def configured(log_format: LogFormat = "auto", level: LogLevel = "info") -> io.StringIO:
    stream = io.StringIO()
    configure_logs(LogSettings(format=log_format, level=level), program="example", stream=stream)
    return stream


@pytest.mark.usefixtures("restored_logs")
def test_logs_are_json_lines_with_their_context() -> None:
    stream = configured()
    structlog.get_logger("a.module").bind(disk="d1").info(
        "uploaded", size_bytes=7, error=ConnectionLost(peer="p", reason="r")
    )
    logging.getLogger("library").warning("of %s", "another")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first | {"timestamp": ""} == {
        "event": "uploaded", "level": "info", "logger": "a.module", "program": "example", "disk": "d1",
        "size_bytes": 7, "error": "connection to p lost: r", "timestamp": "",
    }  # fmt: skip
    assert (second["event"], second["level"], second["logger"]) == ("of another", "warning", "library")


@pytest.mark.usefixtures("restored_logs")
def test_the_level_holds_and_exceptions_keep_their_traceback() -> None:
    stream = configured(level="warning")
    log = structlog.get_logger("a.module")
    log.info("not said")
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError:
        log.exception("said")
    (line,) = (json.loads(line) for line in stream.getvalue().splitlines())
    assert line["event"] == "said"
    assert "ZeroDivisionError: a bug" in line["exception"]


@pytest.mark.usefixtures("restored_logs")
def test_loggers_in_use_follow_from_a_first_configuration_to_the_final_one() -> None:
    first = io.StringIO()
    configure_logs(LogSettings(level="warning"), program="example", stream=first, is_final=False)
    log = structlog.get_logger("a.module")
    log.warning("before")
    final = configured(level="info")
    log.info("after")
    assert json.loads(first.getvalue())["event"] == "before"
    assert json.loads(final.getvalue())["event"] == "after"


@pytest.mark.usefixtures("restored_logs")
def test_nothing_secret_is_logged() -> None:
    stream = configured()
    structlog.get_logger("a.module").info(
        "opened",
        token="hunter2",
        join_token="hunter2",
        passphrase="hunter2",
        private_key="hunter2",
        sas_token="hunter2",
        data=b"hunter2",
        url="https://account.example/c?sv=1&sig=hunter2&sp=r",
        connection="AccountName=a;AccountKey=hunter2;",
        token_file="/run/token",
        token_id="t1",
    )
    assert "hunter2" not in stream.getvalue()
    line = json.loads(stream.getvalue())
    assert (line["token_file"], line["token_id"]) == ("/run/token", "t1")
    assert line["url"] == "https://account.example/c?sv=1&sig=[redacted]&sp=r"


@pytest.mark.usefixtures("restored_logs")
def test_a_terminal_gets_text() -> None:
    stream = configured("console")
    structlog.get_logger("a.module").info("uploaded", disk="d1")
    assert "uploaded" in stream.getvalue()
    with pytest.raises(json.JSONDecodeError):
        json.loads(stream.getvalue())
