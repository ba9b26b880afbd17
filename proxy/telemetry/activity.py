"""What operators look at: the busiest repositories, the last refusals, when an image was last pulled.

Bounded tables in memory, fed by `Answered`, true since the start of this process. Each answer costs a microsecond or
two: plain dictionaries, no library.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import nlargest

from proxy.events import Answered, Event, Refusal, Repeat, RepositoryUse

#: Repositories counted at most. When there are more, the least used half is forgotten: what is busy stays counted.
MAX_REPOSITORIES = 4_000
#: Manifests, by tag or digest, whose last pull is remembered; the one pulled longest ago goes first.
MAX_PULLS = 20_000
#: Refusals remembered.
MAX_REFUSALS = 200
#: Characters of a refusal's path and sentence that are kept: a client chooses how long they are.
MAX_CHARS = 512


class Activity:
    """Watches events."""

    def __init__(self, wall: Callable[[], float]) -> None:
        """`wall` gives seconds since 1970."""
        self._wall = wall
        #: (project, upstream, repository) -> [requests, body bytes, last_at]
        self._uses: dict[tuple[str, str, str], list[float]] = {}
        #: (project, upstream, repository, tag or digest) -> when
        self._pulls: dict[tuple[str, str, str, str], float] = {}
        self._refusals: deque[Refusal] = deque(maxlen=MAX_REFUSALS)

    def observe(self, event: Event) -> None:
        """Count one event."""
        if not isinstance(event, Answered):
            return
        if event.outcome == "denied":
            self._refused(event)
        elif event.repository and event.status < 400:
            self._used(event, self._wall())

    def repeats(self, said: Answered) -> Repeat | None:
        """How to count that `said` was answered once more."""
        if not said.repository:
            return None
        return lambda request_id, remote, at: self._used(said, at)

    def busiest(self, n: int) -> list[RepositoryUse]:
        """The `n` repositories with the most requests, the busiest first."""
        most = nlargest(n, self._uses.items(), key=lambda item: (item[1][0], item[1][1]))
        return [RepositoryUse(*key, int(use[0]), int(use[1]), use[2]) for key, use in most]

    def refusals(self, n: int) -> list[Refusal]:
        """The last `n` refusals, the latest first."""
        return [self._refusals[-i] for i in range(1, min(n, len(self._refusals)) + 1)]

    def last_pull(self, project: str, upstream: str, repository: str, target: str) -> float | None:
        """When a manifest was last sent under this tag or digest, since 1970; None when not since the start."""
        return self._pulls.get((project, upstream, repository, target))

    def _used(self, event: Answered, now: float) -> None:
        key = (event.project, event.upstream, event.repository)
        use = self._uses.get(key)
        if use is None:
            if len(self._uses) >= MAX_REPOSITORIES:
                self._forget_the_least()
            use = self._uses[key] = [0, 0, 0.0]
        use[0] += 1
        use[1] += event.n_bytes
        use[2] = now
        if event.kind == "manifest" and event.method == "GET":
            pulled = (*key, event.path.partition("?")[0].rpartition("/")[2])
            self._pulls.pop(pulled, None)  # the order of the table is that of the last pulls
            if len(self._pulls) >= MAX_PULLS:
                del self._pulls[next(iter(self._pulls))]
            self._pulls[pulled] = now

    def _forget_the_least(self) -> None:
        kept = nlargest(MAX_REPOSITORIES // 2, self._uses.items(), key=lambda item: item[1][0])
        self._uses = dict(kept)

    def _refused(self, event: Answered) -> None:
        self._refusals.append(
            Refusal(
                self._wall(),
                event.remote,
                event.method[:32],
                event.path[:MAX_CHARS],
                event.project,
                event.rule,
                event.upstream,
                event.repository,
                event.error[:MAX_CHARS],
            )
        )
