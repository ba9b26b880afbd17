"""engine/flights.py and engine/tasks.py: one asking for many, and tasks that have owners."""

from __future__ import annotations

import asyncio

import pytest

from proxy.engine.flights import Flights
from proxy.engine.tasks import TaskOwner
from proxy.errors import Unreachable
from tests.support.clock import ManualClock


class Question:
    """Counts how often it is asked; answers when told to."""

    def __init__(self) -> None:
        self.n_asked = 0
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __call__(self) -> str:
        self.n_asked += 1
        return await self.answer


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def owner(reports: list[str]) -> TaskOwner:
    return TaskOwner(reports.append)


async def turns(n: int = 5) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def test_all_askers_share_one_flight_and_the_next_is_another(owner: TaskOwner) -> None:
    """Registered before its first await; gone from the table as soon as it has landed."""
    flights: Flights[str, str] = Flights(owner, "ask")
    question = Question()
    asking = [asyncio.create_task(flights.join("key", question)) for _ in range(10)]
    await turns()
    assert (question.n_asked, len(flights)) == (1, 1)
    question.answer.set_result("yes")
    assert set(await asyncio.gather(*asking)) == {"yes"}
    assert len(flights) == 0
    assert await flights.join("key", question) == "yes"
    assert question.n_asked == 2


async def test_keys_do_not_wait_for_each_other(owner: TaskOwner) -> None:
    """One flight a key."""
    flights: Flights[int, str] = Flights(owner, "ask")
    question = Question()
    asking = [asyncio.create_task(flights.join(n, question)) for n in range(3)]
    await turns()
    assert question.n_asked == 3
    question.answer.set_result("yes")
    await asyncio.gather(*asking)


async def test_an_asker_that_leaves_does_not_end_it_and_its_failure_is_no_leak(owner: TaskOwner) -> None:
    """Also when nobody is left to see how it ends."""
    flights: Flights[str, str] = Flights(owner, "ask")
    question = Question()
    asker = asyncio.create_task(flights.join("key", question))
    await turns()
    asker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asker
    assert len(flights) == 1
    question.answer.set_exception(Unreachable("down", upstream="x"))
    await turns()
    assert len(flights) == 0


async def test_a_failure_is_everybodys_and_grows_with_nobody(owner: TaskOwner) -> None:
    """One exception for all: its traceback is as long for the last as for the first."""
    flights: Flights[str, str] = Flights(owner, "ask")
    question = Question()
    asking = [asyncio.create_task(flights.join("key", question)) for _ in range(30)]
    await turns()
    question.answer.set_exception(Unreachable("down", upstream="x"))
    failures = await asyncio.gather(*asking, return_exceptions=True)
    assert len(set(map(id, failures))) == 1
    (failure,) = set(failures)
    assert isinstance(failure, Unreachable)
    depth, frame = 0, failure.__traceback__
    while frame is not None:
        depth, frame = depth + 1, frame.tb_next
    assert depth <= 3


# -- tasks -------------------------------------------------------------------------------------------------------------


async def test_closing_ends_every_task_and_waits_for_running_hops(owner: TaskOwner) -> None:
    """A hop to a thread cannot be cancelled: a descriptor must not be closed under a running write."""
    gate, written = asyncio.Event(), []

    async def hop() -> None:
        await gate.wait()
        written.append("whole")

    async def work() -> None:
        await owner.uninterrupted(hop(), "write")
        written.append("never")

    task = owner.spawn(work(), "work")
    forever = owner.spawn(asyncio.Event().wait(), "forever")
    await turns()
    closing = asyncio.create_task(owner.aclose())
    await turns()
    assert forever.cancelled() and not closing.done()
    gate.set()
    await closing
    assert task.cancelled() and written == ["whole"]
    assert len(owner) == 0


async def test_a_hop_that_fails_after_its_caller_was_cancelled_is_no_news(owner: TaskOwner) -> None:
    """What was given up has failed: the caller's cancellation is what is raised, and nothing is reported as lost."""
    gate = asyncio.Event()

    async def hop() -> None:
        await gate.wait()
        raise OSError("the disk failed")

    task = owner.spawn(owner.uninterrupted(hop(), "write"), "work")
    await turns()
    task.cancel()
    await turns()
    assert not task.done()
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_background_task_that_fails_is_reported_in_one_line(owner: TaskOwner, reports: list[str]) -> None:
    """By name, never swallowed; being cancelled is no failure."""

    async def broken() -> None:
        raise ValueError("a bug")

    owner.spawn_background(broken(), "count the store")
    owner.spawn_background(asyncio.Event().wait(), "sleeper")  # type: ignore[arg-type]
    await turns()
    await owner.aclose()
    assert reports == ["background task 'count the store' failed: ValueError: a bug"]


async def test_a_deadline_goes_by_the_clock_it_was_given(owner: TaskOwner) -> None:
    """Time is an argument (habit 5): nothing happens until the clock moves, and what is left in time leaves nothing."""
    clock = ManualClock()

    async def patient(seconds: float) -> str:
        try:
            async with owner.deadline(clock, seconds):
                await asyncio.Event().wait()
        except TimeoutError:
            return "over"
        return "never"

    waiting = asyncio.create_task(patient(2.0))
    await turns()
    await clock.advance(1.9)
    assert not waiting.done()
    await clock.advance(0.1)
    assert await waiting == "over"
    async with owner.deadline(clock, 2.0):
        pass
    await turns()
    assert len(owner) == 0
    await clock.advance(5)
