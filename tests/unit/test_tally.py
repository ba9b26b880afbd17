"""telemetry/tally.py: events become numbers under the names of product.md."""

from __future__ import annotations

import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from proxy.events import Answered, Evicted, Noticed, TransferEnded, UpstreamAsked, UpstreamBytes
from proxy.telemetry.tally import LATENCY_BUCKETS_S, Tally


def answered(**words: object) -> Answered:
    return Answered("id", "10.0.0.1", "GET", "/", "agent", **words)  # type: ignore[arg-type]


def text(tally: Tally) -> str:
    registry = CollectorRegistry()
    registry.register(tally)
    return generate_latest(registry).decode()


@pytest.fixture
def tally() -> Tally:
    found = Tally()
    for event in [
        answered(kind="manifest", outcome="miss", upstream="docker.io", n_bytes=100, seconds=0.004),
        answered(kind="manifest", outcome="hit", upstream="docker.io", n_bytes=100, seconds=0.0001),
        answered(kind="blob", outcome="coalesced", upstream="docker.io", n_bytes=5000, seconds=200.0),
        answered(kind="manifest", outcome="denied", upstream="", project="team", rule="**:latest"),
        answered(kind="version"),
        UpstreamAsked("docker.io", "manifest", "GET", 200),
        UpstreamAsked("docker.io", "token", "GET", 200),
        UpstreamAsked("docker.io", "blob", "GET", 0),
        UpstreamBytes("docker.io", 5100),
        UpstreamBytes("docker.io", 1),
        TransferEnded("docker.io", "a", "sha256:0", 5000, 1.0, ""),
        TransferEnded("docker.io", "a", "sha256:0", 10, 1.0, "broke"),
        Evicted(2, 300),
        Noticed("info", "nothing to count"),
    ]:
        found.observe(event)  # type: ignore[arg-type]
    for n in (2, 3):
        found.counter("breakwater_somewhere_else", "Kept by somebody else.", n)
    return found


@pytest.mark.parametrize(
    "line",
    [
        'breakwater_requests_total{kind="manifest",outcome="miss",upstream="docker.io"} 1.0',
        'breakwater_requests_total{kind="blob",outcome="coalesced",upstream="docker.io"} 1.0',
        'breakwater_requests_total{kind="version",outcome="none",upstream=""} 1.0',
        "breakwater_response_bytes_total 5200.0",
        'breakwater_upstream_requests_total{kind="manifest",status="200",upstream="docker.io"} 1.0',
        'breakwater_upstream_requests_total{kind="blob",status="none",upstream="docker.io"} 1.0',
        'breakwater_upstream_bytes_total{upstream="docker.io"} 5101.0',
        "breakwater_evicted_bytes_total 300.0",
        "breakwater_somewhere_else_total 3.0",
        'breakwater_denied_total{project="team",rule="**:latest"} 1.0',
        'breakwater_transfers_total{result="done"} 1.0',
        'breakwater_transfers_total{result="failed"} 1.0',
        'breakwater_request_duration_seconds_count{kind="manifest"} 3.0',
        'breakwater_request_duration_seconds_bucket{kind="manifest",le="0.005"} 3.0',
        'breakwater_request_duration_seconds_bucket{kind="blob",le="120.0"} 0.0',
        'breakwater_request_duration_seconds_bucket{kind="blob",le="+Inf"} 1.0',
        'breakwater_request_duration_seconds_sum{kind="blob"} 200.0',
    ],
)
def test_a_number_stands_under_its_name(tally: Tally, line: str) -> None:
    """product.md: the names are a contract, and a scrape finds them."""
    labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
    name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
    found = [each for each in text(tally).splitlines() if re.match(re.escape(name) + r"[ {]", each)]
    assert any(
        dict(re.findall(r'(\w+)="([^"]*)"', each)) == labels and each.rsplit(" ", 1)[1] == value for each in found
    ), found


def test_outcomes_add_up(tally: Tally) -> None:
    """What status shows is the same numbers."""
    assert tally.outcomes() == {"miss": 1, "hit": 1, "coalesced": 1, "denied": 1, "none": 1}


def test_nothing_that_a_client_chooses_becomes_a_label(tally: Tally) -> None:
    """Bounded labels: a scan of random names must not grow memory, here or in whatever scrapes us."""
    n_before = len(text(tally).splitlines())
    for n in range(1000):
        tally.observe(
            Answered(f"id-{n}", f"10.0.0.{n % 250}", f"M{n}", f"/v2/{n}", f"agent {n}", kind="other", status=404,
                     outcome="failed", repository=f"r{n}")
        )  # fmt: skip
    assert len(text(tally).splitlines()) - n_before < len(LATENCY_BUCKETS_S) + 10


def test_a_gauge_is_what_it_was_last_set_to(tally: Tally) -> None:
    """With labels, each has its own."""
    tally.gauge("breakwater_store_bytes", "Bytes.", 5)
    tally.gauge("breakwater_store_bytes", "Bytes.", 7)
    tally.gauge("breakwater_upstream_up", "Up.", {("docker.io",): 1.0, ("quay.io",): 0.0}, "upstream")
    assert "breakwater_store_bytes 7.0" in text(tally)
    assert 'breakwater_upstream_up{upstream="quay.io"} 0.0' in text(tally)
