"""Digests by number, and numbers in an order: the compact ground that the ledger and every account stand on.

A million blobs must fit into 300 MiB together with everything else (performance.md P5), once in the ledger and once in
the account of whoever pays. So nothing here is an object per entry: 32 bytes of digest in one long row, four to find it
and four for its neighbour in the same bucket; an order takes eight more. With what the ledger keeps beside it that is
some 75 bytes, where a dict and a list take 210 and an OrderedDict of digests takes 300.

No call takes longer for there being more entries. A dict of a million that grows copies all of them at once, 50 ms and
on a busy machine half a second in which nobody is served; here every new entry splits one bucket (linear hashing:
Litwin, "Linear hashing: a new tool for file and table addressing", VLDB 1980). The rows themselves grow by realloc,
which moves pages and not bytes.

Rejected: a dict for each first byte (no pause either, but all the memory), sqlite (a million rows of our own making to
ask a question of nanoseconds), and less than the whole digest as key (two blobs would share an entry).
"""

from __future__ import annotations

from array import array

from proxy.oci.digest import ALGORITHMS, Digest

_WIDTH = 32
_FIRST_BUCKETS = 64
_ALGORITHM_OF = {length // 2: algorithm for algorithm, length in ALGORITHMS.items()}


class Table:
    """Digests and their numbers, which count from 1 and are used again; 0 is nobody's."""

    def __init__(self) -> None:
        self._keys = bytearray(_WIDTH)
        #: What a sha512 has beyond 32 bytes.
        self._tails: dict[int, bytes] = {}
        self._neighbour = array("I", [0])
        self._first = array("I", [0] * _FIRST_BUCKETS)
        #: Buckets when this round of splitting began, and how many of them have been split since.
        self._n_round = _FIRST_BUCKETS
        self._n_split = 0
        self._unused = array("I")
        self._n_entries = 0

    def __len__(self) -> int:
        return self._n_entries

    @property
    def end(self) -> int:
        """One more than the largest number that was ever given out."""
        return len(self._neighbour)

    def find(self, digest: Digest) -> int:
        """Its number, or 0."""
        key = bytes.fromhex(digest.hex)
        return self._find(key[:_WIDTH], key[_WIDTH:])

    def add(self, digest: Digest) -> int:
        """Its number, a new one where it has none: an unused one, or `end`."""
        key = bytes.fromhex(digest.hex)
        key, tail = key[:_WIDTH], key[_WIDTH:]
        number = self._find(key, tail)
        if number:
            return number
        if self._unused:
            number = self._unused.pop()
            self._keys[number * _WIDTH : (number + 1) * _WIDTH] = key
        else:
            number = len(self._neighbour)
            self._keys += key
            self._neighbour.append(0)
        if tail:
            self._tails[number] = tail
        self._put(number, self._bucket(key))
        self._n_entries += 1
        if self._n_entries > len(self._first):
            self._split()
        return number

    def free(self, number: int) -> None:
        """Forget the digest of a number that is in use."""
        at = self._bucket(self._key(number))
        beside = self._first[at]
        if beside == number:
            self._first[at] = self._neighbour[number]
        else:
            while self._neighbour[beside] != number:
                beside = self._neighbour[beside]
            self._neighbour[beside] = self._neighbour[number]
        self._tails.pop(number, None)
        self._unused.append(number)
        self._n_entries -= 1

    def digest(self, number: int) -> Digest:
        """The digest of a number that is in use."""
        key = self._key(number) + self._tails.get(number, b"")
        return Digest(_ALGORITHM_OF[len(key)], key.hex())

    def _find(self, key: bytes, tail: bytes) -> int:
        keys = self._keys
        number = self._first[self._bucket(key)]
        while number:
            start = number * _WIDTH
            if keys[start : start + _WIDTH] == key and self._tails.get(number, b"") == tail:
                return number
            number = self._neighbour[number]
        return 0

    def _key(self, number: int) -> bytes:
        return bytes(self._keys[number * _WIDTH : (number + 1) * _WIDTH])

    def _bucket(self, key: bytes) -> int:
        # Python's own hash is keyed anew in every process: nobody can make digests that all meet in one bucket.
        found = hash(key)
        at = found & (self._n_round - 1)
        return at if at >= self._n_split else found & (2 * self._n_round - 1)

    def _put(self, number: int, at: int) -> None:
        self._neighbour[number] = self._first[at]
        self._first[at] = number

    def _split(self) -> None:
        """One more bucket: some entries of the next in turn move there."""
        number = self._first[self._n_split]
        self._first[self._n_split] = 0
        self._first.append(0)
        self._n_split += 1
        if self._n_split == self._n_round:
            self._n_round, self._n_split = 2 * self._n_round, 0
        while number:
            following = self._neighbour[number]
            self._put(number, self._bucket(self._key(number)))
            number = following


class Ring:
    """Numbers in an order, 0 before the first and behind the last. `after` and `before` are for reading."""

    def __init__(self) -> None:
        self.before = array("I", [0])
        self.after = array("I", [0])

    def link(self, number: int, behind: int) -> None:
        """Put a number that is not in the order behind another (0: first)."""
        while number >= len(self.after):
            self.before.append(0)
            self.after.append(0)
        following = self.after[behind]
        self.before[number], self.after[number] = behind, following
        self.after[behind] = self.before[following] = number

    def unlink(self, number: int) -> None:
        """Take it out."""
        before, after = self.before[number], self.after[number]
        self.after[before], self.before[after] = after, before
