"""The first read of a stored file after a start is hashed alongside (product.md, promise 2).

A file that was verified by this process and has kept its inode, size and ctime is served as it is. Any other is hashed
while its readers get it, as far as the hashing has come and with the end held back, exactly like a transfer; one
hashing for any number of readers. A file that does not hash to its name is quarantined and its readers end short.
"""

from __future__ import annotations

from collections.abc import Callable

from cachetools import LRUCache

from proxy.engine.tasks import TaskOwner
from proxy.engine.transfers import Source, Transfer
from proxy.errors import BreakwaterError, Corrupt, Unavailable
from proxy.events import Event, Noticed
from proxy.oci.digest import Digest, Verifier
from proxy.ports import BlobStore, Clock, FileIdentity, OpenBlob
from proxy.rules.transfer import State

#: How many verified files are remembered; one that falls out is hashed once more.
MAX_REMEMBERED = 200_000
#: What one hop reads and hashes.
PIECE_BYTES = 1 << 20


class Verification:
    """Which stored files are known to be right, and the hashing of those that are not yet. True for this process."""

    def __init__(
        self,
        owner: TaskOwner,
        clock: Clock,
        blobs: BlobStore,
        *,
        on_gone: Callable[[Digest], None],
        observe: Callable[[Event], None],
        is_irreplaceable: Callable[[Digest], bool] = lambda _: False,
    ) -> None:
        """`on_gone` is told of what was taken out of reach. A file that merely cannot be read now stays where it is when
        it is irreplaceable: the disk may come back, and nobody else has the bytes."""
        self._owner = owner
        self._clock = clock
        self._blobs = blobs
        self._on_gone = on_gone
        self._observe = observe
        self._is_irreplaceable = is_irreplaceable
        self._verified: LRUCache[Digest, FileIdentity] = LRUCache(MAX_REMEMBERED)
        self._running: dict[Digest, tuple[FileIdentity, Transfer]] = {}

    def is_verified(self, digest: Digest, identity: FileIdentity) -> bool:
        """Whether this very file was seen to hash to `digest` since the start."""
        return self._verified.get(digest) == identity

    def remember(self, digest: Digest, identity: FileIdentity) -> None:
        """This very file hashes to `digest`: someone else has just hashed it."""
        self._verified[digest] = identity

    def forget(self, digest: Digest) -> None:
        """Whatever is under this name is to be hashed again."""
        self._verified.pop(digest, None)

    async def condemn(self, digest: Digest, why: str, blob: OpenBlob | None = None) -> None:
        """Take a file that is wrong out of reach, and say so. With `blob`, which must still be open, that very file: a
        right one may have taken its place while it was read, and stays. Never raises."""
        self.forget(digest)
        if await self._blobs.quarantine(digest, why, blob.identity.inode if blob is not None else None):
            self._on_gone(digest)
            self._observe(Noticed("error", f"{why}; moved to quarantine"))

    def tail(self, digest: Digest, blob: OpenBlob) -> Transfer:
        """The hashing of this file, begun if it is not running. It owns `blob`, and closes it if it is not needed."""
        running = self._running.get(digest)
        if running is not None and running[0] == blob.identity:
            blob.close()
            return running[1]
        transfer = Transfer(
            digest, Source("", ""), started_at=self._clock.monotonic(), policy="finish", expected=blob.size
        )
        transfer.file = blob
        transfer.in_file = blob.size
        transfer.goes(State.STREAMING)
        transfer.confirm_size(blob.size)
        transfer.n_readers += 1  # the hashing itself reads: the file stays open until it is done
        self._running[digest] = (blob.identity, transfer)
        self._owner.spawn_background(self._hash(transfer, blob), f"verify {digest}")
        return transfer

    async def _hash(self, transfer: Transfer, blob: OpenBlob) -> None:
        verifier = Verifier(transfer.digest)
        try:
            while piece := await self._owner.uninterrupted(
                blob.read(verifier.n_bytes, PIECE_BYTES, verifier), "read and hash"
            ):
                transfer.received += len(piece)
                transfer.changed.ring()
            transfer.goes(State.VERIFYING)
            if verifier.n_bytes != blob.size or not verifier.agrees():
                why = f"the stored file of {transfer.digest} does not hash to its name"
                await self.condemn(transfer.digest, why, blob)
                raise Corrupt(f"{why}; it was moved to quarantine and will be fetched again")
            self.remember(transfer.digest, blob.identity)
            transfer.goes(State.COMMITTED)
        except Unavailable as failure:
            # A file that cannot be read would answer short for ever; without it the next request is upstream's.
            if not self._is_irreplaceable(transfer.digest):
                why = f"the stored file of {transfer.digest} cannot be read: {failure}"
                await self.condemn(transfer.digest, why, blob)
            transfer.fail(failure)
        except BreakwaterError as failure:
            transfer.fail(failure)
        finally:
            if self._running.get(transfer.digest, (None, None))[1] is transfer:
                del self._running[transfer.digest]
            if not transfer.has_ended:
                transfer.fail(Corrupt(f"the check of {transfer.digest} was given up"))
            transfer.left_by_filler()
