"""Who somebody is: names and secrets checked against hashes, with a short memory.

A secret costs some 50 ms and 16 MiB to check (rules/secret_hash.py), so checks run in threads, few at a time, and what
they said is remembered for a minute: under a keyed hash, never in the clear. Unknown names cost nothing: kubelets send
a registry's pull secrets to its mirrors unasked (peers.md §5.1), and such a node counts as anonymous.

Failed attempts are slowed and never locked out. The delay grows with the failures of one source against one robot, and
with those of one secret from one source; only a refusal waits, so whoever has the right secret never notices.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cachetools import TTLCache

from proxy.engine.flights import Flights
from proxy.engine.tasks import TaskOwner
from proxy.ports import Clock
from proxy.rules.gates.access import Robot

#: How long a verdict on a secret is remembered, in seconds.
REMEMBERED_S = 60.0
#: Verdicts and failures remembered at a time.
MAX_REMEMBERED = 20_000
#: Checks that run at once: each holds 16 MiB and a processor.
CHECKS_AT_ONCE = 2
#: Failures that cost nothing, then the first delay, which doubles up to the last. Seconds.
FREE_FAILURES, FIRST_DELAY_S, LAST_DELAY_S = 3, 0.25, 5.0
#: How long a failure counts, in seconds.
FAILURES_COUNT_FOR_S = 300.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a name and a secret: `mark` is that of the hash that matched; a refusal waits for `delay_s`."""

    robot: str
    mark: str = ""
    delay_s: float = 0.0


class Robots:
    """Checks secrets. True for this process."""

    def __init__(self, *, key: bytes, clock: Clock, owner: TaskOwner) -> None:
        """`key` is chance of this process: what is remembered under it is of no use to anybody else."""
        self._key = key
        self._clock = clock
        self._remembered: TTLCache[bytes, tuple[Robot, str]] = TTLCache(
            MAX_REMEMBERED, REMEMBERED_S, timer=clock.monotonic
        )
        self._failures: TTLCache[bytes, int] = TTLCache(MAX_REMEMBERED, FAILURES_COUNT_FOR_S, timer=clock.monotonic)
        self._checking: Flights[tuple[Robot, bytes], str] = Flights(owner, "check a secret")
        self._turns = asyncio.Semaphore(CHECKS_AT_ONCE)

    async def check(self, robots: Mapping[str, Robot], name: str, secret: str, source: str) -> Verdict:
        """Who this is: a robot, or "" where name and secret do not belong together. Never raises."""
        robot = robots.get(name)
        if robot is None or robot.is_expired(self._clock.wall()):
            return self._failed(name, secret, source)
        fingerprint = self._fingerprint(name, secret)
        known = self._remembered.get(fingerprint)
        if known is None or known[0] != robot:
            mark = await self._checking.join((robot, fingerprint), lambda: self._match(robot, secret))
            self._remembered[fingerprint] = known = (robot, mark)
        if known[1]:
            return Verdict(name, known[1])
        return self._failed(name, secret, source)

    async def _match(self, robot: Robot, secret: str) -> str:
        async with self._turns:
            for one in robot.hashes:
                if await asyncio.to_thread(one.matches, secret):
                    return one.mark
        return ""

    def _failed(self, name: str, secret: str, source: str) -> Verdict:
        n = 0
        for about in (("robot", source, name), ("secret", source, secret)):
            key = self._fingerprint(*about)
            self._failures[key] = failed = self._failures.get(key, 0) + 1
            n = max(n, failed)
        delay = FIRST_DELAY_S * 2.0 ** min(n - FREE_FAILURES - 1, 30) if n > FREE_FAILURES else 0.0
        return Verdict("", delay_s=min(delay, LAST_DELAY_S))

    def _fingerprint(self, *words: str) -> bytes:
        return hashlib.blake2b(
            "\0".join(words).encode("utf-8", "surrogatepass"), key=self._key, digest_size=16
        ).digest()
