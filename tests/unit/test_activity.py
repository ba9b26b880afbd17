"""What is remembered of requests, and that it is bounded whatever clients send."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from proxy.events import Answered
from proxy.telemetry import activity
from proxy.telemetry.activity import MAX_CHARS, MAX_REFUSALS, Activity


def answered(repository: str = "library/alpine", **words: object) -> Answered:
    said = Answered(
        "1", "192.0.2.1", "GET", f"/v2/{repository}/manifests/1?ns=docker.io", "", kind="manifest", status=200
    )
    said.outcome, said.project, said.upstream, said.repository, said.n_bytes = (
        "hit",
        "default",
        "docker.io",
        repository,
        10,
    )
    for name, value in words.items():
        setattr(said, name, value)
    return said


def test_the_busiest_repositories_come_first() -> None:
    """By requests, then by bytes; with the time of the last."""
    clock = count(100)
    seen = Activity(lambda: float(next(clock)))
    for repository in ("a", "b", "b", "c"):
        seen.observe(answered(repository))
    seen.observe(answered("c", kind="blob", n_bytes=5000))
    assert [(u.repository, u.n_requests, u.n_bytes) for u in seen.busiest(2)] == [("c", 2, 5010), ("b", 2, 20)]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param({"status": 404, "outcome": "failed"}, id="not found"),
        pytest.param({"status": 403, "outcome": "denied"}, id="refused"),
        pytest.param({"repository": "", "outcome": ""}, id="not about a repository"),
    ],
)
def test_names_that_anybody_can_make_up_are_not_counted(words: dict[str, Any]) -> None:
    """A scan of random names must push nothing out."""
    seen = Activity(lambda: 0.0)
    seen.observe(answered(**words))
    assert seen.busiest(10) == []


def test_the_busy_stay_counted_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least used half is forgotten."""
    monkeypatch.setattr(activity, "MAX_REPOSITORIES", 10)
    seen = Activity(lambda: 0.0)
    for _ in range(3):
        seen.observe(answered("busy"))
    for n in range(1000):
        seen.observe(answered(f"once-{n}"))
    assert seen.busiest(1)[0].repository == "busy"
    assert len(seen.busiest(1000)) <= 10


def test_a_pull_is_remembered_by_tag_and_by_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """GETs of manifests; the one pulled longest ago is forgotten first."""
    monkeypatch.setattr(activity, "MAX_PULLS", 2)
    now = count(1)
    seen = Activity(lambda: float(next(now)))
    for repository in ("a", "b", "a", "c"):
        seen.observe(answered(repository))
    seen.observe(answered("c", method="HEAD"))
    assert seen.last_pull("default", "docker.io", "a", "1") == 3.0
    assert seen.last_pull("default", "docker.io", "b", "1") is None
    assert seen.last_pull("default", "docker.io", "c", "1") == 4.0
    assert seen.last_pull("default", "docker.io", "c", "2") is None


def test_refusals_are_kept_latest_first_and_cut() -> None:
    """A client chooses how long its path is, and how often it asks."""
    seen = Activity(lambda: 7.0)
    for n in range(MAX_REFUSALS + 5):
        seen.observe(
            answered(
                outcome="denied", status=403, rule=f"r{n}", path="/v2/" + "x" * 9999, method="M" * 99, error="e" * 9999
            )
        )
    kept = seen.refusals(MAX_REFUSALS * 2)
    assert len(kept) == MAX_REFUSALS
    assert (kept[0].rule, kept[0].at) == (f"r{MAX_REFUSALS + 4}", 7.0)
    assert max(len(kept[0].path), len(kept[0].sentence)) == MAX_CHARS and len(kept[0].method) == 32
