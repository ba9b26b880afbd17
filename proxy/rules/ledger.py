"""Capacity arithmetic (INV-5): reserve, settle, release, touch, and who goes first. Decides; deletes nothing.

Order of use is the order of this table, kept by touching, never by a clock. Sizes are rounded up to the file system's
block: that is what the disk really gives away.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator

from proxy.oci.digest import Digest

#: What a file costs beyond its bytes, at most: the rounding of the common file systems.
BLOCK_BYTES = 4096


def on_disk(size: int) -> int:
    """What a file of `size` bytes takes of the disk, in bytes."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


class Ledger:
    """What is committed and what is promised, in bytes on disk. `committed + reserved <= capacity` at every moment."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.committed = 0
        self.reserved = 0
        self._sizes: OrderedDict[Digest, int] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Ledger {self.committed} committed + {self.reserved} reserved of {self.capacity}, {len(self)} blobs>"

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._sizes

    def __iter__(self) -> Iterator[tuple[Digest, int]]:
        """Digests and sizes in bytes, least recently used first."""
        return iter(self._sizes.items())

    @property
    def free(self) -> int:
        """Bytes that may still be promised without evicting."""
        return self.capacity - self.committed - self.reserved

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

    def adopt(self, digest: Digest, size: int) -> None:
        """Count a blob that is on disk; most recently used. Counting one twice changes only its place."""
        if digest not in self._sizes:
            self._sizes[digest] = size
            self.committed += on_disk(size)
        else:
            self._sizes.move_to_end(digest)

    def touch(self, digest: Digest) -> bool:
        """Make it the most recently used. False when it is not counted here."""
        if digest not in self._sizes:
            return False
        self._sizes.move_to_end(digest)
        return True

    def drop(self, digest: Digest) -> int:
        """Stop counting a blob that was deleted; returns its size in bytes, 0 when it was not counted."""
        size = self._sizes.pop(digest, 0)
        self.committed -= on_disk(size)
        return size

    def size_of(self, digest: Digest) -> int | None:
        """Its size in bytes, or None when it is not counted here."""
        return self._sizes.get(digest)

    def victims(self, n_bytes: int, *, kept: Container[Digest], most: int = 64) -> list[Digest]:
        """The least recently used blobs whose going makes room for `n_bytes` more, at most `most` of them at a time.

        `kept` may not go: they are being read, or something that stays needs them. An empty list means that no room can
        be made; a full batch may not be enough, then ask again after deleting it.
        """
        missing = n_bytes - self.free
        chosen: list[Digest] = []
        for digest, size in self._sizes.items():
            if missing <= 0 or len(chosen) >= most:
                break
            if digest in kept:
                continue
            chosen.append(digest)
            missing -= on_disk(size)
        return chosen
