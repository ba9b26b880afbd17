"""The engine with everything around it made here: a store in memory, a clock that stands still, upstreams that do as
they are told.

`FakeUpstream` is a `ports.Upstream` and passes its suite (tests/contract/test_fake_upstream.py). What its bodies do is
a script: pieces to hand out, failures to raise, gates to wait at.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass, field

from proxy.engine.admission import Admissions
from proxy.engine.blobs import Blobs, Limits, Opened
from proxy.engine.capacity import Capacity
from proxy.engine.charges import Charges
from proxy.engine.links import Links
from proxy.engine.listings import Listings
from proxy.engine.manifests import Manifests
from proxy.engine.origins import Origin, Origins, PassThrough
from proxy.engine.pull import Plan, Pull
from proxy.engine.pump import Work
from proxy.engine.tags import Tags
from proxy.engine.tasks import TaskOwner
from proxy.engine.transfers import OnLastReaderGone
from proxy.engine.verification import Verification
from proxy.errors import BreakwaterError, UnknownBlob, UnknownManifest, UnknownName
from proxy.events import Event, Noticed
from proxy.oci.digest import Digest
from proxy.oci.names import Repository, Tag, TagOrDigest
from proxy.ports import LocalFile, ManifestHead, TagPage, Upkeep, Upstream, UpstreamManifest
from proxy.rules.freshness import TagPolicy
from proxy.rules.gates.allowlist import Rules
from proxy.rules.ledger import Ledger
from proxy.rules.quota import Allowance
from proxy.rules.routes import DEFAULT_PROJECT, ProjectRoute, Route, Routes
from proxy.store.disk import DiskStore
from proxy.store.memory import MemoryStore
from tests.support.clock import ManualClock
from tests.support.images import OCI_INDEX, Image

HOST = "docker.io"
ALPINE = Repository.parse("library/alpine")

#: One step of a body: bytes to hand out, a failure to raise, or a gate to wait at.
Step = bytes | BreakwaterError | asyncio.Event


@dataclass(frozen=True, slots=True)
class Script:
    """What one answer to a GET of a blob does. `size` is what it announces, `offset` where it says that it begins."""

    size: int | None
    steps: Sequence[Step]
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """One question that upstream was asked."""

    kind: str
    repository: str
    what: str
    offset: int = 0


class FakeBody:
    """A ports.BlobBody that follows a script."""

    def __init__(self, script: Script, source: str, on_close: Callable[[], None]) -> None:
        self.size = script.size
        self.offset = script.offset
        self.source = source
        self._steps = list(script.steps)
        self._on_close = on_close
        self._is_closed = False

    async def read(self) -> bytes:
        """The next step."""
        await asyncio.sleep(0)
        while self._steps:
            step = self._steps.pop(0)
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, BreakwaterError):
                raise step
            elif step:
                return step
        return b""

    async def close(self) -> None:
        """Count it as closed."""
        if not self._is_closed:
            self._is_closed = True
            self._on_close()


class FakeUpstream:
    """A registry in memory. Content may be changed at any time; `failure` is raised by every question while it is set.

    `gate`, where set, is waited at before any answer. `scripts` are taken by GETs of their blob, one each, in order.
    """

    def __init__(self, host: str = HOST, *, piece_bytes: int = 1 << 20) -> None:
        self.host = host
        self.asked: list[Asked] = []
        self.failure: BreakwaterError | None = None
        self.gate: asyncio.Event | None = None
        self.scripts: dict[Digest, list[Script]] = {}
        #: Whether answers say a blob's size, a manifest's digest.
        self.says_size = True
        self.says_digest = True
        self.has_referrers = True
        #: Asked with each question's repository; it may raise.
        self.judge: Callable[[str], None] = lambda _: None
        self.open_bodies: Counter[Digest] = Counter()
        #: The most GETs of one blob that were ever in flight at once.
        self.most_at_once = 0
        self._piece_bytes = piece_bytes
        self._manifests: dict[tuple[str, str], Image] = {}
        self._tags: dict[str, list[str]] = {}
        self._blobs: dict[tuple[str, Digest], bytes] = {}

    # -- content and what was seen

    def judged(self, judge: Callable[[str], None]) -> FakeUpstream:
        """The same content and counts, as somebody is shown it of whom `judge` is asked."""
        theirs = copy(self)
        theirs.judge = judge
        return theirs

    def put(self, image: Image, *tags: str, repository: Repository = ALPINE) -> Digest:
        """Have an image with all that it names, under these tags."""
        for blob in image.all_blobs():
            self.put_blob(blob.content, repository=repository)
        for each in image.manifests():
            self._manifests[repository.value, each.digest] = each
        for tag in tags:
            self._manifests[repository.value, tag] = image
            if tag not in self._tags.setdefault(repository.value, []):
                self._tags[repository.value].append(tag)
        return Digest.parse(image.digest)

    def put_blob(self, content: bytes, algorithm: str = "sha256", *, repository: Repository = ALPINE) -> Digest:
        """Have a blob."""
        digest = Digest.of(content, algorithm)
        self._blobs[repository.value, digest] = content
        return digest

    def remove(self, what: str, repository: Repository = ALPINE) -> None:
        """Have a tag, a manifest or a blob no more."""
        self._manifests.pop((repository.value, what), None)
        if ":" in what:
            self._blobs.pop((repository.value, Digest.parse(what)), None)
        elif what in self._tags.get(repository.value, ()):
            self._tags[repository.value].remove(what)

    def count(self, kind: str, what: object = None) -> int:
        """How often this was asked."""
        return sum(one.kind == kind and (what is None or one.what == str(what)) for one in self.asked)

    def kinds(self) -> list[str]:
        """The kinds of what was asked, in order."""
        return [one.kind for one in self.asked]

    # -- ports.Upstream

    async def manifest(self, repository: Repository, target: TagOrDigest) -> UpstreamManifest:
        """See ports.Upstream."""
        found = await self._manifest("manifest", repository, target)
        claimed = Digest.parse(found.digest) if self.says_digest else None
        return UpstreamManifest(found.body, found.media_type, claimed, self.host)

    async def manifest_head(self, repository: Repository, target: TagOrDigest) -> ManifestHead:
        """See ports.Upstream."""
        found = await self._manifest("manifest head", repository, target)
        claimed = Digest.parse(found.digest) if self.says_digest else None
        return ManifestHead(claimed, found.media_type, len(found.body), self.host)

    async def blob(self, repository: Repository, digest: Digest, *, offset: int = 0) -> FakeBody:
        """See ports.Upstream."""
        self.open_bodies[digest] += 1
        self.most_at_once = max(self.most_at_once, self.open_bodies[digest])
        try:
            await self._ask("blob", repository, str(digest), offset)
            if self.scripts.get(digest):
                script = self.scripts[digest].pop(0)
            else:
                content = self._blobs.get((repository.value, digest))
                if content is None:
                    raise UnknownBlob(f"upstream {self.host} has no blob {digest}")
                script = Script(len(content) if self.says_size else None, self._pieces(content[offset:]), offset)
            return FakeBody(script, self.host, lambda: self._closed(digest))
        except BaseException:
            self._closed(digest)
            raise

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """See ports.Upstream."""
        await self._ask("blob head", repository, str(digest))
        content = self._blobs.get((repository.value, digest))
        if content is None:
            raise UnknownBlob(f"upstream {self.host} has no blob {digest}")
        return len(content) if self.says_size else None

    async def tags(self, repository: Repository, *, n: int | None, last: str | None) -> TagPage:
        """See ports.Upstream."""
        await self._ask("tags", repository, last or "")
        if repository.value not in self._tags:
            raise UnknownName(f"upstream {self.host} has no {repository}")
        names = [tag for tag in self._tags[repository.value] if last is None or tag > last]
        page = names if n is None else names[:n]
        return TagPage(tuple(page), page[-1] if len(page) < len(names) else None)

    async def referrers(self, repository: Repository, digest: Digest, *, artifact_type: str) -> bytes | None:
        """See ports.Upstream."""
        await self._ask("referrers", repository, str(digest))
        if not self.has_referrers:
            return None
        entries = []
        for (where, name), image in self._manifests.items():
            document = json.loads(image.body)
            is_about_it = document.get("subject", {}).get("digest") == str(digest)
            is_wanted = artifact_type in ("", document.get("artifactType"))
            if where == repository.value and ":" in name and is_about_it and is_wanted:
                entries.append({**image.descriptor, "artifactType": document.get("artifactType", "")})
        return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()

    async def _manifest(self, kind: str, repository: Repository, target: TagOrDigest) -> Image:
        await self._ask(kind, repository, str(target))
        found = self._manifests.get((repository.value, str(target)))
        if found is None:
            raise UnknownManifest(f"upstream {self.host} has no manifest {repository} {target}")
        return found

    async def _ask(self, kind: str, repository: Repository, what: str, offset: int = 0) -> None:
        self.asked.append(Asked(kind, repository.value, what, offset))
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.judge(repository.value)

    def _pieces(self, content: bytes) -> list[bytes]:
        return [content[at : at + self._piece_bytes] for at in range(0, len(content), self._piece_bytes)]

    def _closed(self, digest: Digest) -> None:
        self.open_bodies[digest] -= 1


# -- the engine --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Engine:
    """The parts, wired as proxy/wiring/ does, with one upstream for every host of `upstreams`."""

    upstreams: Mapping[str, Upstream]
    store: MemoryStore | DiskStore
    clock: ManualClock
    owner: TaskOwner
    capacity: Capacity
    verification: Verification
    links: Links
    manifests: Manifests
    tags: Tags
    blobs: Blobs
    listings: Listings
    pull: Pull
    origins: dict[str, Origin]
    events: list[Event] = field(default_factory=list)
    #: What background tasks that failed were reported with. Empty at the end, or the test fails.
    reports: list[str] = field(default_factory=list)
    charges: Charges = field(init=False)

    @property
    def ledger(self) -> Ledger:
        """What is committed and promised."""
        return self.capacity.ledger

    @property
    def notices(self) -> list[str]:
        """The sentences for operators."""
        return [event.sentence for event in self.events if isinstance(event, Noticed)]

    def origin(self, host: str = HOST) -> Origin:
        """Whom to ask."""
        return self.origins[host]

    async def stored(self, digest: Digest) -> bytes | None:
        """What the store has under this name."""
        blob = await self.store.blobs.open(digest)
        if blob is None:
            return None
        body = os.pread(blob.fd, blob.size + 1, 0)
        blob.close()
        return body

    async def open(self, digest: Digest, *, host: str = HOST, project: str = DEFAULT_PROJECT) -> Opened:
        """A blob of ALPINE, ready to be read."""
        return await self.blobs.open(route(host=host, project=project), self.origins[host], digest)

    async def read(self, digest: Digest, *, host: str = HOST, project: str = DEFAULT_PROJECT) -> bytes:
        """A blob of ALPINE, whole, as a reader gets it."""
        return await whole(await self.open(digest, host=host, project=project))

    async def idle(self) -> None:
        """Wait until no transfer runs and no hashing."""
        while list(self.blobs.running()) or any(
            not task.get_name().startswith(("remember", "count", "watch", "scrub", "read what"))
            for task in tasks_of(self.owner)
        ):
            await asyncio.sleep(0)


def tasks_of(owner: TaskOwner) -> set[asyncio.Task[object]]:
    """The tasks that an owner has running."""
    return set(owner._tasks | owner._hops)


def route(repository: Repository = ALPINE, *, host: str = HOST, project: str = DEFAULT_PROJECT) -> Route:
    """A route as rules/routes.py makes it."""
    return Route(project, host, repository)


async def whole(opened: Opened, offset: int = 0, end: int | None = None) -> bytes:
    """Read a source from `offset` to `end`, as web/serve.py does, and let it go. Raises what ends it short."""
    end = opened.size if end is None else end
    source, found = opened.source, bytearray()
    if isinstance(source, LocalFile):
        found += os.pread(source.blob.fd, end - offset, offset)
        source.blob.close()
        return bytes(found)
    try:
        while offset < end:
            reach = min(await source.beyond(offset), end)
            in_file = min(reach, source.in_file)
            if offset < in_file:
                piece = os.pread(source.fd, in_file - offset, offset)
            else:
                piece = source.piece(offset, reach - offset)
            assert piece, "a source never gives nothing below its frontier"
            found += piece
            offset += len(piece)
        return bytes(found)
    finally:
        source.leave()


@asynccontextmanager
async def engine(
    *upstreams: FakeUpstream,
    store: MemoryStore | DiskStore | None = None,
    ports: Mapping[str, Upstream] | None = None,
    clock: ManualClock | None = None,
    capacity: int = 1 << 40,
    min_free: Callable[[int], int] = lambda _: 0,
    min_free_inodes: Callable[[int], int] = lambda _: 0,
    policy: OnLastReaderGone = "finish",
    limits: Limits | None = None,
    tag_policy: TagPolicy | None = None,
    rules: Iterable[Rules] = (),
    projects: tuple[ProjectRoute, ...] = (),
    allowances: Mapping[str, Allowance] | None = None,
    logins: Mapping[str, PassThrough] | None = None,
    is_counted: bool = True,
    is_loaded: bool = True,
    upkeep: Upkeep | None = None,
    irreplaceable: Collection[Digest] = (),
    events: list[Event] | None = None,
) -> AsyncIterator[Engine]:
    """An engine over `upstreams` (their hosts are the source hosts) or over any `ports` by host.

    At its end nothing may be reserved, and no background task may have failed.
    """
    asked: dict[str, Upstream] = {one.host: one for one in upstreams} | dict(ports or {})
    events = [] if events is None else events
    reports: list[str] = []
    clock = clock or ManualClock()
    store_ = store or MemoryStore()
    owner = TaskOwner(reports.append)
    kept = Capacity(
        Ledger(capacity),
        store_.blobs,
        store_.facts,
        min_free_bytes=min_free,
        min_free_inodes=min_free_inodes,
        clock=clock,
        owner=owner,
        observe=events.append,
        notes=store_.notes,
        records=store_.records,
        upkeep=upkeep,
    )
    if upkeep is not None:
        await kept.prepare()
    verification = Verification(
        owner,
        clock,
        store_.blobs,
        on_gone=kept.forget,
        observe=events.append,
        is_irreplaceable=irreplaceable.__contains__,
    )
    links = Links(store_.records, owner, events.append)
    around = {"clock": clock, "owner": owner, "observe": events.append}
    charges = Charges(allowances or {}, store_.charges, kept, **around)  # type: ignore[arg-type]
    if is_loaded:
        await charges.load()
    manifests = Manifests(store_.blobs, kept, charges, links, verification, **around)  # type: ignore[arg-type]
    kept.on_forgotten = lambda digests: manifests.forget(*digests)
    tags = Tags(store_.records, manifests, links, **around)  # type: ignore[arg-type]
    blobs = Blobs(
        Work(store_.blobs, kept, clock, lambda: 0.0, events.append, charges),
        links,
        verification,
        owner=owner,
        on_last_reader_gone=policy,
        limits=limits,
    )
    listings = Listings(links, manifests, tags, **around)  # type: ignore[arg-type]
    origins = {
        host: Origin(host, one, tag_policy or TagPolicy(), pass_through=(logins or {}).get(host))
        for host, one in asked.items()
    }
    by_project = {one.project: one for one in rules}
    for name in (DEFAULT_PROJECT, *(project.name for project in projects)):
        by_project.setdefault(name, Rules(name))
    plan = Plan(
        Routes(frozenset(asked), next(iter(asked)), projects), by_project, Origins(origins), takes_logins=bool(logins)
    )
    pull = Pull(
        plan,
        tags=tags,
        manifests=manifests,
        blobs=blobs,
        listings=listings,
        links=links,
        charges=charges,
        admissions=Admissions(clock=clock, owner=owner),
    )
    running = Engine(
        asked, store_, clock, owner, kept, verification, links, manifests, tags, blobs, listings, pull, origins
    )
    running.events, running.reports, running.charges = events, reports, charges
    if is_counted:
        kept.start()
        while not kept.is_counted:
            await asyncio.sleep(0)
    try:
        yield running
    finally:
        await owner.aclose()
        await kept.remember()
        if store is None:
            await store_.aclose()
    assert reports == []
    assert kept.ledger.reserved == 0, repr(kept.ledger)


def tag(text: str) -> Tag:
    """A tag."""
    return Tag.parse(text)
