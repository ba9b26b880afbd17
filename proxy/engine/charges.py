"""Who pays for what: quotas, as requests and transfers meet them (product.md, promise 5).

The arithmetic is rules/quota.py's. Added here: a `Tab` for each transfer, which reserves for each project that joins;
the deletion of what nobody pays for any more; and a journal on disk, so that a killed process knows its charges again.

The journal is written ahead: a charge that counts against a quota is durable before the blob has its name, and is taken
back only after the blob is gone. So a crash never leaves a blob that somebody with a quota has for free, but at most a
charge for a blob that is not there; the recount after the next start finds those, repairs them and says so.

A start does not wait for the journals: with a million charges they take seconds to read. Until they are read nothing is
known of what a project with a quota has spent, so a transfer for it waits a little and then is passed through and not
kept; what is stored is read without being judged, and a manifest let through. Projects without a quota notice nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cachetools import TTLCache

from proxy.engine.capacity import Capacity
from proxy.engine.tasks import TaskOwner
from proxy.errors import Denied, OutOfSpace, OverQuota, StoreError, Unavailable
from proxy.events import Event, Noticed
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.ports import ChargeJournal, Clock
from proxy.rules.gates import quota as gate
from proxy.rules.quota import Allowance, Book, Drift

#: How often charges that need not be durable at once are written down, and left-over deletions are tried again.
WRITE_EVERY_S = 5.0
#: A client that was given a manifest may fetch what it names within this, even when others have spent the quota since.
ADMITTED_FOR_S = 900.0
#: Digests that such manifests named, remembered for each project.
MAX_ADMITTED = 20_000
#: Reads that a start could not charge yet, remembered. Those beyond are charged at their next.
MAX_OWED = 20_000
#: A journal is written anew when it has this many lines, and four for each charge.
MIN_LINES = 20_000
#: Charges looked at in one turn of the loop while recounting, or on their way into a journal that is written anew.
RECOUNT_STEP = 200
#: How long a start waits for the journals: small ones are read by then, and nobody need know that they were not.
START_PATIENCE_S = 0.1
#: How long a transfer for a project with a quota waits for them before it is passed through.
LOAD_PATIENCE_S = 2.0


class Tab:
    """Who pays for one blob on its way. Ends with `close`, which may come again."""

    def __init__(self, charges: Charges, digest: Digest) -> None:
        self._charges = charges
        self._digest = digest
        #: project -> bytes reserved for it
        self._promised: dict[str, int] = {}
        #: Projects that joined before the size was known.
        self._undecided: dict[str, None] = {}
        #: Nothing will be kept, so nobody is asked to pay.
        self._is_unkept = False
        self._is_recorded = False
        self._is_settled = False

    def join(self, project: str, size: int | None, *, is_admitted: bool = False) -> None:
        """A reader of this project joins: it pays, or reads for free.

        Raises Denied where a full project refuses, unless the reader `is_admitted` whatever it costs.
        """
        if project in self._promised or project in self._undecided:
            return
        if self._is_settled:
            self._charges.use(project, self._digest)
        elif size is None or not self._charges.knows(project):
            self._undecided[project] = None
        elif (self._is_unkept or not self._promise(project, size)) and not is_admitted:
            self._charges.refuse_unless_admitted(project, self._digest, size)

    async def secure(self, size: int | None) -> None:
        """The size is known now, or never will be: judge again where it differs from what was said. Returns when there
        is room. Raises OverQuota when no project that joined can pay."""
        await self._charges.known_to_all((*self._promised, *self._undecided))
        for project in (*self._promised, *self._undecided):
            promised = self._promised.pop(project, None)
            if promised is not None:
                if promised == size:
                    self._promised[project] = promised
                    continue
                self._charges.book.release(project, promised)
            self._promise(project, size)
        self._undecided.clear()
        if not self._promised:
            self.give_up()
            raise OverQuota(f"{self._digest}: no project that asked for it has room for it in its quota")
        await self._charges.sweep()

    async def record(self) -> None:
        """Write the charges ahead of the commit. Raises OutOfSpace or Unavailable: then the blob must not be kept."""
        is_bounded, self._is_recorded = False, True
        for project, n_bytes in self._promised.items():
            self._charges.note(project, self._digest, n_bytes)
            is_bounded = is_bounded or self._charges.book.of(project).allowance.quota is not None
        if is_bounded:
            await self._charges.write()

    def settle(self, size: int) -> None:
        """The blob has its name: promises become charges."""
        self._is_settled = True
        promised, self._promised = self._promised, {}
        for project, n_bytes in promised.items():
            self._charges.book.release(project, n_bytes)
            is_paid = self._digest in self._charges.book.of(project)
            if n_bytes == size or is_paid or self._charges.made_room(project, size):
                self._charges.charge(project, self._digest, size)
            else:  # it paid when it joined, and a recount has found since that the blob was gone
                self._charges.note_unpaid(project, self._digest)

    def give_up(self) -> None:
        """Nothing will be kept after all, though readers are still served."""
        self._is_unkept = True
        promised, self._promised = self._promised, {}
        for project, n_bytes in promised.items():
            self._charges.book.release(project, n_bytes)
            if self._is_recorded:
                self._charges.note_unpaid(project, self._digest)

    def close(self) -> None:
        """The transfer has ended."""
        self.give_up()

    def _promise(self, project: str, size: int | None) -> bool:
        """Reserve for a project; of unknown size only where there is no bound."""
        account = self._charges.book.of(project)
        if size is None and account.allowance.quota is not None:
            return False
        n_bytes = 0 if size is None or self._digest in account else size
        if not self._charges.reserve(project, n_bytes):
            return False
        self._promised[project] = n_bytes
        return True


@dataclass(frozen=True, slots=True)
class Usage:
    """What one project uses: bytes and blobs it pays for, bytes promised to transfers, its quota (None: no bound)."""

    project: str
    charged_bytes: int
    reserved_bytes: int
    n_blobs: int
    quota: int | None
    on_full: str


class Charges:
    """Owns the book and its journal. True for this process, which holds the store's lock."""

    def __init__(
        self,
        allowances: Mapping[str, Allowance],
        journal: ChargeJournal,
        capacity: Capacity,
        *,
        clock: Clock,
        owner: TaskOwner,
        observe: Callable[[Event], None],
    ) -> None:
        self.book = Book(allowances)
        #: What the last recount repaired, by project.
        self.drift: Sequence[Drift] = ()
        self._journal = journal
        self._capacity = capacity
        self._clock = clock
        self._owner = owner
        self._observe = observe
        #: What the journal does not know yet: project -> digest -> bytes, or None for no longer paid.
        self._unwritten: dict[str, dict[Digest, int | None]] = {}
        self._n_lines: dict[str, int] = {}
        #: To be deleted, with who paid last and how much.
        self._doomed: dict[Digest, dict[str, int]] = {}
        self._admitted: TTLCache[tuple[str, Digest], None] = TTLCache(
            MAX_ADMITTED, ADMITTED_FOR_S, timer=clock.monotonic
        )
        self._full: set[str] = set()
        self._writing = asyncio.Lock()
        self._sweeping = asyncio.Lock()
        self._loaded = asyncio.Event()
        #: The journals were read, or cannot be.
        self._read = asyncio.Event()
        self._load_until = clock.monotonic() + LOAD_PATIENCE_S
        #: What was charged, uncharged and deleted while the journals are read: they know nothing of it.
        self._meanwhile: set[tuple[str, Digest]] = set()
        self._gone_meanwhile: set[Digest] = set()
        #: What was read while nobody knew what is stored, or what the project pays for.
        self._owed: dict[tuple[str, Digest], None] = {}
        capacity.on_gone = self.gone

    # -- a start, and what runs behind ------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Read the journals in the background. Returns when they are read, or after a moment."""
        loading = self._owner.spawn_background(self._load_quietly(), "read what projects pay for")
        try:
            async with self._owner.deadline(self._clock, START_PATIENCE_S):
                await asyncio.shield(loading)
        except TimeoutError:
            pass

    async def _load_quietly(self) -> None:
        try:
            await self.load()
        except StoreError as error:
            self._read.set()  # waiting would not help
            self._observe(
                Noticed("error", f"nothing new is kept for projects with a quota, whose use is not known: {error}")
            )

    async def load(self) -> None:
        """Read the journals. Raises Unavailable when the disk fails."""
        async for project, changes in self._journal.changes():
            self._n_lines[project] = self._n_lines.get(project, 0) + len(changes)
            for digest, size in changes:
                if (project, digest) in self._meanwhile or self.book.of(project).size_of(digest) == size:
                    continue
                self.book.drop(project, digest)
                if size is not None:
                    self.book.adopt(project, digest, size)
        self._loaded.set()
        self._read.set()
        self.gone(digest for digest in self._gone_meanwhile if digest not in self._capacity.ledger)
        self._meanwhile.clear()
        self._gone_meanwhile.clear()

    @property
    def is_loaded(self) -> bool:
        """Whether the book knows all that the journals said."""
        return self._loaded.is_set()

    def knows(self, project: str) -> bool:
        """Whether it can be said what this project may still spend."""
        return self.is_loaded or self.book.of(project).allowance.quota is None

    async def read(self) -> None:
        """Return when the journals are read, or cannot be, however long that takes."""
        await self._read.wait()

    async def known_to_all(self, projects: Iterable[str]) -> None:
        """Return when the projects' use is known, or when that has had its time."""
        if all(map(self.knows, projects)):
            return
        patience_s = self._load_until - self._clock.monotonic()
        if patience_s > 0:
            try:
                async with self._owner.deadline(self._clock, patience_s):
                    await self._read.wait()
            except TimeoutError:
                pass

    def start(self) -> None:
        """Recount when the store has been counted, and keep the journal written, in the background."""
        self._owner.spawn_background(self._recount_once(), "recount charges")
        self._owner.spawn_background(self._write_forever(), "write charges")

    async def aclose(self) -> None:
        """Write what is not written yet. Never raises: the next recount repairs what is missing."""
        await self._write_quietly()

    async def _write_forever(self) -> None:
        while True:
            await self._clock.sleep(WRITE_EVERY_S)
            await self._write_quietly()
            await self.sweep()

    async def _write_quietly(self) -> None:
        try:
            await self.write()
        except StoreError as error:
            self._observe(Noticed("warning", f"charges could not be written down, trying again: {error}"))

    async def _recount_once(self) -> None:
        try:
            await self._capacity.counted()
        except Unavailable:
            return  # said by whoever could not count it
        await self._loaded.wait()
        await self.recount()
        await self._charge_owed()
        self._trim()

    async def _charge_owed(self) -> None:
        """A project pays for what it has read since the start, too; if it cannot, then it had that for free."""
        owed, self._owed = list(self._owed), {}
        for start in range(0, len(owed), RECOUNT_STEP):
            for project, digest in owed[start : start + RECOUNT_STEP]:
                try:
                    self.use(project, digest)
                except Denied:
                    continue
            await asyncio.sleep(0)

    async def recount(self) -> Sequence[Drift]:
        """Compare every charge with what is stored, repair what differs and report it. The store must be counted, and
        the journals read."""
        found = []
        await self._put_in_order()
        for project, account in self.book:
            drift = Drift(project, 0, 0, 0)
            for batch in account.batches(RECOUNT_STEP):
                true = [(digest, self._capacity.ledger.size_of(digest)) for digest, _ in batch]
                some = self.book.recount(project, true)
                for digest, size in true:
                    if size is None or account.size_of(digest) != size:
                        self.note_unpaid(project, digest)
                drift = Drift(
                    project,
                    drift.n_gone + some.n_gone,
                    drift.n_resized + some.n_resized,
                    drift.n_bytes + some.n_bytes,
                )
                await asyncio.sleep(0)
            if drift.n_gone or drift.n_resized:
                found.append(drift)
                self._observe(
                    Noticed(
                        "warning",
                        f"recount: project {project!r} paid for {drift.n_gone} blobs that are not stored and for "
                        f"{drift.n_resized} at a wrong size; repaired, {drift.n_bytes} bytes in all",
                    )
                )
        self.drift = tuple(found)
        return self.drift

    async def _put_in_order(self) -> None:
        """Least recently used first, as far as the store's own order tells: a journal knows no order of use."""
        accounts = [account for _, account in self.book]
        for batch in self._capacity.ledger.batches(RECOUNT_STEP):
            for digest, _ in batch:
                for account in accounts:
                    account.touch(digest)
            await asyncio.sleep(0)

    # -- what requests do -------------------------------------------------------------------------------------------

    def use(self, project: str, digest: Digest) -> None:
        """A blob is read through this project, which pays from now on for what is stored, if it can.

        Raises Denied where it cannot, refuses when full, and did not admit a manifest that names it.
        """
        if self.book.of(project).touch(digest):
            return
        size = self._capacity.ledger.size_of(digest)
        if not self.knows(project) or (size is None and not self._capacity.is_counted):
            if len(self._owed) < MAX_OWED:
                self._owed[(project, digest)] = None
            return
        if size is None:
            return  # passed through and not stored
        if self.made_room(project, size):
            self.charge(project, digest, size)
        else:
            self.refuse_unless_admitted(project, digest, size)

    def admit(self, project: str, what: str, manifest: Descriptor, parts: Iterable[Descriptor]) -> None:
        """Decide at the manifest whether a project that refuses when full has room for all of it. Raises Denied.

        `parts` are what it names that belongs to it: config and layers.
        """
        account = self.book.of(project)
        if account.allowance.on_full != "deny" or account.allowance.quota is None:
            return
        all_of_it = (manifest, *parts)
        if self.is_loaded:
            gate.check_manifest(account, project, what, all_of_it)
        for part in all_of_it:
            self._admitted[(project, part.digest)] = None

    def refuse_unless_admitted(self, project: str, digest: Digest, size: int) -> None:
        """Raise Denied where a full project refuses, unless the digest belongs to a manifest that was let through."""
        account = self.book.of(project)
        if account.allowance.on_full == "deny" and self.is_loaded and (project, digest) not in self._admitted:
            gate.refuse(account, project, str(digest), size)

    def open(self, digest: Digest) -> Tab:
        """A tab for a blob that is about to be fetched."""
        return Tab(self, digest)

    def check_room(self, project: str, n_bytes: int, what: str) -> None:
        """Whether `n_bytes` more fit into a project's quota, its own cold blobs making room where it says so.

        Changes nothing. Raises OverQuota, saying what needs how much; `what` is its subject.
        """
        if not self.knows(project):
            raise OverQuota(f"{what} needs room in the quota of project {project!r}, and what that uses cannot be read")
        if self.book.has_room(project, n_bytes, self._capacity.kept):
            return
        account = self.book.of(project)
        raise OverQuota(
            f"{what} needs {gate.spelled(n_bytes)} more of the quota of project {project!r}, and "
            f"{gate.spelled(account.used)} of {gate.spelled(account.allowance.quota or 0)} are used: raise the quota, or "
            "purge what is not needed"
        )

    # -- for tabs ---------------------------------------------------------------------------------------------------

    def reserve(self, project: str, n_bytes: int) -> bool:
        """Promise bytes of a project's quota, evicting among its own where it says so. False when they do not fit, or
        nobody knows yet."""
        if not self.knows(project):
            return False
        dropped = self.book.reserve(project, n_bytes, self._capacity.kept)
        if dropped is None:
            self._say_full(project)
            return False
        if dropped:
            self._doom(project, dropped)
        elif project in self._full:
            self._full.discard(project)
        return True

    def made_room(self, project: str, n_bytes: int) -> bool:
        """Room in a project's quota for what is charged to it in the same breath; made, or not, as by `reserve`."""
        if not self.reserve(project, n_bytes):
            return False
        self.book.release(project, n_bytes)
        return True

    def charge(self, project: str, digest: Digest, size: int) -> None:
        """The project pays for a stored blob."""
        self.book.adopt(project, digest, size)
        self.note(project, digest, size)

    def note_unpaid(self, project: str, digest: Digest) -> None:
        """To be written: the project does not pay, or no longer; unless it does."""
        self.note(project, digest, self.book.of(project).size_of(digest))

    def note(self, project: str, digest: Digest, size: int | None) -> None:
        """To be written: the project pays so much, or (None) no longer."""
        self._unwritten.setdefault(project, {})[digest] = size
        if not self.is_loaded:
            self._meanwhile.add((project, digest))

    def gone(self, digests: Iterable[Digest]) -> None:
        """These blobs were deleted, for whatever reason: nobody pays for them any more."""
        for digest in digests:
            if not self.is_loaded:
                self._gone_meanwhile.add(digest)
            for project in self.book.gone(digest):
                self.note_unpaid(project, digest)

    # -- the journal ------------------------------------------------------------------------------------------------

    async def write(self) -> None:
        """Make everything durable that was noted before. Raises OutOfSpace or Unavailable; it is then tried again."""
        async with self._writing:
            unwritten, self._unwritten = self._unwritten, {}
            while unwritten:
                project, changes = unwritten.popitem()
                try:
                    # To its end, whoever asked: two that append at once would write over each other.
                    await self._owner.uninterrupted(self._write(project, changes), "write charges")
                except BaseException:
                    unwritten[project] = changes
                    for each, older in unwritten.items():
                        self._unwritten[each] = {**older, **self._unwritten.get(each, {})}
                    raise

    async def _write(self, project: str, changes: Mapping[Digest, int | None]) -> None:
        account = self.book.of(project)
        n_lines = self._n_lines.get(project, 0) + len(changes)
        if self.is_loaded and n_lines > max(MIN_LINES, 4 * len(account)):
            await self._journal.rewrite(project, self._all_of(project, changes))
            n_lines = len(account) + len(changes)
        else:
            await self._journal.append(project, list(changes.items()))
        self._n_lines[project] = n_lines

    def _all_of(
        self, project: str, changes: Mapping[Digest, int | None]
    ) -> Iterator[Sequence[tuple[Digest, int | None]]]:
        """What a new journal of a project says, a little at a time: what changes meanwhile is noted and appended."""
        yield from self.book.of(project).batches(RECOUNT_STEP)
        # Behind the book are blobs about to be deleted; ahead of it, the charges of transfers about to commit.
        yield [(digest, payers[project]) for digest, payers in self._doomed.items() if project in payers]
        yield list(changes.items())

    # -- what nobody pays for ---------------------------------------------------------------------------------------

    def _doom(self, project: str, dropped: Sequence[Digest]) -> None:
        """A project stopped paying for these. Those that others pay for stay; the rest is deleted soon."""
        is_idle = not self._doomed
        for digest in dropped:
            if self.book.is_paid(digest):
                self.note_unpaid(project, digest)
            else:
                self._doomed.setdefault(digest, {})[project] = self._capacity.ledger.size_of(digest) or 0
        if is_idle and self._doomed:
            self._owner.spawn_background(self.sweep(), "delete what nobody pays for")

    async def sweep(self) -> None:
        """Delete what nobody pays for any more. What is being read at this moment is left for the next time."""
        async with self._sweeping:
            if not self.is_loaded:
                return  # others may pay for it
            doomed, kept = self._doomed, self._capacity.kept
            going = [digest for digest in doomed if digest not in kept and not self.book.is_paid(digest)]
            # A manifest does not outlive what it names, whoever pays for it: it would promise what is not here.
            above = [namer for digest in going for namer in self._capacity.ledger.namers(digest) if namer not in kept]
            going = list(dict.fromkeys([*above, *going]))
            for digest in [digest for digest in doomed if self.book.is_paid(digest)]:
                self._bury(digest)
            if not going:
                return
            try:
                await self._capacity.evict(going)
            except OutOfSpace as error:
                self._observe(Noticed("error", f"blobs that nobody pays for could not be deleted: {error}"))
                return
            for digest in going:
                self._bury(digest)

    def _bury(self, digest: Digest) -> None:
        for project in self._doomed.pop(digest, ()):
            self.note_unpaid(project, digest)

    def _trim(self) -> None:
        """A quota that was lowered between two runs, or by a reload, holds from now on."""
        for project, _ in self.book:
            if dropped := self.book.over(project, self._capacity.kept):
                self._doom(project, dropped)

    # -- what operators see -----------------------------------------------------------------------------------------

    def allow(self, allowances: Mapping[str, Allowance]) -> None:
        """Take over the allowances of new settings."""
        self.book.allow(allowances)
        if self._capacity.is_counted:
            self._trim()

    def usage(self) -> list[Usage]:
        """What each project uses, in order of name."""
        return [
            Usage(
                project,
                account.charged,
                account.reserved,
                len(account),
                account.allowance.quota,
                account.allowance.on_full,
            )
            for project, account in self.book
        ]

    def _say_full(self, project: str) -> None:
        """Once, until there is room again."""
        if project in self._full:
            return
        self._full.add(project)
        account = self.book.of(project)
        what = {"deny": "refused", "bypass": "served and not kept", "evict": "served and not kept where all is in use"}
        self._observe(
            Noticed(
                "warning",
                f"project {project!r} is full: {account.used} of {account.allowance.quota} bytes are used; what is new "
                f"is {what[account.allowance.on_full]}",
            )
        )
