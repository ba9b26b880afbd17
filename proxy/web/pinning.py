"""Pins as operators see them: what is kept from eviction, and letting go of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from proxy.engine.catalogue import reference_or_none
from proxy.engine.pins import Pin, Pins
from proxy.errors import UnknownManifest
from proxy.events import Changed, Event
from proxy.web.api import Document, Operation
from proxy.web.documents import MAX_CHARS


class PinDocument(Document):
    reference: str
    project: str = Field(description='The project it was made in; "" for none named.')
    digests: int = Field(description="Manifests, configs and layers that it keeps.")
    bytes: int = Field(description="What they take on disk, however many other pins keep some of them, too.")
    listed: bool = Field(description="Made for the list of `[prefetch]` alone; it ends when that names it no more.")


class PinList(Document):
    pins: list[PinDocument]
    kept_bytes: int = Field(description="All pins together, each digest once.")


class ToUnpin(Document):
    reference: Annotated[str, Field(min_length=1, max_length=MAX_CHARS, description="As docker reads it.")]
    project: Annotated[str, Field(max_length=255, description="Only the pin of this project.")] = ""


class Unpinned(Document):
    unpinned: list[PinDocument]
    kept_bytes: int = Field(description="What the pins that are left keep.")


def operations(pins: Pins, observe: Callable[[Event], None]) -> list[Operation]:
    """For the admin listener. `observe` is told of each reference that was let go of."""

    async def all_of_them(_: Any) -> PinList:
        return listed(pins)

    async def unpin(asked: ToUnpin) -> Unpinned:
        return await let_go(pins, asked, observe)

    return [
        Operation("GET", "pins", "What is never evicted.", all_of_them, PinList),
        Operation(
            "POST",
            "unpin",
            "Let something be evicted again.",
            unpin,
            Unpinned,
            ToUnpin,
            {404: "Nothing that is pinned is called that."},
        ),
    ]


def listed(pins: Pins) -> PinList:
    """Every pin."""
    return PinList(pins=[_shown(pins, pin) for pin in pins.all()], kept_bytes=pins.n_bytes)


async def let_go(pins: Pins, asked: ToUnpin, observe: Callable[[Event], None] = lambda _: None) -> Unpinned:
    """Take pins away. Raises UnknownManifest when there are none, OutOfSpace or Unavailable when the disk fails."""
    reference = reference_or_none(asked.reference)
    gone = await pins.remove(str(reference), asked.project) if reference is not None else []
    if not gone:
        where = f" in project {asked.project!r}" if asked.project else ""
        raise UnknownManifest(f"nothing that is pinned{where} is called {asked.reference!r}")
    observe(Changed("pin", str(reference), "removed"))
    return Unpinned(unpinned=[_shown(pins, pin) for pin in gone], kept_bytes=pins.n_bytes)


def _shown(pins: Pins, pin: Pin) -> PinDocument:
    return PinDocument(
        reference=pin.reference,
        project=pin.project,
        digests=len(pin.sizes),
        bytes=pins.bytes_of(pin),
        listed=pin.is_listed,
    )
