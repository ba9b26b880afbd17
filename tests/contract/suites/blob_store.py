"""What every ports.BlobStore promises. A class of tests; `tests/contract/test_blob_store.py` says over which."""

from __future__ import annotations

import hashlib
import os

import pytest

from proxy.errors import Corrupt
from proxy.oci.digest import Digest, Verifier
from proxy.ports import BlobStore, OpenBlob, StoredBlob

BODY = b"every byte counts" * 1000
DIGEST = Digest.of(BODY)


def read(blob: OpenBlob) -> bytes:
    """All of an open blob, which is closed."""
    body = os.pread(blob.fd, blob.size + 1, 0)
    blob.close()
    return body


async def kept(blobs: BlobStore, body: bytes, algorithm: str = "sha256") -> Digest:
    """Put `body` in."""
    digest = Digest.of(body, algorithm)
    ingest = await blobs.ingest(digest, Verifier(digest))
    await ingest.write(body)
    await ingest.commit()
    ingest.close()
    return digest


async def scanned(blobs: BlobStore) -> list[StoredBlob]:
    """Everything in it."""
    return [blob async for batch in blobs.scan() for blob in batch]


class BlobStoreSuite:
    """Needs a fixture `blobs`."""

    async def test_what_is_not_there_is_none(self, blobs: BlobStore) -> None:
        """Absent is None, not an error."""
        assert await blobs.open(DIGEST) is None

    @pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
    async def test_committed_bytes_are_had_back(self, blobs: BlobStore, algorithm: str) -> None:
        """INV-1: a name is a promise. Both algorithms of image-spec § Digests."""
        digest = await kept(blobs, BODY, algorithm)
        blob = await blobs.open(digest)
        assert blob is not None
        assert blob.size == len(BODY) == blob.identity.size
        assert read(blob) == BODY

    async def test_a_blob_is_read_in_steps_and_hashed_on_the_way(self, blobs: BlobStore) -> None:
        """The plain path: at most what was asked for, nothing at the end, and a verifier that has seen it all."""
        await kept(blobs, BODY)
        blob = await blobs.open(DIGEST)
        assert blob is not None
        verifier = Verifier(DIGEST)
        pieces: list[bytes] = []
        while piece := await blob.read(sum(map(len, pieces)), 4999, verifier):
            assert len(piece) <= 4999
            pieces.append(piece)
        assert b"".join(pieces) == BODY
        assert verifier.agrees()
        assert await blob.read(len(BODY) - 3, 100) == BODY[-3:]
        blob.close()

    async def test_an_empty_blob_is_a_blob(self, blobs: BlobStore) -> None:
        """Zero bytes have a digest like any others."""
        digest = await kept(blobs, b"")
        blob = await blobs.open(digest)
        assert blob is not None
        assert read(blob) == b""

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    async def test_pieces_of_any_kind_are_joined_in_order(self, blobs: BlobStore, kind: type) -> None:
        """Whatever a piece is made of, and however long it is, the file is their concatenation."""
        ingest = await blobs.ingest(DIGEST, Verifier(DIGEST))
        for start in range(0, len(BODY), 4999):
            await ingest.write(kind(BODY[start : start + 4999]))
        assert ingest.n_bytes == len(BODY)
        await ingest.commit()
        ingest.close()
        blob = await blobs.open(DIGEST)
        assert blob is not None
        assert read(blob) == BODY

    async def test_an_unfinished_blob_has_no_name(self, blobs: BlobStore) -> None:
        """INV-2: until the commit nobody can open it, and a scan does not see it."""
        ingest = await blobs.ingest(DIGEST, Verifier(DIGEST))
        await ingest.write(BODY)
        assert await blobs.open(DIGEST) is None
        assert await scanned(blobs) == []
        await ingest.abort()
        ingest.close()

    async def test_an_unfinished_blob_can_be_read_as_far_as_it_has_come(self, blobs: BlobStore) -> None:
        """The file is the buffer (performance.md § What follows, 1)."""
        ingest = await blobs.ingest(DIGEST, Verifier(DIGEST))
        await ingest.write(BODY[:5000])
        assert os.pread(ingest.fd, 6000, 0) == BODY[:5000]
        await ingest.write(BODY[5000:])
        assert os.pread(ingest.fd, len(BODY), 0) == BODY
        await ingest.abort()
        ingest.close()

    @pytest.mark.parametrize("end", ["commit", "abort", "keep"])
    async def test_readers_outlive_either_end(self, blobs: BlobStore, end: str) -> None:
        """`fd` stays readable through commit and abort, until `close`."""
        ingest = await blobs.ingest(DIGEST, Verifier(DIGEST))
        await ingest.write(BODY)
        if end == "commit":
            await ingest.commit()
        else:
            await ingest.abort(keep=end == "keep")
        assert os.pread(ingest.fd, len(BODY), 0) == BODY
        ingest.close()
        ingest.close()

    @pytest.mark.parametrize(
        "body",
        [BODY[:-1], BODY + b"!", b"", b"?" + BODY[1:]],
        ids=["one byte short", "one byte long", "nothing", "one byte wrong"],
    )
    async def test_bytes_that_do_not_hash_right_get_no_name(self, blobs: BlobStore, body: bytes) -> None:
        """INV-1: nothing unverified gets a name. Nothing of it is kept."""
        ingest = await blobs.ingest(DIGEST, Verifier(DIGEST))
        await ingest.write(body)
        with pytest.raises(Corrupt):
            await ingest.commit()
        await ingest.abort()
        ingest.close()
        assert await blobs.open(DIGEST) is None
        assert await scanned(blobs) == []

    async def test_bytes_hashed_past_the_file_get_no_name(self, blobs: BlobStore) -> None:
        """INV-1: a digest that agrees is not enough when the file lacks what was hashed."""
        verifier = Verifier(DIGEST)
        verifier.feed(BODY[:100])
        ingest = await blobs.ingest(DIGEST, verifier)
        await ingest.write(BODY[100:])
        with pytest.raises(Corrupt):
            await ingest.commit()
        ingest.close()
        assert await blobs.open(DIGEST) is None

    async def test_an_aborted_blob_is_gone(self, blobs: BlobStore) -> None:
        """Abort may come more than once, and after a commit it does nothing."""
        ingest = await blobs.ingest(DIGEST, Verifier(DIGEST))
        await ingest.write(BODY)
        await ingest.abort()
        await ingest.abort()
        ingest.close()
        assert await blobs.open(DIGEST) is None
        ingest = await blobs.ingest(DIGEST, Verifier(DIGEST))
        await ingest.write(BODY)
        await ingest.commit()
        await ingest.abort()
        ingest.close()
        blob = await blobs.open(DIGEST)
        assert blob is not None
        assert read(blob) == BODY

    async def test_two_ingests_of_one_digest_do_not_meet(self, blobs: BlobStore) -> None:
        """Each has its own file; the later commit replaces the earlier with the same bytes."""
        one = await blobs.ingest(DIGEST, Verifier(DIGEST))
        two = await blobs.ingest(DIGEST, Verifier(DIGEST))
        await one.write(BODY[:500])
        await two.write(BODY)
        await one.write(BODY[500:])
        await one.commit()
        await two.commit()
        one.close()
        two.close()
        assert [blob.digest for blob in await scanned(blobs)] == [DIGEST]
        blob = await blobs.open(DIGEST)
        assert blob is not None
        assert read(blob) == BODY

    async def test_identity_stays_while_the_file_does(self, blobs: BlobStore) -> None:
        """product.md, promise 2: a verification counts until inode, size or ctime change."""
        await kept(blobs, BODY)
        one, two = await blobs.open(DIGEST), await blobs.open(DIGEST)
        assert one is not None and two is not None
        assert one.identity == two.identity
        one.close()
        two.close()

    async def test_deleting_takes_the_name_and_leaves_open_readers(self, blobs: BlobStore) -> None:
        """What is being read stays readable; absent names are fine."""
        await kept(blobs, BODY)
        blob = await blobs.open(DIGEST)
        assert blob is not None
        await blobs.delete([DIGEST, Digest.of(b"never there"), DIGEST])
        assert await blobs.open(DIGEST) is None
        assert read(blob) == BODY
        blob.close()

    async def test_a_quarantined_blob_is_gone(self, blobs: BlobStore) -> None:
        """Out of reach, and its digest can be had anew. Absent is fine."""
        assert await blobs.quarantine(DIGEST, "was never there")
        assert await blobs.open(DIGEST) is None

    async def test_a_file_that_has_taken_anothers_place_is_not_quarantined_for_it(self, blobs: BlobStore) -> None:
        """Reading a large one takes a while, and it may have been fetched again by its end."""
        await kept(blobs, BODY)
        older = await blobs.open(DIGEST)
        assert older is not None
        await kept(blobs, BODY)
        assert not await blobs.quarantine(DIGEST, "rotten", older.identity.inode)
        newer = await blobs.open(DIGEST)
        assert newer is not None
        assert read(newer) == BODY
        older.close()
        newer.close()

    async def test_a_scan_sees_every_blob_once(self, blobs: BlobStore) -> None:
        """With its size, whatever its algorithm."""
        bodies = [bytes([n]) * n for n in range(60)]
        for body in bodies:
            await kept(blobs, body)
        await kept(blobs, BODY, "sha512")
        found = {blob.digest: blob.size for blob in await scanned(blobs)}
        expected = {Digest.of(body): len(body) for body in bodies}
        expected[Digest("sha512", hashlib.sha512(BODY).hexdigest())] = len(BODY)
        assert found == expected

    async def test_space_is_told(self, blobs: BlobStore) -> None:
        """Free is never more than total."""
        space = await blobs.space()
        assert 0 < space.free_bytes <= space.total_bytes
        assert 0 <= space.free_inodes <= space.total_inodes
