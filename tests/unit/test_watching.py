"""wiring/watching.py: what is told of an answer given again leaves behind what the event of it would have."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from proxy.events import Answered
from proxy.telemetry.log import EventLog, LineWriter
from proxy.wiring.watching import Watching
from tests.support.clock import ManualClock

AT = 1_800_000_000.25
FIRST = Answered(
    "first",
    "192.0.2.1",
    "GET",
    "/v2/library/alpine/manifests/1?ns=docker.io",
    'an "agent"\n',
    kind="manifest",
    status=200,
    n_bytes=428,
    outcome="hit",
    upstream="docker.io",
    repository="library/alpine",
    project="default",
    caller="ci",
)
OTHERS = {
    "a tag's answer": FIRST,
    "by digest, HEAD": replace(FIRST, method="HEAD", n_bytes=0, path="/v2/library/alpine/manifests/sha256:0"),
    "no repository": replace(FIRST, repository="", upstream="", caller=""),
    "hostile": replace(FIRST, path='/v2/\r\n{"x":"\u2028', user_agent="\ud800"),
}
#: id, address, and the time of each time it was given again. An interface's name is part of a link-local address.
AGAIN = [("id-1", "10.0.0.1", AT), ("id-2", 'fe80::1%"x', AT + 0.5), ("id-1", "unix", AT + 61.9)]


class Written:
    """Everything that watchers leave behind."""

    def __init__(self, *, as_json: bool, requests: str) -> None:
        self.clock = ManualClock()
        self.stream = io.StringIO()
        self.writer = LineWriter(self.stream)
        self.log = EventLog(self.writer, self.clock.wall, as_json=as_json, level="info", requests=requests)
        self.watching = Watching(self.log, self.clock)

    def all(self) -> tuple[Any, ...]:
        """Metrics, what operators look at, and the log; closes the log."""
        registry = CollectorRegistry()
        registry.register(self.watching.tally)
        self.writer.close()
        activity = self.watching.activity
        pulled = activity.last_pull("default", "docker.io", "library/alpine", "1")
        return generate_latest(registry), activity.busiest(9), pulled, self.stream.getvalue()


@pytest.mark.parametrize("first", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
@pytest.mark.parametrize("requests", ["all", "errors", "off"])
def test_the_short_way_leaves_the_same_behind_as_the_event(first: Answered, as_json: bool, requests: str) -> None:
    """Metrics to the number, tables to the time, log lines to the byte."""
    short, long = (Written(as_json=as_json, requests=requests) for _ in range(2))
    repeat = short.watching.repeats(first)
    for request_id, remote, at in AGAIN:
        for each in (short, long):
            each.clock.jump(at - each.clock.wall())
        repeat(request_id, remote, short.clock.wall())
        long.watching.observe(replace(first, request_id=request_id, remote=remote))
    assert short.all() == long.all()


def test_lines_follow_the_settings_of_the_log() -> None:
    """A reload changes the log; an answer that was prepared before it is written the new way."""
    written = Written(as_json=True, requests="all")
    repeat = written.watching.repeats(FIRST)
    repeat("a", "unix", AT)
    written.log.adjust(as_json=False, level="info", requests="all")
    repeat("b", "unix", AT)
    written.log.adjust(as_json=True, level="info", requests="off")
    repeat("c", "unix", AT)
    first, second = written.all()[-1].splitlines()
    assert first.startswith('{"time": "2027-01-15T08:00:00.250+00:00"') and second.endswith(" hit b")
