"""The metrics that every program has: its stages, its build, its process.

Invariant: label values come from bounded sets: stage names in the code, outcomes `ok`, `cancelled`, `unexpected` or
an error's code.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from protocol.errors import ReplicationError

DURATION_BUCKETS_SECONDS: Final = (0.0005, 0.002, 0.01, 0.05, 0.25, 1.0, 5.0, 30.0, 120.0)

log = structlog.get_logger(__name__)


class Stage:
    """One run of a stage, while it runs: what it says of itself goes into the metrics and the log line at its end."""

    __slots__ = ("size_bytes",)

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


class StageMetrics:
    """Durations, bytes and outcomes of a program's stages (read, seal, synchronize, upload, …)."""

    def __init__(self, registry: CollectorRegistry, *, monotonic_seconds: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_seconds = monotonic_seconds
        self._durations = Histogram(
            "farpoint_stage_duration_seconds",
            "How long one run of a stage took, by stage and outcome",
            ("stage", "outcome"),
            buckets=DURATION_BUCKETS_SECONDS,
            registry=registry,
        )
        self._bytes = Counter(
            "farpoint_stage_bytes_total", "Bytes that went through a stage", ("stage",), registry=registry
        )

    @contextmanager
    def stage(self, name: str, *, size_bytes: int = 0) -> Iterator[Stage]:
        """Measures the block as one run of stage `name`; its bytes count only if it ends well.

        Whatever is raised in the block is counted by its kind and goes on its way.
        """
        running = Stage(size_bytes)
        begin = self._monotonic_seconds()
        outcome = "unexpected"
        try:
            yield running
            outcome = "ok"
            self._bytes.labels(name).inc(running.size_bytes)
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except ReplicationError as error:
            outcome = error.code
            raise
        except OSError:
            outcome = "os-error"
            raise
        finally:
            duration_seconds = self._monotonic_seconds() - begin
            self._durations.labels(name, outcome).observe(duration_seconds)
            log.debug("stage", stage=name, outcome=outcome, size_bytes=running.size_bytes, seconds=duration_seconds)


def register_certificate_expiry(registry: CollectorRegistry, expires_seconds: Callable[[], float]) -> None:
    """Adds farpoint_certificate_expiry_timestamp_seconds, asked for at each scrape; NaN while it is not known."""
    Gauge(
        "farpoint_certificate_expiry_timestamp_seconds",
        "When this program's own certificate ends, seconds since the Unix epoch",
        registry=registry,
    ).set_function(expires_seconds)


def register_process_metrics(registry: CollectorRegistry, *, program: str) -> None:
    """Adds farpoint_build_info and, read from /proc at each scrape, farpoint_process_* (memory, CPU, open files,
    start)."""
    ProcessCollector(namespace="farpoint", registry=registry)
    build = Gauge(
        "farpoint_build_info", "Always 1; the labels say what runs", ("program", "version"), registry=registry
    )
    build.labels(program, version("farpoint")).set(1)
