"""What the engine needs from the outside world, and the only place where that is said.

A port is small and lives with its suite (`tests/contract/`), which every implementation passes. Nothing here touches
the world; the values are plain and frozen.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest, Verifier
from proxy.oci.names import Repository, Tag, TagOrDigest

# -- time -----------------------------------------------------------------------------------------------------------


class Clock(Protocol):
    """Time as an argument. `monotonic` decides; `wall` is stored and shown."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start, never backwards."""
        ...

    def wall(self) -> float:
        """Seconds since 1970 by the machine's clock, which may jump."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        ...


# -- bytes at rest -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What must be unchanged for an earlier verification to count (product.md, promise 2)."""

    inode: int
    size: int
    ctime_ns: int


class OpenBlob(Protocol):
    """A stored blob opened for reading. The descriptor stays valid until `close`, whatever happens to the name."""

    fd: int
    size: int
    identity: FileIdentity

    async def read(self, offset: int, limit: int, verifier: Verifier | None = None) -> bytes:
        """At most `limit` bytes at `offset`, fed to `verifier` in the same hop to a worker thread; b"" at the end.

        Raises Unavailable when the disk fails.
        """
        ...

    def close(self) -> None:
        """Give the descriptor back. May be called more than once; not while a `read` runs."""
        ...


class Ingest(Protocol):
    """An unfinished blob (INV-2). One writer; `fd` may be read by many, up to `n_bytes`."""

    fd: int
    n_bytes: int

    async def write(self, *pieces: bytes | bytearray | memoryview) -> None:
        """Feed the verifier and append, in one hop to a worker thread for all of `pieces`.

        The verifier has taken them even when the write raises, so a transfer can go on without a file.
        Raises OutOfSpace (ENOSPC, EDQUOT) or Unavailable (EIO, EROFS and the rest); `n_bytes` then is unchanged.
        """
        ...

    async def commit(self) -> None:
        """Give the bytes their name (INV-1): fsync, rename, fsync the directory, in this order.

        Raises Corrupt when the verifier does not agree (nothing is kept), OutOfSpace or Unavailable when the disk fails
        (nothing is kept; a failed fsync is never retried). After it returns the name is durable. `fd` stays readable.
        """
        ...

    async def abort(self, *, keep: bool = False) -> None:
        """Forget it: the file goes, or with `keep` stays under ingest/ for resuming. Never raises.

        `fd` stays readable.
        """
        ...

    def close(self) -> None:
        """Close `fd`, after the last reader and when no `write` or `commit` runs."""
        ...


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """One name under blobs/: its size in bytes and when it was last written (wall clock, only for a first order)."""

    digest: Digest
    size: int
    written_at: float


@dataclass(frozen=True, slots=True)
class Space:
    """The file system beneath the store, in bytes and inodes."""

    total_bytes: int
    free_bytes: int
    total_inodes: int
    free_inodes: int
    #: What it gives away at least, in bytes, as it says it: each file takes a whole number of these.
    block_bytes: int = 4096


class BlobStore(Protocol):
    """Content-addressed bytes. Decides nothing: what to delete and when is the engine's."""

    async def open(self, digest: Digest) -> OpenBlob | None:
        """The blob, or None when there is none. Anything but a plain file of ours in its place is quarantined: None.

        Raises Unavailable when the disk fails, Overloaded when descriptors run out.
        """
        ...

    async def ingest(self, digest: Digest, verifier: Verifier) -> Ingest:
        """Begin an unfinished blob. Raises OutOfSpace or Unavailable."""
        ...

    async def delete(self, digests: Sequence[Digest]) -> None:
        """Remove these names; absent ones are fine. Raises Unavailable."""
        ...

    async def quarantine(self, digest: Digest, why: str, inode: int | None = None) -> bool:
        """Move the blob out of reach, kept for inspection; with `inode` only where that file still has the name.

        Whether nothing has the name now: absent is fine. Never raises.
        """
        ...

    def scan(self) -> AsyncIterator[Sequence[StoredBlob]]:
        """Every blob, in batches, without holding the loop. Unknown files are quarantined and reported, never fatal."""
        ...

    async def space(self) -> Space:
        """What the file system says now. Raises Unavailable."""
        ...


class Upkeep(Protocol):
    """What the store takes of the disk besides blobs and blobs on their way, in bytes on disk, and may take."""

    #: Asked for room for so many bytes more, which it then grants. Raises OutOfSpace.
    more: Callable[[int], Awaitable[None]]

    @property
    def needed(self) -> int:
        """What must be granted: what is there as far as it was counted, what is being written, and a margin."""
        ...

    def grant(self, n_bytes: int) -> None:
        """So much may be taken in all. What would be more asks for `more` before it is written."""
        ...

    async def measure(self) -> None:
        """Count all that is there. What grows meanwhile may be counted twice. Raises Unavailable."""
        ...


@dataclass(frozen=True, slots=True)
class KeptIngest:
    """An unfinished blob that an earlier process left behind. `n_bytes` is its length, of which nothing is proven."""

    digest: Digest
    n_bytes: int
    name: str


class Leftovers(Protocol):
    """Unfinished blobs that no running transfer owns: to go on with, or to sweep."""

    async def kept_ingests(self) -> Sequence[KeptIngest]:
        """All of them, longest first. Raises Unavailable."""
        ...

    async def resume_ingest(self, digest: Digest, verifier: Verifier) -> Ingest | None:
        """Go on with the longest of this digest, its bytes fed to `verifier`, or None. Raises Unavailable, Overloaded.

        The bytes prove nothing until the whole agrees: when it does not, that is no fault of upstream's.
        """
        ...

    async def sweep_ingest(self, keep: Collection[str] = ()) -> int:
        """Remove all but the names in `keep` and what runs; the bytes that this freed. Raises Unavailable."""
        ...


# -- records at rest -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Holding:
    """What one project holds of one repository: the key of tags and links. `host` is the upstream's source host."""

    project: str
    host: str
    repository: str

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}"


@dataclass(frozen=True, slots=True)
class TagRecord:
    """A tag as upstream last said (INV-6). `validated_at` is wall-clock seconds since 1970."""

    tag: str
    descriptor: Descriptor
    validated_at: float
    #: Which of the upstream's addresses said so, for people who read the record.
    source: str = ""


@dataclass(frozen=True, slots=True)
class LinkRecord:
    """The right of a holding to see `descriptor` and what it names (house.md conviction 9).

    For a manifest, `names` are its children, config and layers, with media types and sizes as the manifest declares
    them. For a blob that upstream confirmed outside any manifest, `names` is empty and `is_manifest` is false.
    """

    descriptor: Descriptor
    is_manifest: bool = True
    names: tuple[Descriptor, ...] = ()
    #: The digest this manifest refers to (image-spec § subject), and its own artifact type: for the referrers API.
    subject: Digest | None = None
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    #: Tags that resolved to this manifest here: a rule that allows such a tag allows the digest (product.md).
    tags: tuple[str, ...] = ()


class Records(Protocol):
    """Tags and links: small checksummed files, committed like blobs. A damaged record costs that record alone."""

    async def tag(self, holding: Holding, tag: Tag) -> TagRecord | None:
        """The record, or None when absent or damaged (then moved to quarantine). Raises Unavailable."""
        ...

    async def put_tag(self, holding: Holding, record: TagRecord) -> None:
        """Durable when it returns. Raises OutOfSpace or Unavailable: then the older record stands, or the new one where
        only the last step failed, and a power cut may still bring the older back."""
        ...

    async def links(self, holding: Holding) -> Sequence[LinkRecord]:
        """Every link of the holding, damaged ones left out. Raises Unavailable."""
        ...

    async def put_link(self, holding: Holding, record: LinkRecord) -> None:
        """Durable when it returns. Raises OutOfSpace or Unavailable."""
        ...

    async def remove(self, holding: Holding, *, tags: Iterable[Tag] = (), links: Iterable[Digest] = ()) -> None:
        """Remove these; absent ones are fine. Raises Unavailable."""
        ...

    def scan(self) -> AsyncIterator[tuple[Holding, Sequence[TagRecord], Sequence[LinkRecord]]]:
        """Every holding with its records, without holding the loop."""
        ...


class ChargeJournal(Protocol):
    """What each project pays for, as an append-only list of changes. A damaged line costs that line alone."""

    def changes(self) -> AsyncIterator[tuple[str, Sequence[tuple[Digest, int | None]]]]:
        """Every change of every project, in the order of their writing, some at a time: the last of each digest counts.

        Raises Unavailable.
        """
        ...

    async def append(self, project: str, changes: Sequence[tuple[Digest, int | None]]) -> None:
        """Durable when it returns; None means that it no longer pays. Raises OutOfSpace or Unavailable."""
        ...

    async def rewrite(self, project: str, changes: Iterable[Sequence[tuple[Digest, int | None]]]) -> None:
        """Replace all that was said of the project; the old list stands until the new one is durable. Raises alike.

        `changes` is asked for one batch after the other, on this loop, with others running in between.
        """
        ...


class Notes(Protocol):
    """A few named documents of the store, each written whole: pins, what a seal was made of."""

    async def get(self, name: str) -> bytes | None:
        """The note, or None when there is none or it is damaged (then moved to quarantine). Raises Unavailable."""
        ...

    async def put(self, name: str, body: bytes) -> None:
        """Durable when it returns; the older note stands until then. Raises OutOfSpace or Unavailable.

        `name` is lower-case letters; `body` has at most 64 MiB.
        """
        ...


@dataclass(frozen=True, slots=True)
class Use:
    """When a blob was last used, by a counter and not by a clock, and its size in bytes."""

    digest: Digest
    size: int
    counter: int


class Facts(Protocol):
    """Small mutable facts that can be rebuilt from the files. Losing all of them loses no content."""

    def uses(self) -> AsyncIterator[Sequence[Use]]:
        """The remembered order of use, least recent first, in batches. Damaged or unreadable: nothing."""
        ...

    async def remember(self, uses: Sequence[Use], forgotten: Sequence[Digest]) -> None:
        """Write these and drop those, in one transaction. Never raises: a fact lost is a fact rebuilt."""
        ...

    async def get(self, key: str) -> bytes | None:
        """A small named fact, or None."""
        ...

    async def put(self, key: str, value: bytes) -> None:
        """Remember a small named fact (at most 64 KiB), or forget it when `value` is empty. Never raises."""
        ...

    async def aclose(self) -> None:
        """Write what is pending and let go."""
        ...


# -- other registries ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UpstreamManifest:
    """A manifest as upstream sent it: `body` byte for byte (INV-9), `media_type` without parameters ("" if none).

    `digest` is what upstream's Docker-Content-Digest claims, if anything; it proves nothing.
    """

    body: bytes
    media_type: str
    digest: Digest | None
    source: str


@dataclass(frozen=True, slots=True)
class ManifestHead:
    """What a HEAD of a manifest said; each part may be missing (peers.md §5.5)."""

    digest: Digest | None
    media_type: str
    size: int | None
    source: str
    #: An address that is not the first said so while an earlier one failed: it confirms a tag and moves none.
    is_secondhand: bool = False


class BlobBody(Protocol):
    """A blob's body on its way. `size` is the whole blob's in bytes, or None when upstream does not say.

    `offset` is where this body starts: what was asked for, or 0 where upstream ignored the range.
    """

    size: int | None
    offset: int
    source: str

    async def read(self) -> bytes:
        """The next bytes, at most 1 MiB, as many as there are; b"" at the end of what upstream sent.

        Raises Unreachable when the connection breaks or the body ends short of its length, Timeout when it is slower
        than the minimum throughput.
        """
        ...

    async def close(self) -> None:
        """Let go of the connection; it is reused only after a complete body. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class TagPage:
    """One page of tags/list. `last` is what to ask for next, or None at the end."""

    tags: tuple[str, ...]
    last: str | None


class Upstream(Protocol):
    """One configured upstream with one set of credentials. Makes one attempt and reports; never retries by itself.

    Every method raises Unreachable, Timeout, Throttled, Unauthorised or Misbehaved, and the NotFound named below.
    """

    async def manifest(self, repository: Repository, target: TagOrDigest) -> UpstreamManifest:
        """GET a manifest, at most 4 MiB of it. Raises UnknownManifest (or UnknownName)."""
        ...

    async def manifest_head(self, repository: Repository, target: TagOrDigest) -> ManifestHead:
        """HEAD a manifest. Raises UnknownManifest."""
        ...

    async def blob(self, repository: Repository, digest: Digest, *, offset: int = 0) -> BlobBody:
        """GET a blob from `offset` bytes on, with Range and If-Range where offset > 0. Raises UnknownBlob."""
        ...

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """HEAD a blob: its size, or None where upstream confirms it without saying. Raises UnknownBlob."""
        ...

    async def tags(self, repository: Repository, *, n: int | None, last: str | None) -> TagPage:
        """One page of tags, in upstream's order. Raises UnknownName."""
        ...

    async def referrers(self, repository: Repository, digest: Digest, *, artifact_type: str) -> bytes | None:
        """The referrers index as upstream sent it, all pages joined; None where upstream has no referrers API (404)."""
        ...


# -- archives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file of an archive. `pieces` are its `size` bytes, in order, once, and before the next member is asked
    for. Reading them raises BadArchive when the archive ends before they do.
    """

    name: str
    size: int
    pieces: AsyncIterator[bytes]


# -- how to serve, as a value --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A verified, complete file. Closing `blob` is the duty of whoever serves it."""

    blob: OpenBlob


class Tail(Protocol):
    """A body that is still becoming: bytes up to the frontier may be sent, the rest is waited for (INV-3).

    Bytes below `in_file` are in the file `fd` (-1 when there is no file, then `in_file` is 0). Bytes from there up to
    the frontier wait in a bounded ring and are had with `piece`: that is how a transfer reaches its readers when the
    disk is full or failing. `in_file` may grow with every call of `beyond`, and never shrinks.
    """

    @property
    def size(self) -> int: ...

    @property
    def fd(self) -> int: ...

    @property
    def in_file(self) -> int: ...

    async def beyond(self, offset: int) -> int:
        """Wait until bytes after `offset` may be sent; returns the frontier, greater than `offset`.

        Raises the transfer's failure when it fails first: the reader then ends short, and never cleanly.
        """
        ...

    def piece(self, offset: int, limit: int) -> bytes:
        """At most `limit` bytes from `offset`, where in_file <= offset < frontier. Raises Overloaded if they are gone.

        Never empty.
        """
        ...

    def leave(self) -> None:
        """This reader is done, for whatever reason. May be called more than once."""
        ...


BlobSource = LocalFile | Tail
