"""What is never evicted: pinned references, and everything while sealed.

The pins are a note of the store (ports.Notes) and outlive the process; the digests they keep are in memory. A pin is
refused where all pins together would not fit: a promise that eviction could not keep. What is about to be fetched for a
pin is promised first, so that two of them cannot both begin where only one would fit.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from proxy.engine.tasks import TaskOwner
from proxy.errors import BreakwaterError, Corrupt, OutOfSpace
from proxy.oci.digest import Digest
from proxy.ports import Notes, Records
from proxy.rules.ledger import Ledger

#: The note's name, and the version of what it says.
NOTE, VERSION = "pins", 1


@dataclass(frozen=True, slots=True)
class Pin:
    """One reference that stays: the project it was made in ("" for none named), and its digests with sizes in bytes.

    `is_listed`: made for the list of `[prefetch]`, and for nobody else; it ends when the list names it no more.
    """

    reference: str
    project: str
    sizes: Mapping[Digest, int]
    is_listed: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What there is one of."""
        return self.project, self.reference


class Promise:
    """Digests that are kept as if pinned, in memory only, until `withdraw`, which may come again."""

    def __init__(self, pins: Pins, sizes: Mapping[Digest, int]) -> None:
        self._pins = pins
        self._sizes = dict(sizes)
        pins._count(self._sizes)

    def withdraw(self) -> None:
        """A pin has taken its place, or nothing is to be pinned."""
        sizes, self._sizes = self._sizes, {}
        self._pins._uncount(sizes)


class Pins:
    """References that stay, and a container of the digests that therefore may not go. True for this process."""

    def __init__(self, notes: Notes, ledger: Ledger, owner: TaskOwner, *, keeps_all: bool = False) -> None:
        """With `keeps_all` nothing at all may go: `sealed = true` under [server]."""
        self._notes = notes
        self._ledger = ledger
        self._owner = owner
        self.keeps_all = keeps_all
        self._pins: dict[tuple[str, str], Pin] = {}
        #: digest -> by how many pins it is kept
        self._kept: dict[Digest, int] = {}
        self._sizes: dict[Digest, int] = {}
        #: What sealed upstreams have here: kept without being pinned.
        self._sealed: set[Digest] = set()
        #: The note is written whole: of two that are written at once the older might come last.
        self._changing = asyncio.Lock()

    def __contains__(self, digest: object) -> bool:
        return self.keeps_all or digest in self._kept or digest in self._sealed

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def n_bytes(self) -> int:
        """What the pins keep, in bytes on disk, each digest once."""
        return sum(map(self._ledger.on_disk, self._sizes.values()))

    def bytes_of(self, pin: Pin) -> int:
        """What a pin keeps, in bytes on disk, however many others keep some of it, too."""
        return sum(map(self._ledger.on_disk, pin.sizes.values()))

    def all(self) -> list[Pin]:
        """Every pin, in order of project and reference."""
        return [pin for _, pin in sorted(self._pins.items())]

    async def load(self) -> None:
        """Read the note. Raises Corrupt for one that makes no sense (pins are not lost in silence), or Unavailable."""
        body = await self._notes.get(NOTE)
        if body is None:
            return
        try:
            document = json.loads(body)
            if document["version"] != VERSION:
                raise ValueError(f"version {document['version']}")
            for value in document["pins"]:
                sizes = {Digest.parse(text): int(size) for text, size in value["digests"].items()}
                is_listed = value.get("listed") is True
                self._replace(Pin(str(value["reference"]), str(value["project"]), sizes, is_listed))
        except (ValueError, KeyError, TypeError, AttributeError, BreakwaterError) as error:
            raise Corrupt(f"the store's note of pins makes no sense ({error})") from error

    def check(self, sizes: Mapping[Digest, int]) -> None:
        """Whether these digests (sizes in bytes) fit beside all that is pinned. Raises OutOfSpace."""
        more = (self._ledger.on_disk(size) for digest, size in sizes.items() if digest not in self._sizes)
        n_bytes = self.n_bytes + sum(more)
        if n_bytes > self._ledger.for_blobs:
            raise OutOfSpace(
                f"pins would keep {n_bytes} bytes of a capacity of {self._ledger.capacity}: raise store.capacity, or "
                "unpin something"
            )

    def promise(self, sizes: Mapping[Digest, int]) -> Promise:
        """Keep these digests while they are fetched for a pin. Raises OutOfSpace when all pins exceed the capacity."""
        self.check(sizes)
        return Promise(self, sizes)

    async def add(self, reference: str, project: str, sizes: Mapping[Digest, int], *, is_listed: bool = False) -> None:
        """Keep these digests (sizes in bytes) for `reference`; a pin of the same name is replaced. Durable.

        What somebody has pinned by hand stays theirs when the list names it, too. Raises OutOfSpace when all pins
        together exceed the capacity, Unavailable when it cannot be written down.
        """
        async with self._changing:
            self.check(sizes)
            before = self._pins.get((project, reference))
            pin = Pin(reference, project, dict(sizes), is_listed and (before is None or before.is_listed))
            if pin != before:
                await self._change([pin], [before] if before else [])

    async def remove(self, reference: str, project: str = "") -> list[Pin]:
        """Let go of a reference, in one project or ("") in all: what went. Raises OutOfSpace or Unavailable, and then
        all of it stays."""
        async with self._changing:
            gone = [pin for pin in self._pins.values() if pin.reference == reference and project in ("", pin.project)]
            await self._change([], gone)
            return gone

    async def keep_listed(self, references: Container[str]) -> list[Pin]:
        """The list names these now: let go of what was pinned for it alone and is not among them. Raises alike."""
        async with self._changing:
            gone = [pin for pin in self._pins.values() if pin.is_listed and pin.reference not in references]
            await self._change([], gone)
            return gone

    def is_irreplaceable(self, digest: Digest) -> bool:
        """Whether it could not be had again if it went: it belongs to what is sealed."""
        return self.keeps_all or digest in self._sealed

    def keep_sealed(self, digests: Iterable[Digest]) -> None:
        """These belong to a sealed upstream: what is gone can never be had again."""
        self._sealed.update(digests)

    async def keep_all_of(self, records: Records, hosts: frozenset[str]) -> None:
        """Everything that is linked for these sealed upstreams. Raises Unavailable."""
        if not hosts:
            return
        async for holding, _, links in records.scan():
            if holding.host in hosts:
                for link in links:
                    self._sealed.add(link.descriptor.digest)
                    self._sealed.update(named.digest for named in link.names)

    async def _change(self, made: Sequence[Pin], gone: Sequence[Pin]) -> None:
        if not made and not gone:
            return
        for pin in gone:
            self._forget(pin)
        for pin in made:
            self._replace(pin)
        try:
            await self._write()
        except BreakwaterError:
            for pin in made:
                self._forget(pin)
            for pin in gone:
                self._replace(pin)
            raise

    async def _write(self) -> None:
        pins = [
            {
                "project": pin.project,
                "reference": pin.reference,
                "digests": {str(digest): size for digest, size in pin.sizes.items()},
                **({"listed": True} if pin.is_listed else {}),
            }
            for pin in self.all()
        ]
        body = json.dumps({"version": VERSION, "pins": pins}, separators=(",", ":")).encode()
        await self._owner.uninterrupted(self._notes.put(NOTE, body), "write the pins")

    def _replace(self, pin: Pin) -> None:
        if (before := self._pins.get(pin.key)) is not None:
            self._forget(before)
        self._pins[pin.key] = pin
        self._count(pin.sizes)

    def _forget(self, pin: Pin) -> None:
        if self._pins.get(pin.key) is pin:
            self._uncount(self._pins.pop(pin.key).sizes)

    def _count(self, sizes: Mapping[Digest, int]) -> None:
        for digest, size in sizes.items():
            self._kept[digest] = self._kept.get(digest, 0) + 1
            self._sizes[digest] = size

    def _uncount(self, sizes: Iterable[Digest]) -> None:
        for digest in sizes:
            self._kept[digest] -= 1
            if not self._kept[digest]:
                del self._kept[digest], self._sizes[digest]
