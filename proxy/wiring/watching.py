"""Who is told of every event: counters, the upstreams' health, what was busy lately, the log, and the audit log."""

from __future__ import annotations

import asyncio
from pathlib import Path

from proxy.events import Answered, Event, Repeat
from proxy.ports import Clock
from proxy.telemetry.activity import Activity
from proxy.telemetry.audit import Audit, TurningFile, file_bytes
from proxy.telemetry.health import UpstreamHealth
from proxy.telemetry.log import EventLog, LineWriter
from proxy.telemetry.tally import Tally


class Watching:
    """`observe` passes each event on to all of them."""

    def __init__(self, log: EventLog, clock: Clock) -> None:
        self.log = log
        self.tally = Tally()
        self.health = UpstreamHealth(clock.monotonic)
        self.activity = Activity(clock.wall)
        self._clock = clock
        self._audit: Audit | None = None
        self._audit_lines: LineWriter | None = None

    async def open_audit(self, path: Path, n_bytes: int) -> None:
        """Keep an audit log from now on, of at most `n_bytes` on disk. Where it cannot be written there is none, and the
        log says why: a disk that is read-only serves hits, and must not keep us from starting."""
        try:
            file = await asyncio.to_thread(TurningFile, path, max_bytes=file_bytes(n_bytes))
        except OSError as error:
            self.log.say("error", f"there is no audit log: {error.strerror}")
            return
        self._audit_lines = LineWriter(file, at_end=file.close)
        self._audit = Audit(self._audit_lines, self._clock.wall)

    def observe(self, event: Event) -> None:
        """Tell everybody. Never waits, never raises."""
        self.tally.observe(event)
        self.health.observe(event)
        self.activity.observe(event)
        self.log.observe(event)
        if self._audit is not None:
            self._audit.observe(event)

    def repeats(self, said: Answered) -> Repeat:
        """How to tell all whom it concerns that `said` was answered once more: what they leave behind is what `observe`
        would, for a tenth of the work.

        Some 10 microseconds is all that a warm manifest takes (web/ready.py). Making an event of each, and working out
        the same labels and the same line again, took three times that.
        """
        prepared = (self.tally.repeats(said), self.activity.repeats(said), self.log.repeats(said))
        concerned = tuple(repeat for repeat in prepared if repeat is not None)

        def again(request_id: str, remote: str, at: float) -> None:
            for repeat in concerned:
                repeat(request_id, remote, at)

        return again

    async def aclose(self) -> None:
        """Write what is left of the audit log."""
        if self._audit_lines is not None:
            await asyncio.to_thread(self._audit_lines.close)
