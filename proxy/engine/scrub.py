"""Re-hashes what is stored: all of it on request, and slowly, for ever, in the background.

A file that does not hash to its name is taken out of reach at once. With a repair it is fetched again through the read
path, from any repository that is linked to it; without, by whoever asks for it next.

The background pass goes through the store in the order of its folders and remembers in the store's facts where it was,
so that a machine that restarts every night gets to the end as well. Losing that costs one pass.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from proxy.engine.tasks import TaskOwner
from proxy.engine.verification import Verification
from proxy.errors import BreakwaterError, InvalidDigest, Overloaded, StoreError
from proxy.events import Event, Noticed
from proxy.oci.digest import Digest, Verifier
from proxy.ports import BlobStore, Clock, Facts, Holding, Records, StoredBlob

#: What one hop reads and hashes.
PIECE_BYTES = 1 << 20
#: The fact that says how far the background pass has come.
CURSOR = "scrub"
#: How long the background waits after a pass, and where there is nothing to do, in seconds.
PAUSE_S = 3600.0
#: What opening a file costs beside reading it, as so many bytes of the rate: else a million small ones had no rate at all.
OPENING_BYTES = 256 << 10
#: The cursor is written down after so many bytes.
CURSOR_BYTES = 1 << 30

Verdict = Literal["right", "rotten", "unreadable", "gone"]
#: Fetches a digest again through a holding's repository. Raises what the read path raises.
Refetch = Callable[[Holding, Digest, bool], Awaitable[None]]
Tell = Callable[[Mapping[str, Any]], None]


@dataclass(slots=True)
class Found:
    """What a pass has found."""

    n_blobs: int = 0
    n_bytes: int = 0
    #: Quarantined: digest -> what came of it: "", "repaired", or why it could not be.
    rotten: dict[Digest, str] = field(default_factory=dict)
    #: Could not be read; left where they are.
    unreadable: dict[Digest, str] = field(default_factory=dict)
    #: On disk and not counted, or counted with another size.
    miscounted: list[Digest] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The report of a command."""
        unrepaired = [digest for digest, came in self.rotten.items() if came != "repaired"]
        return {
            "event": "report",
            "blobs": self.n_blobs,
            "bytes": self.n_bytes,
            "rotten": {str(digest): came for digest, came in self.rotten.items()},
            "unreadable": {str(digest): why for digest, why in self.unreadable.items()},
            "miscounted": [str(digest) for digest in self.miscounted],
            "is_well": not (unrepaired or self.unreadable or self.miscounted),
        }


class Scrub:
    """Passes over the store. True for this process."""

    def __init__(
        self,
        blobs: BlobStore,
        records: Records,
        facts: Facts,
        verification: Verification,
        size_of: Callable[[Digest], int | None],
        refetch: Refetch,
        *,
        clock: Clock,
        owner: TaskOwner,
        observe: Callable[[Event], None],
    ) -> None:
        """`size_of` is what the ledger counts for a digest."""
        self._blobs = blobs
        self._records = records
        self._facts = facts
        self._verification = verification
        self._size_of = size_of
        self._refetch = refetch
        self._clock = clock
        self._owner = owner
        self._observe = observe

    # -- on request ---------------------------------------------------------------------------------------------------

    async def verify(self, tell: Tell, *, repair: bool = False) -> dict[str, Any]:
        """Hash everything, as fast as the disk is; with `repair` fetch what is rotten again. Raises Unavailable.

        `tell` gets a step for each thing found and every few thousand blobs.
        """
        found = Found()
        async for blob in self._all():
            verdict, why = await self._check(blob.digest)
            if verdict == "gone":
                # Evicted, or found to be rotten by a reader or the scrub since it was listed, who has told of it: what
                # is out of reach is no finding of ours.
                continue
            found.n_blobs += 1
            found.n_bytes += blob.size
            if verdict == "rotten":
                found.rotten[blob.digest] = ""
            elif verdict == "unreadable":
                found.unreadable[blob.digest] = why
            elif self._size_of(blob.digest) != blob.size:
                found.miscounted.append(blob.digest)
            if verdict != "right" or found.n_blobs % 1000 == 0:
                tell(_step(found, blob.digest, verdict))
        # Looked at again: what came or went while we hashed is no mistake.
        found.miscounted = [digest for digest in found.miscounted if await self._is_miscounted(digest)]
        if repair and found.rotten:
            await self._repair(found)
        return found.as_json()

    async def _is_miscounted(self, digest: Digest) -> bool:
        blob = await self._blobs.open(digest)
        if blob is None:
            return False
        blob.close()
        return self._size_of(digest) != blob.size

    async def _repair(self, found: Found) -> None:
        missing = dict.fromkeys(found.rotten, "no repository is linked to it")
        async for holding, _, links in self._records.scan():
            for link in links:
                for digest in [link.descriptor.digest, *(named.digest for named in link.names)]:
                    if digest not in missing:
                        continue
                    try:
                        await self._refetch(holding, digest, digest == link.descriptor.digest and link.is_manifest)
                    except BreakwaterError as error:
                        missing[digest] = str(error)
                        continue
                    if self._size_of(digest) is None:
                        missing[digest] = "it was fetched again and could not be kept"
                        continue
                    found.rotten[digest] = "repaired"
                    del missing[digest]
        found.rotten |= missing

    # -- in the background --------------------------------------------------------------------------------------------

    def start(self, bytes_per_s: int) -> None:
        """Go through the store at this rate, again and again. 0: not at all."""
        if bytes_per_s:
            self._owner.spawn_background(self._scrub_forever(bytes_per_s), "scrub")

    async def _scrub_forever(self, bytes_per_s: int) -> None:
        while True:
            try:
                await self.scrub(bytes_per_s)
            except StoreError as error:
                self._observe(Noticed("warning", f"the scrub stopped, and begins again later: {error}"))
            await self._clock.sleep(PAUSE_S)

    async def scrub(self, bytes_per_s: int) -> Found:
        """One pass, from where the last one was. Raises Unavailable when the disk fails."""
        found, n_unsaved, reached = Found(), 0, await self._cursor()
        async for blob in self._all():
            if reached is not None and blob.digest <= reached:
                continue
            await self._clock.sleep(OPENING_BYTES / bytes_per_s)
            verdict, _ = await self._check(blob.digest, bytes_per_s)
            found.n_blobs += 1
            found.n_bytes += blob.size
            if verdict == "rotten":
                found.rotten[blob.digest] = ""
            if (n_unsaved := n_unsaved + OPENING_BYTES + blob.size) >= CURSOR_BYTES:
                n_unsaved = 0
                await self._facts.put(CURSOR, str(blob.digest).encode())
        await self._facts.put(CURSOR, b"")
        return found

    async def _cursor(self) -> Digest | None:
        said = await self._facts.get(CURSOR)
        with suppress(InvalidDigest, UnicodeDecodeError):
            return Digest.parse(said.decode()) if said else None
        return None

    # -- one file -----------------------------------------------------------------------------------------------------

    async def _all(self) -> AsyncIterator[StoredBlob]:
        async for batch in self._blobs.scan():
            for blob in batch:
                yield blob

    async def _check(self, digest: Digest, bytes_per_s: int = 0) -> tuple[Verdict, str]:
        try:
            blob = await self._blobs.open(digest)
        except (StoreError, Overloaded) as error:
            return "unreadable", str(error)
        if blob is None:
            return "gone", ""
        verifier = Verifier(digest)
        try:
            while piece := await self._owner.uninterrupted(
                blob.read(verifier.n_bytes, PIECE_BYTES, verifier), "scrub a piece"
            ):
                if bytes_per_s:
                    await self._clock.sleep(len(piece) / bytes_per_s)
            if verifier.agrees():
                self._verification.remember(digest, blob.identity)
                return "right", ""
            why = f"the stored file of {digest} does not hash to its name"
            await self._verification.condemn(digest, why, blob)
            return "rotten", why
        except StoreError as error:
            return "unreadable", str(error)
        finally:
            blob.close()


def _step(found: Found, digest: Digest, verdict: Verdict) -> dict[str, Any]:
    return {"event": "step", "what": verdict, "digest": str(digest), "blobs": found.n_blobs, "bytes": found.n_bytes}
