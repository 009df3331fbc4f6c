"""Metrics: one registry a process, names that begin with `oncepay_`, children bound once and not looked up per request.

The metrics of HTTP routes are plain integers of the one event loop, turned into Prometheus' families only when `/metrics` is
read: half a microsecond a request instead of four.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import REGISTRY, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

__all__ = ["ERRORS", "READY", "RequestMetrics", "exposition"]

disable_created_metrics()  # type: ignore[no-untyped-call]

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

ERRORS = Counter("oncepay_errors", "Errors answered, by problem type.", ["type"])
READY = Gauge("oncepay_ready", "1 while /readyz answers 200.")


class RequestMetrics:
    """Answers of one route by status, and the time they took."""

    __slots__ = ("by_status", "method", "route", "seconds", "seen")

    def __init__(self, method: str, route: str) -> None:
        self.method = method
        self.route = route
        self.by_status: dict[int, int] = {}
        self.seen = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self.seconds = 0.0
        _requests.add(self)

    def done(self, status: int, seconds: float) -> None:
        """One answer more. Only from the event loop's thread."""
        self.seen[bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
        self.seconds += seconds
        by_status = self.by_status
        by_status[status] = by_status.get(status, 0) + 1


class _Requests(Collector):
    """All routes of this process."""

    def __init__(self) -> None:
        self._routes: dict[tuple[str, str], RequestMetrics] = {}

    def add(self, metrics: RequestMetrics) -> None:
        self._routes[metrics.method, metrics.route] = metrics

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        answers = CounterMetricFamily(
            "oncepay_http_requests", "Answers given, by route and status.", labels=["method", "route", "status"]
        )
        times = HistogramMetricFamily("oncepay_http_request_seconds", "Time from request to answer.", labels=["method", "route"])
        bounds = [*(str(bound) for bound in LATENCY_BUCKETS_S), "+Inf"]
        for (method, route), metrics in self._routes.items():
            for status, count in metrics.by_status.items():
                answers.add_metric([method, route, str(status)], count)
            buckets = [(bound, float(count)) for bound, count in zip(bounds, accumulate(metrics.seen), strict=True)]
            times.add_metric([method, route], buckets=buckets, sum_value=metrics.seconds)
        yield answers
        yield times


_requests = _Requests()
REGISTRY.register(_requests)


def exposition() -> bytes:
    """All metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
