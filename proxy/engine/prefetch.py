"""Fills the store from a list: everything that a node would ask for, by the path that a node's request takes.

Policy, links and single transfers are the read path's (engine/pull.py); here is only the order, the pace and the
report. Polite: a few images and a few blobs at a time, so that nodes find free places among the transfers, and a
throttling upstream is waited for. Resumes by itself: what is here is not asked for again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from proxy.engine.access import OPERATOR
from proxy.engine.capacity import Capacity
from proxy.engine.charges import Charges
from proxy.engine.manifests import Held
from proxy.engine.pins import Pins, Promise
from proxy.engine.pull import Pull
from proxy.engine.walk import Closure, Scope, closure_of
from proxy.errors import BreakwaterError, OutOfSpace, Overloaded, OverQuota, Throttled, Timeout, Unreachable
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, ManifestGet, ReferrersList, RepositoryPath
from proxy.oci.names import Reference, TagOrDigest
from proxy.ports import Clock, LocalFile

T = TypeVar("T")

#: Images walked at a time, and blobs fetched at a time for all of them: an eighth of what nodes may have.
N_IMAGES = 4
N_BLOBS = 6
#: How often one thing is asked for before it counts as missing.
N_ATTEMPTS = 4
#: The longest wait between two attempts, in seconds, whatever Retry-After says.
MAX_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Step:
    """Something happened to one reference of a list. Sizes in bytes."""

    reference: str
    #: "resolved" (its size is known), "bytes" (more of it is here), "done", "missing".
    what: str
    n_bytes: int = 0
    #: The whole image, once known.
    of_bytes: int = 0
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Filled:
    """What became of one reference. `missing` says what is not here and why: empty when all of it is."""

    reference: str
    digest: str = ""
    n_manifests: int = 0
    n_blobs: int = 0
    n_bytes: int = 0
    fetched_bytes: int = 0
    n_referrers: int = 0
    is_pinned: bool = False
    missing: dict[str, str] = field(default_factory=dict)


class Prefetch:
    """Walks lists. True for this process."""

    def __init__(self, pull: Pull, capacity: Capacity, charges: Charges, pins: Pins, *, clock: Clock) -> None:
        self._pull = pull
        self._capacity = capacity
        self._charges = charges
        self._pins = pins
        self._clock = clock
        self._blob_slots = asyncio.Semaphore(N_BLOBS)

    async def run(
        self,
        references: Sequence[Reference],
        scope: Scope,
        *,
        project: str | None = None,
        pin: bool = False,
        is_list: bool = False,
        tell: Callable[[Step], None] = lambda _: None,
    ) -> list[Filled]:
        """Fetch all of these, in the list's order of beginning. Never raises for what one reference lacks.

        With `pin` what is whole is kept from eviction from here on. With `is_list` these are all that is to be here at
        all times: pins of an earlier list that are not among them end; raises Unavailable when that cannot be written,
        or when the store cannot be counted.
        """
        await self._capacity.counted()
        await self._charges.read()
        filled: dict[Reference, Filled] = {}
        waiting = iter(dict.fromkeys(references))

        async def work() -> None:
            for reference in waiting:
                one = _One(self, reference, scope, project, tell, is_list=is_list)
                filled[reference] = await one.run(pin)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(N_IMAGES, len(references))):
                group.create_task(work())
        if is_list:
            await self._pins.keep_listed(frozenset(map(str, references)))
        return [filled[reference] for reference in dict.fromkeys(references)]

    # -- for one reference ------------------------------------------------------------------------------------------

    async def manifest(self, path: RepositoryPath, target: TagOrDigest, ns: str) -> Held:
        """Through the read path, with patience."""
        asked = ManifestGet(path, target, ns)
        return (await self._patiently(lambda: self._pull.manifest(asked, OPERATOR))).held

    async def referrers(self, path: RepositoryPath, digest: Digest, ns: str) -> Iterable[Descriptor]:
        """Through the read path, with patience. Raises Unreachable when the list may be incomplete."""
        asked = ReferrersList(path, digest, "", ns)
        _, found = await self._patiently(lambda: self._pull.referrers(asked, OPERATOR))
        if found.trouble:
            raise Unreachable(found.trouble, upstream=ns)
        return found.descriptors

    async def fetch(self, path: RepositoryPath, descriptor: Descriptor, ns: str, tell: Callable[[int], None]) -> int:
        """Have a blob in the store; the bytes that had to be fetched. Raises like the read path, or OutOfSpace."""
        if self.is_here(descriptor):
            tell(descriptor.size)
            return 0
        async with self._blob_slots:
            if self.is_here(descriptor):  # another image of the list has brought it meanwhile
                tell(descriptor.size)
                return 0
            return await self._patiently(lambda: self._fetch(path, descriptor, ns, tell))

    async def _fetch(self, path: RepositoryPath, descriptor: Descriptor, ns: str, tell: Callable[[int], None]) -> int:
        _, opened = await self._pull.blob(BlobGet(path, descriptor.digest, ns), OPERATOR)
        source, offset = opened.source, 0
        if isinstance(source, LocalFile):
            source.blob.close()
        else:
            try:
                while offset < opened.size:
                    reached = await source.beyond(offset)
                    tell(reached - offset)
                    offset = reached
            finally:
                source.leave()
        if not self.is_here(descriptor):
            raise OutOfSpace(f"it was fetched and could not be kept: {self._capacity.degraded or 'no room'}")
        return opened.size if opened.outcome == "miss" else 0

    def is_here(self, descriptor: Descriptor) -> bool:
        """Whether the store has it, in the size that the manifest says."""
        return self._capacity.ledger.size_of(descriptor.digest) == descriptor.size

    async def _patiently(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Again after what passes: no connection, a deadline, too many requests."""
        for attempt in range(1, N_ATTEMPTS):
            try:
                return await ask()
            except (Throttled, Unreachable, Timeout, Overloaded) as error:
                wanted = getattr(error, "retry_after_s", None) or 2.0 ** (attempt - 1)
                await self._clock.sleep(min(wanted, MAX_WAIT_S))
        return await ask()

    def promise(self, reference: Reference, named: str | None, closure: Closure) -> Promise:
        """Keep what is about to be fetched for a pin. `named` is the project that the order names, if it does.

        Raises OutOfSpace when the pins, or the project's quota, have no room for it; UnknownName for no such project.
        """
        project = self._project_of(reference, named)
        account, sizes = self._charges.book.of(project), closure.digests()
        promise = self._pins.promise(sizes)
        try:
            unpaid = sum(size for digest, size in sizes.items() if digest not in account)
            self._charges.check_room(project, unpaid, f"pinning {reference}")
        except OutOfSpace:
            promise.withdraw()
            raise
        return promise

    async def pin(self, reference: Reference, named: str | None, closure: Closure, *, is_list: bool) -> None:
        """Keep all of it, at the project's expense: what nobody pays for would be kept beyond a quota.

        Raises OutOfSpace or Denied where the project does not pay for all of it, Unavailable when the disk fails.
        """
        project = self._project_of(reference, named)
        account, sizes = self._charges.book.of(project), closure.digests()
        for digest in sizes:
            self._charges.use(project, digest)
            if digest not in account:
                raise OverQuota(f"the quota of project {project!r} has no room for {digest}, so it is not pinned")
        await self._pins.add(str(reference), named or "", sizes, is_listed=is_list)

    def _project_of(self, reference: Reference, named: str | None) -> str:
        path = RepositoryPath(named, reference.repository.value)
        return self._pull.plan.routes.route(path, reference.host.value).project


class _One:
    """One reference of a list: a `walk.Source` through the read path, and the fetching of what the walk found."""

    def __init__(
        self,
        all_of_them: Prefetch,
        reference: Reference,
        scope: Scope,
        project: str | None,
        tell: Callable[[Step], None],
        *,
        is_list: bool,
    ) -> None:
        self._prefetch = all_of_them
        self._is_list = is_list
        self._reference = reference
        self._scope = scope
        self._project = project
        self._path = RepositoryPath(project, reference.repository.value)
        self._ns = reference.host.value
        self._tell = tell
        self._total = 0

    async def manifest(self, target: TagOrDigest) -> Held:
        """See walk.Source."""
        return await self._prefetch.manifest(self._path, target, self._ns)

    async def referrers(self, digest: Digest) -> Iterable[Descriptor]:
        """See walk.Source."""
        return await self._prefetch.referrers(self._path, digest, self._ns)

    async def run(self, pin: bool) -> Filled:
        """All of it, or a report of what is missing. With `pin` nothing is fetched that could not be kept."""
        name = str(self._reference)
        try:
            closure = await closure_of(self, self._reference.target, self._scope)
        except BreakwaterError as error:
            self._tell(Step(name, "missing", sentence=str(error)))
            return Filled(name, missing={name: str(error)})
        self._total = closure.n_bytes
        self._tell(Step(name, "resolved", of_bytes=self._total, sentence=str(closure.top.descriptor.digest)))
        missing = dict(closure.missing)
        for held in closure.manifests.values():
            if not self._prefetch.is_here(held.descriptor):
                missing[str(held.descriptor.digest)] = "the manifest was fetched and could not be kept: no room"
            self._arrived(held.descriptor.size)
        fetched_bytes = await (self._pinned(closure, missing) if pin else self._blobs(closure, missing))
        self._tell(Step(name, "missing" if missing else "done", of_bytes=self._total, sentence=_first(missing)))
        return Filled(
            name,
            str(closure.top.descriptor.digest),
            len(closure.manifests),
            len(closure.blobs),
            self._total,
            fetched_bytes,
            len(closure.referrers),
            pin and not missing,
            missing,
        )

    async def _pinned(self, closure: Closure, missing: dict[str, str]) -> int:
        """The blobs, kept from eviction from the first of them on; and the pin, once all of them are here."""
        try:
            promise = self._prefetch.promise(self._reference, self._project, closure)
        except BreakwaterError as error:
            missing["pin"] = str(error)
            return 0
        try:
            fetched_bytes = await self._blobs(closure, missing)
            if not missing:
                await self._prefetch.pin(self._reference, self._project, closure, is_list=self._is_list)
            return fetched_bytes
        except BreakwaterError as error:
            missing["pin"] = str(error)
            return fetched_bytes
        finally:
            promise.withdraw()

    async def _blobs(self, closure: Closure, missing: dict[str, str]) -> int:
        """Fetch what is not here; the bytes that took. What cannot be had goes into `missing`."""

        async def one(descriptor: Descriptor) -> int:
            try:
                return await self._prefetch.fetch(self._path, descriptor, self._ns, self._arrived)
            except BreakwaterError as error:
                missing[str(descriptor.digest)] = str(error)
                return 0

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(descriptor)) for descriptor in closure.blobs.values()]
        return sum(task.result() for task in tasks)

    def _arrived(self, n_bytes: int) -> None:
        self._tell(Step(str(self._reference), "bytes", n_bytes, self._total))


def _first(missing: dict[str, str]) -> str:
    return next((f"{what}: {why}" for what, why in missing.items()), "")
