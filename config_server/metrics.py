"""What the configuration server counts. Labels: methods, the routes' templates, statuses, enumerated words."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from protocol.operator_messages import DiskStatus, MachineStatus, ProcessServerList, RpoStatus

_METHODS: Final = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
_DURATION_BUCKETS_SECONDS: Final = (0.002, 0.01, 0.05, 0.25, 1.0, 5.0, 30.0, 60.0)


class RequestOutcome:
    """Of one request; 500 until it has an answer."""

    __slots__ = ("status",)

    def __init__(self) -> None:
        self.status = 500


class ConfigServerMetrics:
    """Registered once per program."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "farpoint_config_server_requests_total",
            "Requests answered, by method, route and status",
            ("method", "route", "status"),
            registry=registry,
        )
        self._durations = Histogram(
            "farpoint_config_server_request_duration_seconds",
            "How long requests took, long polls included, by route",
            ("route",),
            buckets=_DURATION_BUCKETS_SECONDS,
            registry=registry,
        )
        self._machines = Gauge(
            "farpoint_config_server_machines", "Machines, by whether they are heard", ("heard",), registry=registry
        )
        self._quarantined = Gauge(
            "farpoint_config_server_quarantined_machines",
            "Machines as which two agents have reported",
            registry=registry,
        )
        self._process_servers = Gauge(
            "farpoint_config_server_process_servers",
            "Process servers, by whether they are heard",
            ("heard",),
            registry=registry,
        )
        self._disks = Gauge(
            "farpoint_config_server_disks", "Protected disks, by RPO status", ("rpo",), registry=registry
        )
        self._oldest = Gauge(
            "farpoint_config_server_rpo_age_seconds_max",
            "Age of the newest recovery point of the disk that is worst off, of those whose age is known",
            registry=registry,
        )
        self._open_orders = Gauge(
            "farpoint_config_server_open_orders", "Publications not yet reported as done", registry=registry
        )
        self.long_polls = Gauge("farpoint_config_server_long_polls", "Long polls held", registry=registry)
        self.clock_jumps = Gauge(
            "farpoint_config_server_clock_jumps", "How often the clock was set since the start", registry=registry
        )

    @contextmanager
    def request(self, method: str, route: str) -> Iterator[RequestOutcome]:
        """Measures one request. route: a template of the table, or `unknown`."""
        outcome = RequestOutcome()
        begin = time.monotonic()
        try:
            yield outcome
        finally:
            self._durations.labels(route).observe(time.monotonic() - begin)
            known_method = method if method in _METHODS else "other"
            self._requests.labels(known_method, route, str(outcome.status)).inc()

    def observe(
        self, machines: Sequence[MachineStatus], disks: Sequence[DiskStatus], process_servers: ProcessServerList
    ) -> None:
        """What the views say now."""
        self._quarantined.set(sum(one.is_quarantined for one in machines))
        _count(self._machines, [not one.is_silent for one in machines])
        _count(self._process_servers, [not one.is_silent for one in process_servers.process_servers])
        protected = [disk for disk in disks if disk.is_protected]
        tally = Tally(disk.rpo.status for disk in protected)
        for status in RpoStatus:
            self._disks.labels(status.value).set(tally[status])
        self._oldest.set(max((disk.rpo.age_seconds or 0.0 for disk in protected), default=0.0))
        self._open_orders.set(sum(one.open_orders for one in process_servers.process_servers))


def _count(gauge: Gauge, heard: list[bool]) -> None:
    gauge.labels("yes").set(heard.count(True))
    gauge.labels("no").set(heard.count(False))
