"""What each project pays for, and when a quota is spent (product.md, promise 5). Arithmetic; deletes nothing.

A project pays the full size, once, for every stored blob that was requested through it. Bytes that several projects
asked for are stored once and paid for by each of them: otherwise a project could fill the store at another's expense,
and what one of them evicts would be gone for all. Sizes are exact, not rounded to blocks: what a manifest declares is
what is paid.

`charged + reserved <= quota` at every moment: room is reserved before a fetch begins and judged for each project that
joins it. Order of use is the order of a ring, kept by touching, never by a clock.

A charge takes 60 bytes (table.py). Who else pays for a blob is asked of the other accounts where it matters, at
deletions, and not counted beside them: a count for each blob cost as much as the charges did.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from proxy.oci.digest import Digest
from proxy.rules.table import Ring, Table

_NOT_PAID = -1

#: What happens when a quota is spent: make room among one's own, serve without keeping, or refuse.
OnFull = Literal["evict", "bypass", "deny"]


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one project may hold: `quota` in bytes (None: no bound of its own), and what happens when it is spent."""

    quota: int | None = None
    on_full: OnFull = "evict"


class Account:
    """One project's charges. Changed by `Book` alone, which also knows who else pays for a blob."""

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self.charged = 0
        self.reserved = 0
        #: How often something was no longer paid for: while this stands still, what was paid for is.
        self.n_dropped = 0
        self._table = Table()
        #: Least recently used first.
        self._ring = Ring()
        #: What is paid, in bytes, by number.
        self._sizes = array("q", [_NOT_PAID])

    def __repr__(self) -> str:
        quota = self.allowance.quota
        return f"<Account {self.charged} charged + {self.reserved} reserved of {quota}, {len(self)} blobs>"

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, digest: Digest) -> bool:
        return self._table.find(digest) != 0

    def __iter__(self) -> Iterator[tuple[Digest, int]]:
        """What is paid for, with sizes in bytes, least recently used first. Nothing may change meanwhile."""
        number = self._ring.after[0]
        while number:
            yield self._table.digest(number), self._sizes[number]
            number = self._ring.after[number]

    def batches(self, n: int) -> Iterator[list[tuple[Digest, int]]]:
        """The same in no order, about `n` at a time. What changes meanwhile may or may not be among it."""
        start = 1
        while start < len(self._sizes):
            some = range(start, min(start + n, len(self._sizes)))
            start = some.stop
            yield [(self._table.digest(each), self._sizes[each]) for each in some if self._sizes[each] != _NOT_PAID]

    @property
    def used(self) -> int:
        """Bytes that are paid or promised."""
        return self.charged + self.reserved

    def missing(self, n_bytes: int) -> int:
        """How many bytes too few are free for `n_bytes` more; 0 when they fit."""
        quota = self.allowance.quota
        return 0 if quota is None else max(0, self.used + n_bytes - quota)

    def size_of(self, digest: Digest) -> int | None:
        """What is paid for it, in bytes, or None."""
        number = self._table.find(digest)
        return self._sizes[number] if number else None

    def touch(self, digest: Digest) -> bool:
        """Make it the most recently used. False when it is not paid for here."""
        number = self._table.find(digest)
        if number:
            self._ring.unlink(number)
            self._ring.link(number, self._ring.before[0])
        return number != 0

    def add(self, digest: Digest, size: int) -> None:
        """Pay for it. It must fit, and must not be paid for yet."""
        number = self._table.add(digest)
        if number == len(self._sizes):
            self._sizes.append(size)
        else:
            self._sizes[number] = size
        self._ring.link(number, self._ring.before[0])
        self.charged += size

    def drop(self, digest: Digest) -> int | None:
        """Stop paying for it; returns what was paid, or None."""
        number = self._table.find(digest)
        if not number:
            return None
        size = self._sizes[number]
        self.n_dropped += 1
        self._ring.unlink(number)
        self._sizes[number] = _NOT_PAID
        self._table.free(number)
        self.charged -= size
        return size

    def coldest(self, n_bytes: int, kept: Container[Digest]) -> tuple[list[Digest], int]:
        """The least recently used charges that come to `n_bytes` or more, `kept` ones left out; and what is missing."""
        chosen: list[Digest] = []
        number = self._ring.after[0]
        while number and n_bytes > 0:
            digest = self._table.digest(number)
            if digest not in kept:
                chosen.append(digest)
                n_bytes -= self._sizes[number]
            number = self._ring.after[number]
        return chosen, max(0, n_bytes)


@dataclass(frozen=True, slots=True)
class Drift:
    """What a recount put right in one project: charges for blobs that are gone or of another size, and their bytes."""

    project: str
    n_gone: int
    n_resized: int
    n_bytes: int


class Book:
    """Every project's account. A project without an allowance of its own pays, too, and has no bound."""

    def __init__(self, allowances: Mapping[str, Allowance] | None = None) -> None:
        self._allowances: Mapping[str, Allowance] = allowances or {}
        self._accounts = {project: Account(allowance) for project, allowance in self._allowances.items()}

    def __iter__(self) -> Iterator[tuple[str, Account]]:
        """Projects that have an account, in order of name."""
        return iter(sorted(self._accounts.items()))

    def allow(self, allowances: Mapping[str, Allowance]) -> None:
        """Take over new allowances. A quota that shrank below what is used binds from the next claim on."""
        self._allowances = allowances
        for project, account in self._accounts.items():
            account.allowance = allowances.get(project, Allowance())
        for project in allowances:
            self.of(project)

    def of(self, project: str) -> Account:
        """The project's account, opened at its first use."""
        account = self._accounts.get(project)
        if account is None:
            account = self._accounts[project] = Account(self._allowances.get(project, Allowance()))
        return account

    def is_paid(self, digest: Digest) -> bool:
        """Whether any project pays for it."""
        return any(digest in account for account in self._accounts.values())

    # -- promises ---------------------------------------------------------------------------------------------------

    def has_room(self, project: str, n_bytes: int, kept: Container[Digest]) -> bool:
        """Whether `reserve` would promise it now. Changes nothing."""
        account = self.of(project)
        missing = account.missing(n_bytes)
        return not missing or (account.allowance.on_full == "evict" and account.coldest(missing, kept)[1] == 0)

    def reserve(self, project: str, n_bytes: int, kept: Container[Digest]) -> list[Digest] | None:
        """Promise `n_bytes` of the project's quota, making room among its own charges where it says "evict".

        Returns the digests that it stopped paying for, often none; or None when the bytes cannot be promised: then
        nothing has changed. `kept` may not go: they are being read.
        """
        if not self.has_room(project, n_bytes, kept):
            return None
        account = self.of(project)
        dropped, _ = account.coldest(account.missing(n_bytes), kept)
        for digest in dropped:
            self.drop(project, digest)
        account.reserved += n_bytes
        return dropped

    def release(self, project: str, n_bytes: int) -> None:
        """Take a promise back."""
        account = self.of(project)
        account.reserved -= n_bytes
        if account.reserved < 0:
            raise RuntimeError(f"released more than was reserved: {account!r}")

    def settle(self, project: str, digest: Digest, n_bytes: int) -> None:
        """Turn a promise of exactly the blob's size into a charge. Paid for already: the promise is just taken back."""
        self.release(project, n_bytes)
        self.adopt(project, digest, n_bytes)

    # -- charges ----------------------------------------------------------------------------------------------------

    def adopt(self, project: str, digest: Digest, size: int) -> None:
        """Count a charge that was made before. Counting one twice changes nothing."""
        account = self.of(project)
        if digest not in account:
            account.add(digest, size)

    def drop(self, project: str, digest: Digest) -> bool:
        """The project stops paying for it. False when it did not pay."""
        return self.of(project).drop(digest) is not None

    def gone(self, digest: Digest) -> list[str]:
        """The blob was deleted: nobody pays for it any more. Returns who did."""
        return [project for project in self._accounts if self.drop(project, digest)]

    def over(self, project: str, kept: Container[Digest]) -> list[Digest]:
        """What the project stops paying for because its quota was lowered below its use, as far as that may go."""
        account = self.of(project)
        dropped, _ = account.coldest(account.missing(0), kept)
        for digest in dropped:
            self.drop(project, digest)
        return dropped

    def recount(self, project: str, stored: Iterable[tuple[Digest, int | None]]) -> Drift:
        """Put right what the project pays for. `stored` gives the true size of some of its digests, None for gone."""
        n_gone = n_resized = n_bytes = 0
        account = self.of(project)
        for digest, size in stored:
            paid = account.size_of(digest)
            if paid is None or paid == size:
                continue
            self.drop(project, digest)
            if size is None:
                n_gone += 1
                n_bytes += paid
            else:
                self.adopt(project, digest, size)
                n_resized += 1
                n_bytes += abs(paid - size)
        return Drift(project, n_gone, n_resized, n_bytes)
