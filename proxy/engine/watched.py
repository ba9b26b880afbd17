"""A table that tells when something it held is no longer what it was: for those who remember what they found in it."""

from __future__ import annotations

from typing import TypeVar

from cachetools import LRUCache

K = TypeVar("K")
V = TypeVar("V")


class WatchedTable(LRUCache[K, V]):
    """An LRUCache that counts losses: while `n_lost` stands still, whatever was found in it is still there."""

    #: How often an entry was removed, evicted or replaced.
    n_lost = 0

    def __setitem__(self, key: K, value: V) -> None:
        if key in self:
            self.n_lost += 1
        super().__setitem__(key, value)

    def __delitem__(self, key: K) -> None:
        self.n_lost += 1  # eviction comes through here as well
        super().__delitem__(key)
