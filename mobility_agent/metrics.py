"""What the agent tells Prometheus: per disk what it does, how far it is, what it costs.

Read from the service's status at each scrape, so that nothing in the data path knows of metrics. The label `disk`
has at most DISKS_PER_MACHINE_MAX values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from mobility_agent.reports import disk_state, fault_report
from mobility_agent.service import AgentService
from protocol.control import DiskState
from protocol.vocabulary import Consistency

_GAUGES: Final[dict[str, tuple[str, str]]] = {
    "size_bytes": ("farpoint_agent_disk_size_bytes", "Size of the disk"),
    "backlog_bytes": ("farpoint_agent_disk_backlog_bytes", "Changed and not yet committed to cache storage"),
    "copied_bytes": ("farpoint_agent_disk_copied_bytes", "How far the running copy-in is; 0 when none runs"),
    "copy_total_bytes": ("farpoint_agent_disk_copy_total_bytes", "What the running copy-in covers; 0 when none runs"),
    "epoch": ("farpoint_agent_disk_epoch", "Epoch of the disk's history"),
    "durable_sequence": ("farpoint_agent_disk_durable_sequence", "Newest change set that the process server keeps"),
    "committed_sequence": ("farpoint_agent_disk_committed_sequence", "Newest change set readable in cache storage"),
    "is_settled": ("farpoint_agent_disk_is_settled", "1 if the newest round ended settled"),
    "is_throttled": ("farpoint_agent_disk_is_throttled", "1 while frames wait for credit of the process server"),
}
_COUNTERS: Final[dict[str, tuple[str, str]]] = {
    "read_bytes": ("farpoint_agent_disk_read_bytes_total", "Read from the disk since the program began"),
    "sent_bytes": ("farpoint_agent_disk_sent_bytes_total", "Frame bodies sent since the program began"),
    "rounds": ("farpoint_agent_disk_rounds_total", "Rounds that were sent whole since the program began"),
    "settled_rounds": (
        "farpoint_agent_disk_settled_rounds_total",
        "Rounds that ended settled, on live disks by a validated copy, since the program began",
    ),
    "audit_alarms": (
        "farpoint_agent_disk_audit_alarms_total",
        "Times that tracking was found to have missed writes, which were read again, since the program began",
    ),
    "points": ("farpoint_agent_disk_points_total", "Recovery points marked since the program began"),
}


class AgentMetrics(Collector):
    """Registers itself."""

    def __init__(self, registry: CollectorRegistry, service: AgentService) -> None:
        self._service = service
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        known = [status for status in self._service.protection if status.disk is not None]
        replicated = [status.replication for status in known if status.replication is not None]
        yield self._connections()
        control = GaugeMetricFamily(
            "farpoint_agent_control_reachable", "1 if the newest call of the configuration server succeeded"
        )
        control.add_metric([], float(self._service.control_error is None))
        yield control
        for field, (name, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["disk"])
            for status in replicated:
                gauge.add_metric([status.disk], float(getattr(status, field)))
            yield gauge
        for field, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["disk"])
            for status in replicated:
                counter.add_metric([status.disk], float(getattr(status, field)))
            yield counter
        resyncs = CounterMetricFamily(
            "farpoint_agent_disk_resyncs_total",
            "Times that everything had to be compared anew since the program began, by cause",
            labels=["disk", "cause"],
        )
        sources = GaugeMetricFamily("farpoint_agent_disk_source", "1 for the source in use", labels=["disk", "source"])
        for status in replicated:
            for cause, count in status.resyncs.items():
                resyncs.add_metric([status.disk, cause], float(count))
            if status.source:
                sources.add_metric([status.disk, status.source], 1.0)
        yield resyncs
        yield sources
        yield from self._freezes()
        states = GaugeMetricFamily("farpoint_agent_disk_state", "1 for the disk's state", labels=["disk", "state"])
        errors = GaugeMetricFamily("farpoint_agent_disk_error", "1 for the disk's error", labels=["disk", "code"])
        for status in replicated:
            for state in DiskState:
                states.add_metric([status.disk, state.value], float(disk_state(status) is state))
            if status.error is not None:
                errors.add_metric([status.disk, fault_report(status.error).code], 1.0)
        yield states
        yield errors

    def _freezes(self) -> Iterator[Metric]:
        totals = self._service.freezes
        freezes = CounterMetricFamily(
            "farpoint_agent_freezes_total",
            "Times that file systems were to be frozen since the program began, by the least that a disk got",
            labels=["result"],
        )
        for result in ("failed", *(consistency.value for consistency in Consistency)):
            freezes.add_metric([result], float(totals.results[result]))
        yield freezes
        yield CounterMetricFamily(
            "farpoint_agent_frozen_seconds_total",
            "How long file systems were frozen since the program began",
            value=totals.frozen_seconds,
        )
        yield GaugeMetricFamily(
            "farpoint_agent_frozen_longest_seconds",
            "The longest that they were frozen at once since the program began",
            value=totals.longest_seconds,
        )

    def _connections(self) -> Metric:
        gauge = GaugeMetricFamily(
            "farpoint_agent_connected", "1 while a connection to the process server is up", labels=["process_server"]
        )
        for name, is_up in self._service.connected.items():
            gauge.add_metric([name], float(is_up))
        return gauge
