"""Prometheus metrics: counters kept here, gauges read from the database when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from chunkplan.service.job_states import JobState
from chunkplan.service.kit.clock import Clock

_PLAN_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_RESIDUAL_BUCKETS = (-0.1, -0.05, -0.03, -0.01, 0.0, 0.01, 0.03, 0.05, 0.1, 0.2)


Queue = tuple[Mapping[JobState, int], datetime | None]
"""Number of jobs in each state, and since when the oldest queued one waits."""


class Metrics:
    """The metrics of one server."""

    def __init__(self, queue: Callable[[], Queue], clock: Clock) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "chunkplan_requests", "HTTP requests.", ["method", "route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "chunkplan_request_seconds", "Time to the response.", ["method", "route"], registry=self.registry
        )
        self.plan_seconds = Histogram(
            "chunkplan_plan_seconds", "Time to compute a plan.", buckets=_PLAN_BUCKETS, registry=self.registry
        )
        self.out_of_memory = Counter(
            "chunkplan_out_of_memory", "Attempts that ran out of memory.", ["device"], registry=self.registry
        )
        self.drift = Counter(
            "chunkplan_drift",
            "Attempts that measured more memory than their plan's upper bound.",
            ["device"],
            registry=self.registry,
        )
        self.residual = Histogram(
            "chunkplan_residual_ratio",
            "(predicted - measured) / measured peak, per chunk of finished jobs.",
            buckets=_RESIDUAL_BUCKETS,
            registry=self.registry,
        )
        self.pruned_rows = Counter(
            "chunkplan_pruned_rows", "Rows deleted past their retention.", ["of"], registry=self.registry
        )
        self.planned_bytes = Gauge(
            "chunkplan_device_planned_bytes",
            "Upper bound of what runs on a device.",
            ["device"],
            registry=self.registry,
        )
        self.measured_bytes = Gauge(
            "chunkplan_device_measured_bytes",
            "Highest allocation in the newest step on a device.",
            ["device"],
            registry=self.registry,
        )
        self.registry.register(_QueueCollector(queue, clock))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts a request that was answered."""
        self.requests.labels(method, route, status).inc()
        self.request_seconds.labels(method, route).observe(seconds)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class _QueueCollector(Collector):
    def __init__(self, queue: Callable[[], Queue], clock: Clock) -> None:
        self._queue = queue
        self._clock = clock

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing: registering must not read the database."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Jobs by state and the age of the queue."""
        counted, oldest = self._queue()
        states = GaugeMetricFamily("chunkplan_jobs", "Jobs by state.", labels=["state"])
        for state, count in counted.items():
            states.add_metric([state.value], count)
        yield states
        yield GaugeMetricFamily("chunkplan_queue_depth", "Queued jobs.", value=counted[JobState.QUEUED])
        age = 0.0 if oldest is None else (self._clock.now() - oldest).total_seconds()
        yield GaugeMetricFamily("chunkplan_queue_age_seconds", "Age of the oldest queued job.", value=age)
