"""Counts what happened, for /metrics and for status. The names are a contract (product.md).

Plain dictionaries while requests run, the metrics library's own format when somebody asks: a labelled child of the
library costs a lock and a lookup per request, and the warm manifest path has some 40 microseconds in all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.events import Answered, Event, Evicted, Repeat, TagHeld, TransferEnded, UpstreamAsked, UpstreamBytes

#: Seconds until the whole answer had left. The fine end is a warm manifest, the coarse end a layer over a slow link.
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class Tally(Collector):
    """Counters since the start. Labels are bounded: kinds and outcomes are closed sets, upstreams are configured."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()
        self.response_bytes = 0
        self.upstream_requests: Counter[tuple[str, str, str]] = Counter()
        self.upstream_bytes: Counter[str] = Counter()
        self.denied: Counter[tuple[str, str]] = Counter()
        self.refused_moves: Counter[str] = Counter()
        self.evicted_bytes = 0
        self.transfers: Counter[str] = Counter()
        self._latency: dict[str, list[int]] = defaultdict(lambda: [0] * (len(LATENCY_BUCKETS_S) + 1))
        self._latency_sum: Counter[str] = Counter()
        self._gauges: dict[str, tuple[str, float | Mapping[tuple[str, ...], float], tuple[str, ...]]] = {}
        self._counters: dict[str, tuple[str, int]] = {}

    def observe(self, event: Event) -> None:
        """Count one event."""
        if isinstance(event, Answered):
            self._answered(event)
        elif isinstance(event, UpstreamBytes):
            self.upstream_bytes[event.upstream] += event.n_bytes
        elif isinstance(event, UpstreamAsked):
            self.upstream_requests[event.upstream, event.kind, str(event.status) if event.status else "none"] += 1
        elif isinstance(event, TransferEnded):
            self.transfers["failed" if event.failure else "done"] += 1
        elif isinstance(event, TagHeld):
            self.refused_moves[event.project] += 1
        elif isinstance(event, Evicted):
            self.evicted_bytes += event.n_bytes

    def _answered(self, event: Answered) -> None:
        self.requests[event.kind, event.outcome or "none", event.upstream] += 1
        self.response_bytes += event.n_bytes
        self._latency[event.kind][bisect_left(LATENCY_BUCKETS_S, event.seconds)] += 1
        self._latency_sum[event.kind] += event.seconds  # type: ignore[assignment]  # Counter holds floats as well
        if event.outcome == "denied":
            self.denied[event.project, event.rule] += 1

    def repeats(self, said: Answered) -> Repeat:
        """How to count that `said` was answered once more."""
        requests, key, n_bytes = self.requests, (said.kind, said.outcome or "none", said.upstream), said.n_bytes
        latency, bucket = self._latency[said.kind], bisect_left(LATENCY_BUCKETS_S, said.seconds)

        def again(request_id: str, remote: str, at: float) -> None:
            requests[key] += 1
            self.response_bytes += n_bytes
            latency[bucket] += 1

        return again

    def outcomes(self) -> dict[str, int]:
        """Requests by outcome."""
        found: Counter[str] = Counter()
        for (_, outcome, _), n in self.requests.items():
            found[outcome] += n
        return dict(found)

    def gauge(self, name: str, what: str, value: float | Mapping[tuple[str, ...], float], *labels: str) -> None:
        """Set a gauge for the next scrape; with `labels`, `value` maps label values to numbers."""
        self._gauges[name] = (what, value, labels)

    def counter(self, name: str, what: str, n: int) -> None:
        """Set a counter that somebody else keeps, for the next scrape; `name` is without its `_total`."""
        self._counters[name] = (what, n)

    def collect(self) -> Iterable[Metric]:
        """The metrics library's question."""
        yield _counter(
            "breakwater_requests", "Requests of clients.", ("kind", "outcome", "upstream"), self.requests.items()
        )
        yield _counter("breakwater_response_bytes", "Body bytes sent to clients.", (), [((), self.response_bytes)])
        yield _counter(
            "breakwater_upstream_requests",
            "HTTP requests sent to upstreams; status none where no answer came.",
            ("upstream", "kind", "status"),
            self.upstream_requests.items(),
        )
        yield _counter(
            "breakwater_upstream_bytes",
            "Body bytes received from upstreams.",
            ("upstream",),
            [((upstream,), n) for upstream, n in self.upstream_bytes.items()],
        )
        yield _counter("breakwater_evicted_bytes", "Bytes evicted.", (), [((), self.evicted_bytes)])
        yield _counter(
            "breakwater_refused_tag_moves",
            "Moves upstream of tags that are immutable here.",
            ("project",),
            [((project,), n) for project, n in self.refused_moves.items()],
        )
        yield _counter("breakwater_denied", "Requests refused by a rule.", ("project", "rule"), self.denied.items())
        yield _counter(
            "breakwater_transfers",
            "Transfers that ended.",
            ("result",),
            [((result,), n) for result, n in self.transfers.items()],
        )
        for name, (what, n) in self._counters.items():
            yield _counter(name, what, (), [((), n)])
        yield self._histogram()
        for name, (what, value, labels) in self._gauges.items():
            family = GaugeMetricFamily(name, what, labels=labels)
            for words, number in value.items() if isinstance(value, Mapping) else [((), value)]:
                family.add_metric(list(words), number)
            yield family

    def _histogram(self) -> Metric:
        family = HistogramMetricFamily(
            "breakwater_request_duration_seconds", "Seconds until the whole answer had left.", labels=("kind",)
        )
        for kind, counts in self._latency.items():
            total, buckets = 0, []
            for bound, n in zip((*LATENCY_BUCKETS_S, float("inf")), counts, strict=True):
                total += n
                buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
            family.add_metric([kind], buckets, float(self._latency_sum[kind]))
        return family


def _counter(
    name: str, what: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, what, labels=labels)
    for words, n in list(values):
        family.add_metric(list(words), n)
    return family
