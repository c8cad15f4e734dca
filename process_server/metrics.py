"""What a process server counts. Every metric is declared here and listed in docs/metrics.md.

Invariant: no label is a disk, a machine or an address; labels are stages, states and error codes of this program.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from runtime.metrics import StageMetrics


class ProcessServerMetrics:
    """One set per registry. `stages` measures seal, synchronize, gather, upload and open."""

    def __init__(self, registry: CollectorRegistry, *, monotonic_seconds: Callable[[], float] = time.monotonic) -> None:
        self.stages = StageMetrics(registry, monotonic_seconds=monotonic_seconds)
        self.connections = Gauge(
            "farpoint_process_server_connections", "Agents connected at present", registry=registry
        )
        self.open_disks = Gauge(
            "farpoint_process_server_open_disks", "Disks that a connected agent has open", registry=registry
        )
        self.stopped_disks = Gauge(
            "farpoint_process_server_stopped_disks", "Disks that must not be extended here any more", registry=registry
        )
        self.received_bytes = Counter(
            "farpoint_process_server_received_bytes_total", "Frame bodies taken from agents", registry=registry
        )
        self.sealed_bytes = Counter(
            "farpoint_process_server_sealed_bytes_total", "Frame records made of them", registry=registry
        )
        self.acknowledged_change_sets = Counter(
            "farpoint_process_server_acknowledged_change_sets_total", "Change sets made durable", registry=registry
        )
        self.synchronizations = Counter(
            "farpoint_process_server_synchronizations_total", "Batches synchronized in the cache", registry=registry
        )
        self.cache_bytes = Gauge(
            "farpoint_process_server_cache_bytes", "What the cache's files occupy on disk", registry=registry
        )
        self.cache_limit_bytes = Gauge(
            "farpoint_process_server_cache_limit_bytes", "What they may occupy", registry=registry
        )
        self.cache_write_errors = Counter(
            "farpoint_process_server_cache_write_errors_total",
            "Cache files abandoned after a failed write or synchronize",
            registry=registry,
        )
        self.segments_waiting = Gauge(
            "farpoint_process_server_segments_waiting", "Closed segments not yet committed", registry=registry
        )
        self.committed_segments = Counter(
            "farpoint_process_server_committed_segments_total", "Segments committed", registry=registry
        )
        self.committed_bytes = Counter(
            "farpoint_process_server_committed_bytes_total", "Bytes of committed segments", registry=registry
        )
        self.upload_failures = Counter(
            "farpoint_process_server_upload_failures_total",
            "Attempts to upload a segment that failed, by error code",
            ("code",),
            registry=registry,
        )
        self.refusals = Counter(
            "farpoint_process_server_refusals_total",
            "Disks and connections refused or closed, by error code",
            ("code",),
            registry=registry,
        )
        self.unreported_points = Gauge(
            "farpoint_process_server_unreported_points",
            "Committed bookmarks that the configuration server has not yet acknowledged",
            registry=registry,
        )
