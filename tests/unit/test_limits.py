"""engine/limits.py: what one project may take of the fetching."""

from __future__ import annotations

import asyncio

import pytest

from proxy.engine.limits import Dues, Limit, ProjectLimits
from proxy.engine.tasks import TaskOwner
from proxy.errors import Denied
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, RepositoryPath
from proxy.rules.bandwidth import Bandwidth
from proxy.rules.gates.allowlist import Rules
from proxy.rules.quota import Allowance
from proxy.rules.routes import ProjectRoute
from tests.support.clock import ManualClock
from tests.support.engine import Engine, FakeUpstream, Script, engine, route, whole


async def entered(limits: ProjectLimits, gate: asyncio.Event, order: list[int], number: int) -> None:
    """Come in for project team, say so, stay until the gate opens."""
    async with dues_of(limits, "team").turn():
        order.append(number)
        await gate.wait()


def limits_of(limits: dict[str, Limit], clock: ManualClock | None = None) -> ProjectLimits:
    """Of projects, by a clock that stands still."""
    return ProjectLimits(clock or ManualClock(), TaskOwner(print), limits)


def dues_of(limits: ProjectLimits, *projects: str) -> Dues:
    """Those of a transfer that these projects read."""
    return limits.dues(projects[0], lambda: set(projects))


async def settle() -> None:
    """Give everybody turns to run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_so_many_at_once_and_the_next_in_the_order_of_coming() -> None:
    """The limit is exact, and nobody overtakes."""
    limits = limits_of({"team": Limit(transfers=2)})
    turns = limits.turns("team")
    gates = [asyncio.Event() for _ in range(5)]
    order: list[int] = []
    tasks = [asyncio.get_running_loop().create_task(entered(limits, gates[n], order, n)) for n in range(5)]
    await settle()
    assert order == [0, 1] and len(turns) == 2
    gates[1].set()
    await settle()
    assert order == [0, 1, 2] and len(turns) == 2
    for gate in gates:
        gate.set()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4] and len(turns) == 0


async def test_who_gives_up_waiting_takes_no_place() -> None:
    """Cancelled while waiting, or in the very moment of being let in."""
    limits = limits_of({"team": Limit(transfers=1)})
    turns = limits.turns("team")
    gate = asyncio.Event()
    order: list[int] = []
    loop = asyncio.get_running_loop()
    first, second, third = (loop.create_task(entered(limits, gate, order, n)) for n in range(3))
    await settle()
    second.cancel()
    await settle()
    first.cancel()  # lets third in, which is cancelled before it runs
    await asyncio.sleep(0)
    third.cancel()
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert len(turns) == 0
    gate.set()
    await entered(limits, gate, order, 9)
    assert order[-1] == 9


async def test_limits_change_while_transfers_run() -> None:
    """A reload holds at once: more room lets in who waits, less keeps the next one out."""
    limits = limits_of({"team": Limit(1, Bandwidth.always(100.0))})
    share = limits.share("team")
    gate = asyncio.Event()
    order: list[int] = []
    tasks = [asyncio.get_running_loop().create_task(entered(limits, gate, order, n)) for n in range(4)]
    await settle()
    assert order == [0]
    limits.allow({"team": Limit(3, Bandwidth.always(200.0))})
    await settle()
    assert order == [0, 1, 2] and share.rate == 200.0
    limits.allow({})
    await settle()
    assert order == [0, 1, 2, 3] and share.rate is None
    gate.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("most", [1, 2])
async def test_a_projects_transfers_queue_and_others_do_not_wait_for_them(most: int) -> None:
    """Concurrent transfers of one project are bounded; another project has its own."""
    upstream = FakeUpstream()
    digests = [upstream.put_blob(bytes([n]) * 5000) for n in range(6)]
    async with engine(upstream, projects=(ProjectRoute("team"), ProjectRoute("other"))) as running:
        running.blobs._projects.allow({"team": Limit(transfers=most)})
        upstream.gate = asyncio.Event()
        upstream.gate.set()
        for digest in digests:  # links, so that what follows asks for nothing but the bodies
            await running.blobs.size(route(project="team"), running.origin(), digest)
        upstream.gate = asyncio.Event()
        team = [asyncio.get_running_loop().create_task(running.read(digest, project="team")) for digest in digests[:5]]
        await settle()
        for _ in range(50):
            await asyncio.sleep(0)
        assert upstream.count("blob") == most
        other = asyncio.get_running_loop().create_task(running.read(digests[5], project="other"))
        while upstream.count("blob head") < 7:
            await asyncio.sleep(0)
        upstream.gate.set()
        assert len(await other) == 5000
        assert [len(body) for body in await asyncio.gather(*team)] == [5000] * 5


# -- a transfer with readers of several projects -----------------------------------------------------------------------

KIB = 1024


def at(rate: float) -> Limit:
    """So many bytes a second, at any time of day."""
    return Limit(bandwidth=Bandwidth.always(rate))


MANY = (ProjectRoute("slow"), ProjectRoute("fast"), ProjectRoute("free"))


@pytest.mark.parametrize(
    ("readers", "seconds"),
    [
        pytest.param(("slow",), 10.0, id="one project keeps to its rate"),
        pytest.param(("fast",), 2.5, id="and another to its own"),
        pytest.param(("slow", "fast"), 2.5, id="two have the rate of the more generous"),
        pytest.param(("slow", "free"), 0.0, id="one without a rate waits for nobody"),
    ],
)
async def test_every_piece_is_paid_for_by_one_of_the_projects_that_read_it(
    readers: tuple[str, ...], seconds: float
) -> None:
    """Bytes count once, whoever reads them; none of the projects exceeds its rate, and none slows another one down."""
    clock = ManualClock()
    limits = limits_of({"slow": at(100), "fast": at(400)}, clock)
    dues, began = dues_of(limits, *readers), clock.monotonic()
    for _ in range(10):
        waiting = asyncio.get_running_loop().create_task(dues.reached(dues.charge(100)))
        await settle()
        while not waiting.done():
            await clock.advance(0.25)
        await waiting
    assert clock.monotonic() - began == pytest.approx(seconds, abs=0.11)


async def test_whoever_joins_does_not_wait_for_the_rate_of_the_one_who_began() -> None:
    """A reader of a project without a rate joins in the middle of a long wait: the rest comes at once; and what was
    charged for that wait is given back."""
    upstream = FakeUpstream(piece_bytes=KIB)
    content = bytes(64 * KIB)
    digest = upstream.put_blob(content)
    async with engine(upstream, projects=MANY) as running:
        limits = running.blobs._projects
        limits.allow({"slow": at(1)})
        first = await running.open(digest, project="slow")
        await settle()
        while running.clock.sleepers < 1:
            await asyncio.sleep(0)
        assert next(running.blobs.running()).received < 3 * KIB
        assert await running.read(digest, project="free") == content
        assert await whole(first) == content
        assert upstream.count("blob") == 1
        assert limits.share("slow").wait_for_s(0) <= 2 * KIB, "a piece or two, not all of it"


async def test_a_transfer_goes_on_at_its_last_readers_rate_when_nobody_reads_it() -> None:
    """The generous one left: what is finished for the store's sake is not free of limits for ever."""
    clock = ManualClock()
    limits = limits_of({"slow": at(100)}, clock)
    reading = {"slow", "free"}
    dues = limits.dues("slow", lambda: set(reading))
    dues.charge(1000)
    reading.discard("free")
    dues.charge(1000)
    assert limits.share("slow").wait_for_s(0) == 10
    reading.clear()
    dues.charge(1000)
    assert limits.share("slow").wait_for_s(0) == 20


async def test_a_transfer_that_queues_begins_with_the_first_turn_of_any_of_its_projects() -> None:
    """Whoever joins brings a turn of their own project; it is given back to that one."""
    upstream = FakeUpstream()
    busy, wanted = (upstream.put_blob(bytes([n]) * 5000) for n in range(2))
    async with engine(upstream, projects=MANY) as running:
        limits = running.blobs._projects
        limits.allow({"slow": Limit(transfers=1), "fast": Limit(transfers=1)})
        gate = asyncio.Event()
        upstream.scripts[busy] = [Script(5000, [gate, bytes([0]) * 5000])]
        loop = asyncio.get_running_loop()
        first = loop.create_task(running.read(busy, project="slow"))
        while upstream.count("blob", busy) < 1:
            await asyncio.sleep(0)
        queued = loop.create_task(running.read(wanted, project="slow"))
        for _ in range(50):
            await asyncio.sleep(0)
        assert upstream.count("blob", wanted) == 0
        assert len(await running.read(wanted, project="fast")) == 5000
        assert len(await queued) == 5000 and not first.done()
        await settle()
        assert (len(limits.turns("slow")), len(limits.turns("fast"))) == (1, 0)
        gate.set()
        await first
        await running.idle()
        assert (len(limits.turns("slow")), len(limits.turns("fast"))) == (0, 0)


async def joined(running: Engine, digest: Digest, project: str) -> bytes:
    """What a reader of a project gets, judged by that project's rules."""
    _, opened = await running.pull.blob(BlobGet(RepositoryPath(project, "library/alpine"), digest, None))
    return await whole(opened)


async def test_whoever_joins_a_transfer_is_judged_by_their_own_project() -> None:
    """Largest blob and quota are each reader's own, whoever began and whatever was allowed to them."""
    upstream = FakeUpstream()
    content = bytes(20 * KIB)
    digest = upstream.put_blob(content)
    gate = asyncio.Event()
    upstream.scripts[digest] = [Script(len(content), [gate, content])]
    rules = [Rules("slow", max_blob=10 * KIB)]
    allowances = {"fast": Allowance(KIB, "deny")}
    async with engine(upstream, projects=MANY, rules=rules, allowances=allowances) as running:
        first = asyncio.get_running_loop().create_task(joined(running, digest, "free"))
        while not list(running.blobs.running()):
            await asyncio.sleep(0)
        with pytest.raises(Denied, match="max_blob"):
            await joined(running, digest, "slow")
        with pytest.raises(Denied, match="quota"):
            await joined(running, digest, "fast")
        gate.set()
        assert await first == content
        for project, rule in (("slow", "max_blob"), ("fast", "quota")):
            with pytest.raises(Denied, match=rule):
                await joined(running, digest, project)
        assert upstream.count("blob") == 1
