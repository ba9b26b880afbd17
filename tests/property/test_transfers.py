"""Readers come, go, and are cancelled in any order, while upstream does what it likes: INV-4 and what it leaves behind.

Interleavings are drawn, never timed: a piece of a body comes when a gate is opened, and everything else happens in
turns of the loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Generator
from itertools import count
from typing import Any, Literal, TypeVar, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.engine.transfers import OnLastReaderGone
from proxy.errors import BreakwaterError, Unreachable
from proxy.oci.digest import Digest, Verifier
from proxy.oci.endpoints import BlobGet, ManifestGet, RepositoryPath
from proxy.oci.names import Repository
from proxy.ports import LocalFile
from proxy.store.memory import MemoryBlobs, MemoryIngest, MemoryStore
from tests.support import images
from tests.support.appliance import HastyClock
from tests.support.engine import (
    ALPINE,
    HOST,
    Engine,
    FakeBody,
    FakeUpstream,
    Script,
    Step,
    engine,
    tag,
    tasks_of,
    whole,
)

T = TypeVar("T")

#: Larger than the end that is held back, so that readers get bytes before the digest agrees.
BODY = os.urandom(200_000)
DIGEST = Digest.of(BODY)
N_PIECES = 8

Fault = Literal["none", "refuses", "breaks off", "lies", "short", "long"]


class Paced(FakeUpstream):
    """Hands out a piece each time a gate is opened; each GET may have a fault of its own."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__()
        self.put_blob(BODY)
        self.put(images.manifest(images.Blob(b"{}"), [images.Blob(BODY)]), "1")
        self.faults = faults
        self.gates: list[asyncio.Event] = []
        self.is_open = False

    def step(self) -> None:
        """Let one piece pass."""
        for gate in self.gates:
            if not gate.is_set():
                gate.set()
                return

    def open(self) -> None:
        """Let everything pass from now on, and be well."""
        self.is_open = True
        for gate in self.gates:
            gate.set()

    async def blob(self, repository: Repository, digest: Digest, *, offset: int = 0) -> FakeBody:
        """As scripted."""
        fault: Fault = self.faults.pop(0) if self.faults and digest == DIGEST else "none"
        if fault != "refuses":
            self.scripts.setdefault(digest, []).append(self._script(fault, offset))
            if digest != DIGEST:
                self.scripts.clear()
            return await super().blob(repository, digest, offset=offset)
        self.failure = Unreachable("refused", upstream=HOST)
        try:
            return await super().blob(repository, digest, offset=offset)
        finally:
            self.failure = None

    def _script(self, fault: Fault, offset: int) -> Script:
        body = BODY[:-1] + bytes([BODY[-1] ^ 1]) if fault == "lies" else BODY
        body = {"short": body[:-1], "long": body + b"!"}.get(fault, body)[offset:]
        size = -(-len(BODY) // N_PIECES)
        steps: list[Step] = []
        for at in range(0, len(body), size):
            gate = asyncio.Event()
            if self.is_open:
                gate.set()
            self.gates.append(gate)
            steps += [gate, body[at : at + size]]
        if fault == "breaks off":
            steps = [*steps[: len(steps) // 2], Unreachable("broke off", upstream=HOST)]
        return Script(len(BODY), steps, offset)


# -- interleavings -----------------------------------------------------------------------------------------------------

actions = st.one_of(
    st.tuples(st.just("join"), st.integers(0, len(BODY) - 1), st.integers(1, len(BODY))),
    st.tuples(st.just("leave"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
    st.tuples(st.just("turn"), st.integers(1, 12), st.just(0)),
    st.tuples(st.just("head"), st.just(0), st.just(0)),
)


@given(
    actions=st.lists(actions, min_size=3, max_size=30),
    faults=st.lists(st.sampled_from(get_args(Fault)), max_size=4),
    policy=st.sampled_from(get_args(OnLastReaderGone)),
    room=st.sampled_from([1 << 40, 150_000, 4_096]),
    says_size=st.booleans(),
)
def test_one_get_at_a_time_right_bytes_or_none_and_nothing_left(
    actions: list[tuple[str, int, int]], faults: list[Fault], policy: OnLastReaderGone, room: int, says_size: bool
) -> None:
    """INV-4: at most one upstream GET of a digest at a time, whoever joins, leaves, fails or is cancelled; who ends
    cleanly has the right bytes; and in the end nothing is reserved, open, or running."""
    before = set(os.listdir("/proc/self/fd"))
    asyncio.run(_interleaved(actions, faults, policy, room, says_size))
    assert len(os.listdir("/proc/self/fd")) <= len(before)


async def _interleaved(
    actions: list[tuple[str, int, int]], faults: list[Fault], policy: OnLastReaderGone, room: int, says_size: bool
) -> None:
    upstream = Paced(list(faults))
    upstream.says_size = says_size
    store = MemoryStore(total_bytes=room)
    async with engine(upstream, store=store, clock=HastyClock(), policy=policy) as running:
        readers: list[asyncio.Task[bool]] = []
        for what, one, other in actions:
            if what == "join":
                readers.append(asyncio.create_task(_read(running, one, min(len(BODY), one + other))))
            elif what == "head":
                readers.append(asyncio.create_task(_head(running)))
            elif what == "leave" and readers:
                readers[one % len(readers)].cancel()
            elif what == "step":
                for _ in range(one):
                    upstream.step()
            for _ in range(one if what == "turn" else 1):
                await asyncio.sleep(0)
        upstream.open()
        for outcome in await asyncio.gather(*readers, return_exceptions=True):
            assert outcome is True or isinstance(outcome, BreakwaterError | asyncio.CancelledError), outcome
        await _settled(running, upstream, store)
        assert upstream.most_at_once <= 1
        if not faults and policy == "finish" and room > len(BODY):
            assert upstream.count("blob", DIGEST) <= 1, "what is kept, or is being had, is not asked for again"
        upstream.faults.clear()
        upstream.scripts.clear()  # of a GET that was cancelled before it took its own
        await running.clock.advance(31)  # past any bad mark
        assert await running.read(DIGEST) == BODY
        await _settled(running, upstream, store)
        kept = await running.stored(DIGEST)
        assert kept == (BODY if room > len(BODY) else None)
    await store.aclose()


async def _read(running: Engine, start: int, end: int) -> bool:
    opened = await running.open(DIGEST)
    assert opened.size == len(BODY)
    assert await whole(opened, start, end) == BODY[start:end]
    return True


async def _head(running: Engine) -> bool:
    _, size, _ = await running.pull.blob_size(_asked(DIGEST))
    assert size == len(BODY)
    return True


async def _settled(running: Engine, upstream: FakeUpstream, store: MemoryStore) -> None:
    """Everything that was begun has ended, and gave back what it held."""
    await running.idle()
    assert running.ledger.reserved == 0
    assert not any(upstream.open_bodies.values()), "a body was not closed"
    assert store.blobs.unfinished == []
    assert not running.capacity._reading, "something still counts as being read"
    assert running.reports == []


# -- cancelled at every await ------------------------------------------------------------------------------------------


class CancelledAt(Awaitable[T]):
    """Runs a coroutine, and cancels the task it runs in when that is about to wait for the n-th time."""

    def __init__(self, work: Coroutine[Any, Any, T], n: int) -> None:
        self._work = work
        self._n = n
        self.was_cancelled = False

    def __await__(self) -> Generator[Any, Any, T]:
        sent: Any = None
        thrown: BaseException | None = None
        for n in count(1):
            try:
                waits_for = self._work.send(sent) if thrown is None else self._work.throw(thrown)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            if n == self._n:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                self.was_cancelled = True
            sent, thrown = None, None
            try:
                sent = yield waits_for
            except BaseException as error:  # noqa: BLE001 – handed on to the coroutine, as a task would
                thrown = error
        raise AssertionError("unreachable")


def _asked(digest: Digest) -> BlobGet:
    return BlobGet(RepositoryPath(None, ALPINE.value), digest, None)


def _manifest(target: str) -> ManifestGet:
    wanted = Digest.parse(target) if ":" in target else tag(target)
    return ManifestGet(RepositoryPath(None, ALPINE.value), wanted, None)


async def _whole_blob(running: Engine) -> bytes:
    _, opened = await running.pull.blob(_asked(DIGEST))
    return await whole(opened)


async def _by_tag(running: Engine) -> bytes:
    return (await running.pull.manifest(_manifest("1"))).held.body


async def _size(running: Engine) -> bytes:
    _, size, _ = await running.pull.blob_size(_asked(DIGEST))
    return BODY[:size]


async def _cold(running: Engine) -> None:
    """Nothing is known."""


async def _unverified(running: Engine) -> None:
    """Everything is cached, and nothing was hashed by this process."""
    await _by_tag(running)
    await _whole_blob(running)
    await running.idle()
    running.verification._verified.clear()
    running.manifests._ready.clear()


async def _expired(running: Engine) -> None:
    """The tag is to be asked about."""
    await _by_tag(running)
    await running.clock.advance(601)


Act = Callable[[Engine], Coroutine[Any, Any, bytes]]
IMAGE_BODY = images.manifest(images.Blob(b"{}"), [images.Blob(BODY)]).body


@pytest.mark.parametrize("policy", get_args(OnLastReaderGone))
@pytest.mark.parametrize(
    ("before", "act", "right"),
    [
        pytest.param(_cold, _whole_blob, BODY, id="blob, cold"),
        pytest.param(_unverified, _whole_blob, BODY, id="blob, first read after a start"),
        pytest.param(_cold, _size, BODY, id="HEAD, cold"),
        pytest.param(_cold, _by_tag, IMAGE_BODY, id="tag, cold"),
        pytest.param(_unverified, _by_tag, IMAGE_BODY, id="tag, from the store"),
        pytest.param(_expired, _by_tag, IMAGE_BODY, id="tag, to be revalidated"),
    ],
)
async def test_cancelled_at_any_await_it_gives_back_what_it_took(
    before: Callable[[Engine], Coroutine[Any, Any, None]], act: Act, right: bytes, policy: OnLastReaderGone
) -> None:
    """INV-4, INV-5: cut the read path at await n = 1, 2, … until it completes: the ledger is balanced, nothing runs,
    and the next client gets the right bytes."""
    for n in count(1):
        upstream, store = Paced([]), MemoryStore()
        upstream.open()
        async with engine(upstream, store=store, clock=HastyClock(), policy=policy) as running:
            await before(running)
            cut = CancelledAt(act(running), n)

            async def attempt(cut: CancelledAt[bytes] = cut) -> bytes:
                return await cut

            try:
                found = await asyncio.create_task(attempt())
                assert found == right
            except asyncio.CancelledError:
                assert cut.was_cancelled
            await _settled(running, upstream, store)
            assert upstream.most_at_once <= 1
            assert await act(running) == right
            await _settled(running, upstream, store)
            left = {task.get_name() for task in tasks_of(running.owner)}
            assert left <= {"remember the order of use", "watch the file system"}
        await store.aclose()
        if not cut.was_cancelled:
            assert n > 1, "it waited somewhere, and was cut there"
            return


@pytest.mark.parametrize("room", [1 << 40, 150_000], ids=["with room", "disk full in the middle"])
async def test_stopped_at_any_turn_of_the_loop_it_leaves_nothing(room: int) -> None:
    """INV-2, INV-5: a stop in the middle of a transfer takes every task, descriptor, reservation and unfinished file
    with it, at turn n = 1, 2, … until the transfer completes."""
    for n in count(1):
        upstream, store = Paced([]), MemoryStore(total_bytes=room)
        upstream.open()
        async with engine(upstream, store=store, clock=HastyClock()) as running:
            reader = asyncio.create_task(_whole_blob(running))
            for _ in range(n):
                await asyncio.sleep(0)
            has_completed = reader.done()
            reader.cancel()  # the data port is closed first, and with it its readers
            await asyncio.gather(reader, return_exceptions=True)
            await running.owner.aclose()
            assert not tasks_of(running.owner)
            assert not any(upstream.open_bodies.values())
            assert not running.capacity._reading
            assert store.blobs.unfinished == []
            assert list(running.blobs.running()) == []
        await store.aclose()
        if has_completed:
            assert n > 10, "there were turns to be stopped at"
            return


class SlowDisk(MemoryBlobs):
    """A store whose writes wait at a gate, in a hop that nobody can cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.reached = asyncio.Event()

    async def ingest(self, digest: Digest, verifier: Verifier) -> MemoryIngest:
        """See ports.BlobStore."""
        begun = await super().ingest(digest, verifier)
        write = begun.write

        async def waiting(*pieces: bytes | bytearray | memoryview) -> None:
            self.reached.set()
            await self.gate.wait()
            await write(*pieces)

        begun.write = waiting  # type: ignore[method-assign]
        return begun


async def test_whoever_comes_while_a_transfer_is_given_up_gets_another_one() -> None:
    """INV-4: the last reader has left, the policy is to stop, and before it has stopped somebody asks: that one neither
    inherits the failure nor begins while the first still writes."""
    upstream, store = Paced([]), MemoryStore()
    store.blobs = disk = SlowDisk()
    async with engine(upstream, store=store, clock=HastyClock(), policy="abort") as running:
        first = await running.open(DIGEST)
        upstream.step()
        await disk.reached.wait()
        assert not isinstance(first.source, LocalFile)
        first.source.leave()
        second = asyncio.create_task(running.read(DIGEST))
        for _ in range(50):
            await asyncio.sleep(0)
        assert upstream.count("blob", DIGEST) == 1, "the first has not ended"
        disk.gate.set()
        upstream.open()
        assert await second == BODY
        assert (upstream.most_at_once, upstream.count("blob", DIGEST)) == (1, 2)
        await _settled(running, upstream, store)
    await store.aclose()
