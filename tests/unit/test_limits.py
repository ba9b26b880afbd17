"""engine/limits.py: what one project may take of the fetching."""

from __future__ import annotations

import asyncio

import pytest

from proxy.engine.limits import Limit, ProjectLimits, Turns
from proxy.rules.bandwidth import Bandwidth
from proxy.rules.routes import ProjectRoute
from tests.support.clock import ManualClock
from tests.support.engine import FakeUpstream, engine, route


async def entered(turns: Turns, gate: asyncio.Event, order: list[int], number: int) -> None:
    """Come in, say so, stay until the gate opens."""
    async with turns:
        order.append(number)
        await gate.wait()


async def settle() -> None:
    """Give everybody turns to run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_so_many_at_once_and_the_next_in_the_order_of_coming() -> None:
    """The limit is exact, and nobody overtakes."""
    turns = ProjectLimits(ManualClock(), {"team": Limit(transfers=2)}).turn("team")
    gates = [asyncio.Event() for _ in range(5)]
    order: list[int] = []
    tasks = [asyncio.get_running_loop().create_task(entered(turns, gates[n], order, n)) for n in range(5)]
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
    turns = Turns()
    turns.most = 1
    gate = asyncio.Event()
    order: list[int] = []
    loop = asyncio.get_running_loop()
    first, second, third = (loop.create_task(entered(turns, gate, order, n)) for n in range(3))
    await settle()
    second.cancel()
    await settle()
    first.cancel()  # lets third in, which is cancelled before it runs
    await asyncio.sleep(0)
    third.cancel()
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert len(turns) == 0
    gate.set()
    await entered(turns, gate, order, 9)
    assert order[-1] == 9


async def test_limits_change_while_transfers_run() -> None:
    """A reload holds at once: more room lets in who waits, less keeps the next one out."""
    limits = ProjectLimits(ManualClock(), {"team": Limit(1, Bandwidth.always(100.0))})
    turns, share = limits.turn("team"), limits.share("team")
    gate = asyncio.Event()
    order: list[int] = []
    tasks = [asyncio.get_running_loop().create_task(entered(turns, gate, order, n)) for n in range(4)]
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
