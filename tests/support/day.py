"""A day in the life of a cluster, by a clock that is an argument: the same pod starts with Breakwater and without.

The model. All nodes leave through one address, to which Docker Hub grants `limit` manifest GETs in any six hours; HEADs
and blobs are free, as they are there. A pod start pulls an image by its tag, with Kubernetes' default policies: images
with a moving tag are asked about each time (a HEAD), others only when the node does not have them. A node that lacks
what the tag means gets the index, the manifest of its platform, and the blobs. Nodes are replaced all day by empty
ones; some tags move at noon; upstream is gone for two hours. Nobody retries: a pull fails when one of its requests
does. Everything is drawn from a seed, and the same draws are used for both days.

Nothing of Breakwater is modelled: its engine runs, with its breaker and its budget, over a store in memory.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from proxy.engine.guarded import GuardedUpstream
from proxy.errors import BreakwaterError, Throttled, Unreachable
from proxy.oci.digest import Digest
from proxy.oci.names import Repository, Tag
from proxy.ports import Upstream
from proxy.upstream.answers import Budget
from tests.support import images
from tests.support.clock import ManualClock
from tests.support.engine import HOST, FakeUpstream, engine, route, whole

HOUR_S = 3600.0
TAG = Tag("1")


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the day is."""

    n_nodes: int = 500
    n_images: int = 60
    n_starts: int = 20_000
    #: Of the images, how many have a moving tag, and how many of those really move at noon.
    n_always: int = 20
    n_moved: int = 10
    replaced_per_hour: int = 10
    limit: int = 100
    window_s: float = 6 * HOUR_S
    outage: tuple[float, float] = (14 * HOUR_S, 16 * HOUR_S)
    seed: int = 7


@dataclass(slots=True)
class Outcome:
    """What a day came to."""

    pulls: int = 0
    failed: int = 0
    failed_in_outage: int = 0
    upstream: Counter[str] = field(default_factory=Counter)
    refused: int = 0

    @property
    def n_upstream(self) -> int:
        """Requests that reached upstream's door, or would have if it had been there."""
        return sum(self.upstream.values())


class Hub(FakeUpstream):
    """Docker Hub as one address sees it."""

    def __init__(self, shape: Shape, clock: ManualClock, outcome: Outcome) -> None:
        super().__init__(HOST)
        self._shape = shape
        self._clock = clock
        self._outcome = outcome
        self._counted: deque[float] = deque()
        self.quote: Budget | None = None

    def forgive(self) -> None:
        """All is granted again."""
        self._counted.clear()

    async def _ask(self, kind: str, repository: Repository, what: str, offset: int = 0) -> None:
        now, shape = self._clock.monotonic(), self._shape
        self._outcome.upstream[kind] += 1
        if shape.outage[0] <= now < shape.outage[1]:
            raise Unreachable("the outage", upstream=HOST)
        while self._counted and self._counted[0] <= now - shape.window_s:
            self._counted.popleft()
        if kind == "manifest":
            if len(self._counted) >= shape.limit:
                self._outcome.refused += 1
                raise Throttled("toomanyrequests", upstream=HOST)
            self._counted.append(now)
        self.quote = Budget(shape.limit, shape.limit - len(self._counted), int(shape.window_s))


@dataclass(frozen=True, slots=True)
class _App:
    repository: Repository
    is_always: bool
    versions: tuple[images.Image, images.Image]


def _apps(shape: Shape) -> list[_App]:
    def version(seed: int) -> images.Image:
        return images.index([images.image(seed, (64, 32), architecture="amd64")])

    return [
        _App(Repository.parse(f"library/app{n}"), n < shape.n_always, (version(2 * n), version(2 * n + 1)))
        for n in range(shape.n_images)
    ]


#: Asks for a tag's manifest, a manifest by digest, a blob.
_Ways = tuple[
    Callable[[Repository], Awaitable[str]],
    Callable[[Repository, Digest], Awaitable[None]],
    Callable[[Repository, Digest], Awaitable[None]],
    Callable[[Repository], Awaitable[None]],
]


async def _day(shape: Shape, clock: ManualClock, hub: Hub, outcome: Outcome, ways: _Ways) -> None:
    head, manifest, blob, by_tag = ways
    chance = random.Random(shape.seed)
    apps = _apps(shape)
    for app in apps:
        hub.put(app.versions[0], str(TAG), repository=app.repository)
    by_digest = {image.digest: image for app in apps for image in app.versions}
    weights = [1 / (rank + 1) for rank in range(len(apps))]
    starts = sorted(chance.uniform(0, 24 * HOUR_S) for _ in range(shape.n_starts))
    has: list[dict[str, str]] = [{} for _ in range(shape.n_nodes)]
    n_replaced, has_moved = 0, False
    order = list(range(len(apps)))
    chance.shuffle(order)
    for at in starts:
        await clock.advance(at - clock.monotonic())
        while n_replaced < int(at / HOUR_S * shape.replaced_per_hour):
            has[chance.randrange(shape.n_nodes)].clear()
            n_replaced += 1
        if not has_moved and at >= 12 * HOUR_S:
            has_moved = True
            for app in apps[: shape.n_moved]:
                hub.put(app.versions[1], str(TAG), repository=app.repository)
        app = apps[order[chance.choices(range(len(apps)), weights)[0]]]
        node = has[chance.randrange(shape.n_nodes)]
        name = app.repository.value
        if name in node and not app.is_always:
            continue
        outcome.pulls += 1
        try:
            digest = await head(app.repository)
            if node.get(name) == digest:
                continue
            await by_tag(app.repository)
            for child in by_digest[digest].children:
                await manifest(app.repository, Digest.parse(child.digest))
                for each in child.all_blobs():
                    await blob(app.repository, Digest.of(each.content))
            node[name] = digest
        except BreakwaterError:
            outcome.failed += 1
            outcome.failed_in_outage += shape.outage[0] <= at < shape.outage[1]


async def without(shape: Shape) -> Outcome:
    """Every node asks upstream itself."""
    clock, outcome = ManualClock(monotonic=0.0), Outcome()
    hub = Hub(shape, clock, outcome)

    async def head(repository: Repository) -> str:
        return str((await hub.manifest_head(repository, TAG)).digest)

    async def manifest(repository: Repository, digest: Digest) -> None:
        await hub.manifest(repository, digest)

    async def by_tag(repository: Repository) -> None:
        await hub.manifest(repository, TAG)

    async def blob(repository: Repository, digest: Digest) -> None:
        await (await hub.blob(repository, digest)).close()

    await _day(shape, clock, hub, outcome, (head, manifest, blob, by_tag))
    return outcome


async def through_breakwater(shape: Shape, *, is_warm: bool = False) -> Outcome:
    """Every node asks one Breakwater, which is empty in the morning, or (`is_warm`) has yesterday's images."""
    clock, outcome = ManualClock(monotonic=0.0), Outcome()
    hub = Hub(shape, clock, outcome)
    guard: Upstream = GuardedUpstream(
        hub,
        host=HOST,
        address="hub",
        clock=clock,
        chance=lambda: 0.5,
        observe=lambda _: None,
        quote=lambda: hub.quote,
    )
    async with engine(ports={HOST: guard}, clock=clock) as running:
        origin = running.origin()

        async def head(repository: Repository) -> str:
            return str((await running.tags.resolve(route(repository), origin, TAG)).held.descriptor.digest)

        async def by_tag(repository: Repository) -> None:
            await head(repository)

        async def manifest(repository: Repository, digest: Digest) -> None:
            await running.manifests.get(route(repository), origin, digest)

        async def blob(repository: Repository, digest: Digest) -> None:
            await whole(await running.blobs.open(route(repository), origin, digest))

        if is_warm:
            await _yesterday(shape, hub, (head, manifest, blob, by_tag))
            outcome.upstream.clear()
        await _day(shape, clock, hub, outcome, (head, manifest, blob, by_tag))
    return outcome


async def _yesterday(shape: Shape, hub: Hub, ways: _Ways) -> None:
    """Each image was pulled once, as far as the limit let it; what that spent is granted again by now."""
    _, manifest, blob, by_tag = ways
    for app in _apps(shape):
        hub.put(app.versions[0], str(TAG), repository=app.repository)
        await by_tag(app.repository)
        for child in app.versions[0].children:
            await manifest(app.repository, Digest.parse(child.digest))
            for each in child.all_blobs():
                await blob(app.repository, Digest.of(each.content))
        hub.forgive()


def table(shape: Shape, outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """The two days beside each other, in Markdown."""
    lines = ["| | pulls | failed | of them in the outage | manifest GETs | HEADs | blob GETs | answered 429 |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, one in outcomes:
        numbers = (
            one.pulls,
            one.failed,
            one.failed_in_outage,
            one.upstream["manifest"],
            one.upstream["manifest head"],
            one.upstream["blob"],
            one.refused,
        )
        lines.append(f"| {name} | " + " | ".join(f"{number:,}" for number in numbers) + " |")
    hours = (shape.outage[1] - shape.outage[0]) / HOUR_S
    said = (
        f"{shape.n_nodes} nodes, {shape.n_images} images, {shape.n_starts:,} pod starts, {shape.limit} manifest GETs "
    )
    return f"{said}in six hours, an outage of {hours:g} hours.\n\n" + "\n".join(lines)


async def days(shape: Shape) -> list[tuple[str, Outcome]]:
    """The same day three times."""
    return [
        ("directly", await without(shape)),
        ("through Breakwater, empty in the morning", await through_breakwater(shape)),
        ("through Breakwater, with yesterday's images", await through_breakwater(shape, is_warm=True)),
    ]


def main() -> None:
    """Print the table."""
    shape = Shape()
    print(table(shape, asyncio.run(days(shape))))
