"""Capacity arithmetic (INV-5): reserve, settle, release, touch, and which images go first. Decides; deletes nothing.

Order of use is the order of a list, kept by touching, never by a clock. Sizes are rounded up to the file system's
block, as it says it: that is what the disk really gives away. One that gives away more than it says (ext4 with
bigalloc) takes more than is counted here.

**Images, not blobs, are evicted.** A manifest whose layers are gone is worse than none: with upstream out of reach it
makes clients believe in an image that they cannot have. So the ledger knows which stored manifest names what, and

- a blob that a stored manifest names is as recently used as the most recent of them; an image, as its manifest or
  anything that only it names. That is settled when eviction comes by ("takes its place"), not at each hit: a hit
  touches one entry and knows nothing of images;
- what goes is the coldest manifest that none names, with everything that only it names, manifests first, so that a
  crash in between leaves bytes without a name for them and never the opposite;
- what is being read, pinned, or needed by a manifest that stays, stays.

Rejected: reference counts instead of an order (they say what may go, not what should); one LRU of whole images (a layer
that twenty images share is none of theirs, and blobs that were asked for without a manifest would have no place);
asking the records on disk at each eviction (a thousand files read to delete one).

A million blobs must fit beside everything else in 300 MiB (performance.md P5). So an entry is not an object but a number
in a few arrays (table.py): 75 bytes in all, measured with a million. What a manifest names costs four bytes a name, and
an entry of its own for what is not stored.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from heapq import merge

from proxy.oci.digest import Digest
from proxy.rules.table import Ring, Table

#: What a file is rounded up to, in bytes: by the common file systems, and by any at least.
BLOCK_BYTES = 4096
#: No file system rounds further. Some say more: those of a network what they carry in one piece.
MAX_BLOCK_BYTES = 64 << 10
#: Blobs chosen at a time: some milliseconds of deleting, after which others have their turn.
BATCH = 64
#: Entries looked at in one call of `coldest`: a few milliseconds of the loop.
MOST_LOOKED_AT = 2_000
#: What is used is numbered from here on; before this start, from `_KNOWN` on, in the order that was written down. Below
#: that are microseconds since 1970: when a file was written of whose use nothing is known.
_KNOWN, _NOW = 1 << 60, 1 << 61
#: Entries put in order by age in one step.
_STEP = 1_000
_NOT_STORED = -1


def on_disk(size: int, block_bytes: int = BLOCK_BYTES) -> int:
    """What a file of `size` bytes takes of the disk, in bytes."""
    return -(-size // block_bytes) * block_bytes


def block_of(said: int) -> int:
    """What files are rounded up to where the file system says that its unit is `said`, both in bytes."""
    return min(max(said, BLOCK_BYTES), MAX_BLOCK_BYTES)


def slack_of(capacity: int) -> int:
    """How far below full eviction goes once it has begun, in bytes: 1/32, at most 1 GiB.

    Nothing where that would be less than 64 MiB: there a deletion for each arrival costs nothing that shows.
    """
    slack = min(capacity // 32, 1 << 30)
    return slack if slack >= 64 << 20 else 0


def quarantine_share(capacity: int) -> int:
    """What may be kept in quarantine, in bytes: 1/32 of a store, at most 1 GiB."""
    return min(capacity // 32, 1 << 30)


def audit_share(capacity: int) -> int:
    """What the audit log may take, in bytes, all of its files: 1/64 of a store, at most 128 MiB (a million refusals)."""
    return min(capacity // 64, 128 << 20)


@dataclass(frozen=True, slots=True)
class Victims:
    """What should go, in this order. `is_all`: there was nothing else to look at, so an empty list means no room."""

    digests: list[Digest]
    is_all: bool


class Ledger:
    """What is committed and what is promised, in bytes on disk. `committed + uncounted + reserved + upkeep <= capacity`.

    `uncounted` is an upper bound of what is on disk since before this start and has not been counted yet; `upkeep` is
    set aside for all that is on disk and is no blob: folders, records, journals, what is in quarantine.
    """

    def __init__(self, capacity: int, uncounted: int = 0, *, block_bytes: int = BLOCK_BYTES) -> None:
        self.capacity = capacity
        self.block_bytes = block_bytes
        self.committed = 0
        self.reserved = 0
        self.uncounted = uncounted
        self.upkeep = 0
        self._n_stored = 0
        self._table = Table()
        #: What is stored, least recently used first.
        self._ring = Ring()
        # By number.
        self._sizes = array("q", [_NOT_STORED])
        self._used = array("Q", [0])
        #: One manifest that names it, or 0; where there are more, all of them are in `_namers`.
        self._namer = array("I", [0])
        self._namers: dict[int, set[int]] = {}
        self._named: dict[int, array[int]] = {}
        self._n_touched = _NOW
        self._n_known = _KNOWN
        #: The last entry that was not used since the start; 0 for none.
        self._border = 0
        #: Entries looked at since something was found that may go.
        self._n_in_vain = 0

    def __repr__(self) -> str:
        uncounted = f"{self.uncounted} uncounted + " if self.uncounted else ""
        upkeep = f"{self.upkeep} upkeep + " if self.upkeep else ""
        return (
            f"<Ledger {self.committed} committed + {uncounted}{upkeep}{self.reserved} reserved of {self.capacity}, "
            f"{len(self)} blobs>"
        )

    def __len__(self) -> int:
        return self._n_stored

    def __contains__(self, digest: Digest) -> bool:
        return self._number(digest) != 0

    def __iter__(self) -> Iterator[tuple[Digest, int]]:
        """Digests and sizes in bytes, least recently used first. The ledger may change meanwhile; see `batches`."""
        for batch in self.batches(1_000):
            yield from batch

    def batches(self, n: int) -> Iterator[list[tuple[Digest, int]]]:
        """The same, `n` at a time. What is touched meanwhile may come twice, what is dropped may have come already."""
        after = self._ring.after
        number = after[0]
        while number:
            batch: list[tuple[Digest, int]] = []
            places: list[tuple[int, int]] = []
            while number and len(batch) < n:
                batch.append((self._digest(number), self._sizes[number]))
                places.append((number, self._used[number]))
                number = after[number]
            yield batch
            number = self._behind(places)

    def _behind(self, places: list[tuple[int, int]]) -> int:
        """What follows the last of these that is where it was: numbers, and when they were used."""
        for number, used in reversed(places):
            if self._used[number] == used and self._sizes[number] != _NOT_STORED:
                return self._ring.after[number]
        number = self._ring.after[0]  # all of them moved or went: go on behind what is as old
        while number and self._used[number] <= places[-1][1]:
            number = self._ring.after[number]
        return number

    # -- room ---------------------------------------------------------------------------------------------------------

    def on_disk(self, size: int) -> int:
        """What a file of `size` bytes takes of this disk, in bytes."""
        return on_disk(size, self.block_bytes)

    @property
    def free(self) -> int:
        """Bytes that may still be promised without evicting."""
        return self.capacity - self.committed - self.uncounted - self.reserved - self.upkeep

    @property
    def held(self) -> int:
        """All that counts against the capacity, in bytes on disk."""
        return self.committed + self.uncounted + self.reserved + self.upkeep

    @property
    def for_blobs(self) -> int:
        """What blobs may take together: the capacity without what is set aside."""
        return self.capacity - self.upkeep

    def fits(self, n_bytes: int) -> bool:
        """Whether `n_bytes` on disk may be promised now."""
        return n_bytes <= self.free

    def reserve(self, n_bytes: int) -> None:
        """Promise `n_bytes` on disk. Raises RuntimeError when they do not fit: ask `fits` first, in the same breath."""
        if not self.fits(n_bytes):
            raise RuntimeError(f"reserving {n_bytes} beyond {self!r}")
        self.reserved += n_bytes

    def release(self, n_bytes: int) -> None:
        """Take a promise back."""
        self.reserved -= n_bytes
        if self.reserved < 0:
            raise RuntimeError(f"released more than was reserved: {self!r}")

    def settle(self, digest: Digest, size: int, n_reserved: int) -> None:
        """Turn a promise of `n_reserved` bytes on disk into a committed blob of `size` bytes, most recently used."""
        self.release(n_reserved)
        self.adopt(digest, size)

    # -- what is stored -----------------------------------------------------------------------------------------------

    def adopt(self, digest: Digest, size: int) -> None:
        """Count a blob that is on disk; most recently used. Counting one twice changes only its place."""
        number = self._entry(digest)
        if self._sizes[number] == _NOT_STORED:
            self._store(number, size)
        else:
            self._unlink(number)
        self._link_last(number)

    def count(self, digest: Digest, size: int, written_at: float = 0.0) -> bool:
        """Count a blob that was on disk before this start: as old as can be, until `order` says more.

        `written_at` is in seconds since 1970. False when it was counted already. Takes as much from `uncounted`.
        """
        number = self._entry(digest)
        if self._sizes[number] != _NOT_STORED:
            return False
        self._store(number, size)
        self._link(number, 0, min(max(1, int(written_at * 1e6)), _KNOWN - 1))
        if self._border == 0:
            self._border = number
        self.uncounted = max(0, self.uncounted - self.on_disk(size))
        return True

    def order(self, digest: Digest) -> bool:
        """It was used before this start, later than all for which that was said before. False when not stored."""
        number = self._number(digest)
        if number and self._used[number] < _NOW:
            self._unlink(number)
            self._n_known += 1
            self._link(number, self._border, self._n_known)
            self._border = number
        return number != 0

    def order_by_age(self) -> Iterator[None]:
        """Put what was counted, and of whose use nothing is known, in the order of its writing. Step by step: others
        may use the ledger in between."""
        used, runs = self._used, []
        for start in range(1, len(used), _STEP):
            some = range(start, min(start + _STEP, len(used)))
            runs.append(
                array("I", sorted((n for n in some if self._is_unknown(n)), key=used.__getitem__, reverse=True))
            )
            yield
        for n, number in enumerate(merge(*runs, key=used.__getitem__, reverse=True)):
            if self._is_unknown(number):  # nobody has used it meanwhile
                self._unlink(number)
                self._link(number, 0, used[number])
            if n % _STEP == 0:
                yield

    def touch(self, digest: Digest) -> bool:
        """Make it the most recently used. False when it is not counted here."""
        number = self._number(digest)
        if number:
            self._unlink(number)
            self._link_last(number)
        return number != 0

    def drop(self, digest: Digest) -> int:
        """Stop counting a blob that was deleted; returns its size in bytes, 0 when it was not counted."""
        number = self._number(digest)
        if not number:
            return 0
        size = self._sizes[number]
        self._unlink(number)
        self._sizes[number] = _NOT_STORED
        self._n_stored -= 1
        self.committed -= self.on_disk(size)
        self._forget_names(number)
        self._free_if_unknown(number)
        return size

    def size_of(self, digest: Digest) -> int | None:
        """Its size in bytes, or None when it is not counted here."""
        number = self._number(digest)
        return self._sizes[number] if number else None

    # -- what names what ----------------------------------------------------------------------------------------------

    def names(self, manifest: Digest, parts: Iterable[Digest]) -> None:
        """A stored manifest names these, stored or not. For what is not stored nothing is remembered."""
        number = self._number(manifest)
        if not number or number in self._named:
            return
        named = array("I")
        for part in dict.fromkeys(parts):
            child = self._entry(part)
            if child == number:
                continue  # a hash cannot name itself; a record could say so
            named.append(child)
            if not self._namer[child]:
                self._namer[child] = number
            else:
                self._namers.setdefault(child, {self._namer[child]}).add(number)
        if named:
            self._named[number] = named

    def knows_names_of(self, manifest: Digest) -> bool:
        """Whether `names` was told of it since it is stored."""
        return self._number(manifest) in self._named

    def namers(self, digest: Digest) -> list[Digest]:
        """The stored manifests that name it, directly or through another, outermost first."""
        number = self._table.find(digest)
        return [self._digest(each) for each in reversed(self._above(number))] if number else []

    # -- who goes -----------------------------------------------------------------------------------------------------

    def victims(self, n_bytes: int, *, kept: Container[Digest], most: int = BATCH) -> list[Digest]:
        """As `coldest`, looking on until something is found or there is nothing else: an empty list means no room."""
        while not (found := self.coldest(n_bytes, kept=kept, most=most)).digests and not found.is_all:
            pass
        return found.digests

    def coldest(self, n_bytes: int, *, kept: Container[Digest], most: int = BATCH) -> Victims:
        """The coldest images whose going makes room for `n_bytes` more; about `most` blobs at a time.

        `kept` may not go: they are being read, or pinned. A batch may not be enough; then ask again after deleting it,
        as well as where `is_all` is false.
        """
        missing = n_bytes - self.free
        chosen: dict[int, None] = {}
        passed: list[int] = []
        number, n_looked_at = self._ring.after[0], 0
        while number and missing > 0 and len(chosen) < most and n_looked_at < MOST_LOOKED_AT:
            n_looked_at += 1
            following = self._ring.after[number]
            if number not in chosen:
                image = self._image(number, kept)
                if image is None:
                    passed.append(number)
                for each in image or ():
                    if each not in chosen:
                        chosen[each] = None
                        missing -= self.on_disk(self._sizes[each])
            number = following
        if number and not chosen and missing > 0:
            for each in passed:  # the next look must come further
                self._unlink(each)
                self._link_last(each)
            self._n_in_vain += n_looked_at
            if self._n_in_vain > 2 * len(self):
                self._n_in_vain = 0
                return Victims([], True)
        else:
            self._n_in_vain = 0
        return Victims([self._digest(each) for each in chosen], not number or missing <= 0)

    def _image(self, number: int, kept: Container[Digest]) -> list[int] | None:
        """What goes when this one is to go; nothing where it has taken its place in the order instead; None where it
        stays."""
        if self._digest(number) in kept:
            return None
        warmest = max(self._direct_namers(number), key=self._used.__getitem__, default=0)
        if warmest and self._used[warmest] > self._used[number]:
            self._take_place_of(number, warmest)
            return []
        above = self._above(number)
        if any(self._digest(each) in kept for each in above):
            return None
        image = self._with_what_only_they_name([*reversed(above), number])
        warmest = max(image, key=self._used.__getitem__)
        if self._used[warmest] > self._used[number]:
            self._take_place_of(number, warmest)
            return []
        if any(self._digest(each) in kept for each in image):
            return None  # whoever reads a layer is about to want the others
        return image

    def _with_what_only_they_name(self, going: list[int]) -> list[int]:
        """These, and below them all stored entries that nothing else stored names; manifests before what they name."""
        image = dict.fromkeys(going)
        waiting = list(going)
        while waiting:
            for child in self._named.get(waiting.pop(), ()):
                if child in image or self._sizes[child] == _NOT_STORED:
                    continue
                if all(namer in image for namer in self._direct_namers(child)):
                    image[child] = None
                    waiting.append(child)
        return list(image)

    def _above(self, number: int) -> list[int]:
        """Stored manifests that name it, nearest first."""
        found: dict[int, None] = {}
        waiting = [number]
        while waiting:
            for namer in self._direct_namers(waiting.pop(0)):
                if namer != number and namer not in found:
                    found[namer] = None
                    waiting.append(namer)
        return list(found)

    def _direct_namers(self, number: int) -> Iterable[int]:
        more = self._namers.get(number)
        if more is not None:
            return more
        one = self._namer[number]
        return (one,) if one else ()

    def _take_place_of(self, number: int, warmest: int) -> None:
        self._unlink(number)
        self._link(number, warmest, self._used[warmest])
        if self._border == warmest:
            self._border = number

    # -- entries ------------------------------------------------------------------------------------------------------

    def _number(self, digest: Digest) -> int:
        """The entry of a stored blob, or 0."""
        number = self._table.find(digest)
        return number if self._sizes[number] != _NOT_STORED else 0

    def _digest(self, number: int) -> Digest:
        return self._table.digest(number)

    def _entry(self, digest: Digest) -> int:
        number = self._table.add(digest)
        if number == len(self._sizes):
            self._sizes.append(_NOT_STORED)
            self._used.append(0)
            self._namer.append(0)
        return number

    def _is_unknown(self, number: int) -> bool:
        return 0 < self._used[number] < _KNOWN and self._sizes[number] != _NOT_STORED

    def _store(self, number: int, size: int) -> None:
        self._sizes[number] = size
        self._n_stored += 1
        self.committed += self.on_disk(size)

    def _forget_names(self, manifest: int) -> None:
        for child in self._named.pop(manifest, ()):
            more = self._namers.get(child)
            if more is None:
                self._namer[child] = 0
            else:
                more.discard(manifest)
                self._namer[child] = next(iter(more))
                if len(more) == 1:
                    del self._namers[child]
            self._free_if_unknown(child)

    def _free_if_unknown(self, number: int) -> None:
        """Give the entry back when it is neither stored nor named."""
        if self._sizes[number] == _NOT_STORED and not self._namer[number]:
            self._table.free(number)
            self._used[number] = 0

    def _link_last(self, number: int) -> None:
        self._n_touched += 1
        self._link(number, self._ring.before[0], self._n_touched)

    def _link(self, number: int, behind: int, used: int) -> None:
        self._ring.link(number, behind)
        self._used[number] = used

    def _unlink(self, number: int) -> None:
        self._ring.unlink(number)
        if self._border == number:
            self._border = self._ring.before[number]
