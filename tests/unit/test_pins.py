"""Pins: what is promised never to go fits, is written down before it counts, and can be taken away again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proxy.engine.pins import NOTE, Pins
from proxy.engine.tasks import TaskOwner
from proxy.errors import Corrupt, OutOfSpace, Unavailable, UnknownManifest
from proxy.events import Changed, Event
from proxy.oci.digest import Digest
from proxy.rules.ledger import BLOCK_BYTES, Ledger
from proxy.store.memory import MemoryNotes
from proxy.web import pinning
from proxy.web.pinning import ToUnpin

ONE, TWO, THREE = (Digest.of(text) for text in (b"one", b"two", b"three"))
#: Room for two blobs of one block.
CAPACITY = 2 * BLOCK_BYTES


class Notes(MemoryNotes):
    """Notes on a disk that can fail."""

    fails = False
    #: The first of two writes that run at once takes longer.
    is_odd = False

    async def put(self, name: str, body: bytes) -> None:
        if self.fails:
            raise Unavailable("the disk is gone")
        self.is_odd = not self.is_odd
        for _ in range(10 if self.is_odd else 1):
            await asyncio.sleep(0)
        await super().put(name, body)


@asynccontextmanager
async def pins_in(notes: Notes) -> AsyncIterator[Pins]:
    owner = TaskOwner(lambda _: None)
    pins = Pins(notes, Ledger(CAPACITY), owner)
    await pins.load()
    yield pins
    await owner.aclose()


def names(pins: Pins) -> list[str]:
    return [pin.reference for pin in pins.all()]


async def test_pins_outlive_the_process_and_are_let_go_of() -> None:
    """A digest stays as long as one pin keeps it; what is taken away is not there after the next start either."""
    notes = Notes()
    async with pins_in(notes) as pins:
        await pins.add("a.test/x:1", "", {ONE: 10, TWO: 10})
        await pins.add("a.test/y:1", "team", {TWO: 10}, is_listed=True)
    async with pins_in(notes) as pins:
        assert [(pin.reference, pin.project, pin.is_listed) for pin in pins.all()] == [
            ("a.test/x:1", "", False),
            ("a.test/y:1", "team", True),
        ]
        assert [pin.reference for pin in await pins.remove("a.test/x:1")] == ["a.test/x:1"]
        assert ONE not in pins
        assert TWO in pins
        assert pins.n_bytes == BLOCK_BYTES
    async with pins_in(notes) as pins:
        assert names(pins) == ["a.test/y:1"]


async def test_pins_beyond_the_capacity_are_refused() -> None:
    """Together, each digest once: an eviction could not keep such a promise."""
    async with pins_in(Notes()) as pins:
        await pins.add("a.test/x:1", "", {ONE: 10, TWO: 10})
        await pins.add("a.test/y:1", "", {TWO: 10})
        with pytest.raises(OutOfSpace, match=r"raise store\.capacity, or unpin something"):
            await pins.add("a.test/z:1", "", {THREE: 1})
        assert names(pins) == ["a.test/x:1", "a.test/y:1"]
        assert THREE not in pins


async def test_what_is_promised_counts_until_it_is_withdrawn() -> None:
    """Two fetches for pins of which only one fits: the second is refused before it fetches anything."""
    async with pins_in(Notes()) as pins:
        promise = pins.promise({ONE: 10, TWO: 10})
        assert ONE in pins
        with pytest.raises(OutOfSpace):
            pins.promise({THREE: 10})
        await pins.add("a.test/x:1", "", {ONE: 10, TWO: 10})
        promise.withdraw()
        promise.withdraw()
        assert ONE in pins, "the pin has taken its place"
        assert names(pins) == ["a.test/x:1"]
        await pins.remove("a.test/x:1")
        assert (ONE in pins, pins.n_bytes) == (False, 0)


@pytest.mark.parametrize("what", ["add", "replace", "remove", "list"])
async def test_what_could_not_be_written_down_has_not_happened(what: str) -> None:
    """A pin is told as made, or as gone, when that is durable."""
    notes = Notes()
    async with pins_in(notes) as pins:
        await pins.add("a.test/x:1", "", {ONE: 10}, is_listed=True)
        notes.fails = True
        with pytest.raises(Unavailable):
            if what == "add":
                await pins.add("a.test/y:1", "", {TWO: 10})
            elif what == "replace":
                await pins.add("a.test/x:1", "", {TWO: 10})
            elif what == "remove":
                await pins.remove("a.test/x:1")
            else:
                await pins.keep_listed(())
        assert [(pin.reference, dict(pin.sizes)) for pin in pins.all()] == [("a.test/x:1", {ONE: 10})]
        assert (ONE in pins, TWO in pins, pins.n_bytes) == (True, False, BLOCK_BYTES)


async def test_a_list_lets_go_of_what_it_names_no_more_and_of_nothing_else() -> None:
    """[prefetch]: what was pinned by hand stays theirs who did it, listed or not."""
    async with pins_in(Notes()) as pins:
        await pins.add("a.test/by-hand:1", "", {ONE: 10})
        await pins.add("a.test/by-hand:1", "", {ONE: 10}, is_listed=True)
        await pins.add("a.test/old:1", "", {TWO: 10}, is_listed=True)
        gone = await pins.keep_listed({"a.test/new:1"})
        assert [pin.reference for pin in gone] == ["a.test/old:1"]
        assert names(pins) == ["a.test/by-hand:1"]


async def test_a_listed_pin_that_somebody_makes_by_hand_is_theirs() -> None:
    """The later, stronger wish counts."""
    async with pins_in(Notes()) as pins:
        await pins.add("a.test/x:1", "", {ONE: 10}, is_listed=True)
        await pins.add("a.test/x:1", "", {ONE: 10})
        assert await pins.keep_listed(()) == []
        assert names(pins) == ["a.test/x:1"]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"version": 2}', b'{"version": 1, "pins": [7]}'])
async def test_a_note_that_makes_no_sense_is_told(body: bytes) -> None:
    """Pins are not lost in silence."""
    notes = Notes()
    await notes.put(NOTE, body)
    with pytest.raises(Corrupt):
        async with pins_in(notes):
            pass


async def test_the_api_lists_pins_and_lets_go_of_them() -> None:
    """As docker reads a reference; in one project or all; told to the audit log; 404 for what is not pinned."""
    told: list[Event] = []
    async with pins_in(Notes()) as pins:
        await pins.add("docker.io/library/alpine:3", "", {ONE: 10})
        await pins.add("docker.io/library/alpine:3", "team", {ONE: 10, TWO: 10})
        shown = pinning.listed(pins)
        assert [(pin.project, pin.digests, pin.bytes) for pin in shown.pins] == [
            ("", 1, BLOCK_BYTES),
            ("team", 2, 2 * BLOCK_BYTES),
        ]
        assert shown.kept_bytes == 2 * BLOCK_BYTES
        answer = await pinning.let_go(pins, ToUnpin(reference="alpine:3", project="team"), told.append)
        assert ([pin.project for pin in answer.unpinned], answer.kept_bytes) == (["team"], BLOCK_BYTES)
        assert told == [Changed("pin", "docker.io/library/alpine:3", "removed")]
        for absent in ("alpine:4", "NOT A NAME"):
            with pytest.raises(UnknownManifest, match="nothing that is pinned"):
                await pinning.let_go(pins, ToUnpin(reference=absent), told.append)
        assert json.loads(answer.model_dump_json())["unpinned"][0]["reference"] == "docker.io/library/alpine:3"


async def test_pins_that_are_made_at_once_are_all_written_down() -> None:
    """The note is written whole: one that was written for the first of them must not come after the second's."""
    notes = Notes()
    async with pins_in(notes) as pins:
        await asyncio.gather(pins.add("a.test/x:1", "", {ONE: 10}), pins.add("a.test/y:1", "", {TWO: 10}))
    async with pins_in(notes) as pins:
        assert names(pins) == ["a.test/x:1", "a.test/y:1"]
