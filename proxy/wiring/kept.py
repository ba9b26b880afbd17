"""What is on disk, what is known of it, and what keeps it in bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from proxy.engine.capacity import Capacity
from proxy.engine.charges import Charges
from proxy.engine.links import Links
from proxy.engine.manifests import Manifests
from proxy.engine.pins import Pins
from proxy.engine.remains import Remains
from proxy.engine.seal import Seal
from proxy.engine.tags import Tags
from proxy.engine.tasks import TaskOwner
from proxy.engine.verification import Verification
from proxy.errors import StoreError
from proxy.events import Event, Noticed
from proxy.planning import allowances_of, sealed_hosts
from proxy.ports import Clock
from proxy.rules.ledger import Ledger, audit_share, block_of, quarantine_share
from proxy.settings import Settings
from proxy.store.disk import DiskStore


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What nearly every part is made with."""

    clock: Clock
    owner: TaskOwner
    observe: Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Kept:
    """The store and the parts that look after it."""

    store: DiskStore
    capacity: Capacity
    pins: Pins
    seal: Seal
    verification: Verification
    links: Links
    charges: Charges
    manifests: Manifests
    tags: Tags
    remains: Remains

    @classmethod
    async def of(cls, store: DiskStore, settings: Settings, around: Surroundings) -> Self:
        """The parts over an open store, with what it remembers. Nothing evicts, counts or sweeps before `start`.

        Raises Unavailable when the disk does not answer.
        """
        clock, owner, observe = around.clock, around.owner, around.observe
        capacity = await _capacity(store, settings, around)
        pins = Pins(store.notes, capacity.ledger, owner, keeps_all=settings.server.sealed)
        seal = Seal(store.notes, owner)
        try:
            await pins.load()
            await seal.load()
            await pins.keep_all_of(store.records, sealed_hosts(settings))
        except StoreError as error:
            observe(Noticed("error", f"what is pinned is not known: {error}"))
        capacity.pinned = pins
        verification = Verification(
            owner,
            clock,
            store.blobs,
            on_gone=capacity.forget,
            observe=observe,
            is_irreplaceable=pins.is_irreplaceable,
        )
        links = Links(store.records, owner, observe)
        charges = Charges(allowances_of(settings), store.charges, capacity, clock=clock, owner=owner, observe=observe)
        await charges.begin()
        manifests = Manifests(
            store.blobs, capacity, charges, links, verification, clock=clock, owner=owner, observe=observe
        )
        capacity.on_forgotten = lambda digests: manifests.forget(*digests)
        return cls(
            store=store,
            capacity=capacity,
            pins=pins,
            seal=seal,
            verification=verification,
            links=links,
            charges=charges,
            manifests=manifests,
            tags=Tags(store.records, manifests, links, clock=clock, owner=owner, observe=observe),
            remains=Remains(store.blobs, capacity, clock=clock, owner=owner, observe=observe),
        )

    def start(self) -> None:
        """Count what is here, and from now on keep to the bounds."""
        self.remains.start()
        self.capacity.start()
        self.charges.start()

    async def aclose(self) -> None:
        """Write down what a next start is spared to count, and let go of the store's lock."""
        await self.charges.aclose()
        await self.capacity.aclose()
        await self.store.aclose()


async def _capacity(store: DiskStore, settings: Settings, around: Surroundings) -> Capacity:
    space = await store.blobs.space()
    inode_share = settings.store.min_free_inode_share
    capacity = Capacity(
        Ledger(settings.store.capacity.of(space.total_bytes), block_bytes=block_of(space.block_bytes)),
        store.blobs,
        store.facts,
        min_free_bytes=settings.store.min_free.of,
        min_free_inodes=lambda total: int(total * inode_share),
        clock=around.clock,
        owner=around.owner,
        observe=around.observe,
        notes=store.notes,
        records=store.records,
        upkeep=store.upkeep,
    )
    store.upkeep.others = audit_share(capacity.ledger.capacity)
    store.quarantine.max_bytes = quarantine_share(capacity.ledger.capacity)
    await capacity.prepare()
    return capacity
