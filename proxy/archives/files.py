"""Bundles as files: in parts for small media, packed or not, and those that other tools have written.

Everything here blocks and belongs in a thread or in a process of its own. What comes out is always the plain tar of an
image layout whose first member says what is in it, in pieces of bounded size, whatever is claimed inside.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from proxy.archives.folders import pieces_of
from proxy.archives.tar import block_of, members_of
from proxy.errors import BadArchive, BadRequest
from proxy.oci import layout
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.layout import Contents, blob_name, maybe_blob
from proxy.oci.manifest import MAX_MANIFEST_BYTES
from proxy.oci.mediatypes import OCI_MANIFEST
from proxy.ports import Member

T = TypeVar("T")

PIECE_BYTES = 1 << 20
#: The largest window that a zstd frame may ask for, in bytes: what levels up to 19 use, with room.
MAX_WINDOW = 32 << 20

#: Manifests that are kept from the first look at an archive, in bytes: what an import has waiting, too.
MAX_KEPT_BYTES = 32 << 20

_DOCUMENTS = (layout.DOCKER_FILE, layout.LAYOUT_FILE, layout.INDEX_FILE)
_PART = re.compile(r"(.+)\.(\d{3})")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_OTHERS = {b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip"}

_LINK_NAME = re.compile(r"[0-9a-f]{64}/layer\.tar")
_LINK_TARGET = re.compile(r"(?:\.\./)?([0-9a-f]{64}(?:/layer)?\.tar)")


# -- reading -----------------------------------------------------------------------------------------------------------


def grouped(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Bundles among these files: FILE.001, FILE.002 … are one, named by any of them. Raises BadRequest for a gap."""
    bundles: dict[Path, tuple[Path, ...]] = {}
    for path in paths:
        match = _PART.fullmatch(path.name)
        stem = path.with_name(match[1]) if match and not path.with_name(match[1]).exists() else path
        first = stem.with_name(f"{stem.name}.001")
        if stem == path and not (first.exists() and not path.exists()):
            bundles[path] = (path,)
            continue
        parts: list[Path] = []
        while (part := stem.with_name(f"{stem.name}.{len(parts) + 1:03}")).exists():
            parts.append(part)
        beyond = [one for one in stem.parent.glob(f"{stem.name}.*") if _PART.fullmatch(one.name)]
        if len(beyond) != len(parts):
            raise BadRequest(f"parts of {stem} are missing: there is no {part.name}")
        bundles[stem] = tuple(parts)
    return list(bundles.values())


class _Joined(io.RawIOBase):
    """Files one after the other, as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self._paths = list(paths)
        self._open: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._open is None:
                if not self._paths:
                    return 0
                self._open = self._paths.pop(0).open("rb", buffering=0)
            n_read = self._open.readinto(buffer)  # type: ignore[attr-defined]  # a raw file, which has it
            if n_read:
                return int(n_read)
            self._open.close()
            self._open = None

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
        super().close()


def plain_pieces(paths: Sequence[Path]) -> Iterator[bytes]:
    """The archive in these files, unpacked, or the tar of a layout's folder, in pieces of at most 1 MiB.

    Raises BadArchive for damaged packing, BadRequest for a packing that is not read here, OSError when a file cannot be
    read.
    """
    if paths[0].is_dir():
        yield from pieces_of(paths[0])
        return
    with io.BufferedReader(_Joined(paths), PIECE_BYTES) as packed:
        magic = packed.peek(8)[:8]
        for other, name in _OTHERS.items():
            if magic.startswith(other):
                raise BadRequest(f"{paths[0]} is packed with {name}; plain, gzip and zstd are read here")
        with _unpacked(packed, magic) as stream:
            try:
                while piece := stream.read(PIECE_BYTES):
                    yield piece
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise BadArchive(f"{paths[0]} is damaged: {error}") from None
            except Exception as error:
                # zstandard's error, without importing the library for archives that do not need it.
                if type(error).__name__ == "ZstdError":
                    raise BadArchive(f"{paths[0]} is damaged: {error}") from None
                raise


def _unpacked(packed: IO[bytes], magic: bytes) -> IO[bytes]:
    if magic.startswith(_GZIP):
        return gzip.GzipFile(fileobj=packed)  # type: ignore[return-value]  # it reads like one
    if magic.startswith(_ZSTD):
        unpacker = _zstandard().ZstdDecompressor(max_window_size=MAX_WINDOW)
        stream: IO[bytes] = unpacker.stream_reader(
            packed, read_size=PIECE_BYTES, read_across_frames=True, closefd=False
        )
        return stream
    return packed


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise BadRequest("zstd needs one library more: pip install 'breakwater[zstd]'") from None
    return zstandard


@dataclass(slots=True)
class Bundle:
    """What one look at an archive says: our note of its contents, or what makes an archive of others' readable."""

    paths: tuple[Path, ...]
    #: breakwater.json as it is in the archive; b"" for archives of others.
    contents: bytes = b""
    #: For archives of others: what comes before the rest of it, and what each member of the rest is carried as.
    _head: list[tuple[str, bytes]] = field(default_factory=list)
    _rest: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def look(cls, paths: tuple[Path, ...]) -> Bundle:
        """Read as far as it takes: an archive of others' to its end, since its documents may come last.

        Raises BadArchive, BadRequest (for what cannot be read twice, too) or OSError.
        """
        for path in paths:
            if path.exists() and not path.is_file() and not path.is_dir():
                raise BadRequest(f"{path} is no file: archives are read twice, before they are believed")
        seen = _Seen()
        for member in _stepped(members_of(_wrapped(plain_pieces(paths)), on_link=seen.link)):
            if member.name == layout.CONTENTS_FILE and not seen.sizes:
                return cls(paths, _run(_all_of(member, layout.MAX_CONTENTS_BYTES)))
            _run(seen.take(member))
        if layout.INDEX_FILE in seen.sizes or layout.DOCKER_FILE not in seen.bodies:
            return cls._of_layout(paths, seen)
        return cls._of_docker(paths, seen)

    @classmethod
    def _of_layout(cls, paths: tuple[Path, ...], seen: _Seen) -> Bundle:
        """A layout: its documents and its manifests first, so that an import is judged before it writes."""
        members = {digest: size for name, size in seen.sizes.items() if (digest := maybe_blob(name)) is not None}
        first = {name: body for name, body in seen.bodies.items() if name != layout.DOCKER_FILE}
        rest = {name: name for name in seen.sizes if name not in first}
        return cls(paths, _head=[(layout.CONTENTS_FILE, Contents(members).to_json()), *first.items()], _rest=rest)

    @classmethod
    def _of_docker(cls, paths: tuple[Path, ...], seen: _Seen) -> Bundle:
        """docker-save: the same bytes under the names of a layout, with a manifest that says what they are."""
        renamed: dict[str, Digest] = {}
        manifests: dict[Digest, bytes] = {}
        entries = []
        for image in layout.read_docker(seen.bodies[layout.DOCKER_FILE]):
            body = seen.manifest(image, renamed)
            digest = Digest.of(body)
            manifests[digest] = body
            entry = Descriptor(OCI_MANIFEST, digest, len(body))
            names = image.references or ("",)
            entries += [replace(entry, annotations={layout.IMAGE_NAME: name} if name else {}) for name in names]
        members = {digest: len(body) for digest, body in manifests.items()}
        members |= {digest: seen.sizes[name] for name, digest in renamed.items()}
        head = [
            (layout.CONTENTS_FILE, Contents(members).to_json()),
            (layout.LAYOUT_FILE, layout.LAYOUT),
            (layout.INDEX_FILE, layout.index_json(entries)),
            *((blob_name(digest), body) for digest, body in manifests.items()),
        ]
        written: dict[Digest, str] = {}
        for name, digest in renamed.items():
            written.setdefault(digest, name)
        return cls(paths, _head=head, _rest={name: blob_name(digest) for digest, name in written.items()})

    def pieces(self) -> Iterator[bytes]:
        """The tar of the layout. Raises like `plain_pieces`."""
        for name, body in self._head:
            yield block_of(name, len(body)) + body + bytes(-len(body) % 512)
        if self.contents:
            yield from plain_pieces(self.paths)
            return
        for member in _stepped(members_of(_wrapped(plain_pieces(self.paths)), on_link=lambda *_: None)):
            if member.name not in self._rest:
                continue
            yield block_of(self._rest[member.name], member.size)
            yield from _stepped(member.pieces)
            yield bytes(-member.size % 512)
        yield bytes(1024)


class _Seen:
    """The members of an archive of others': sizes and digests, the first bytes, documents and manifests, links."""

    def __init__(self) -> None:
        self._n_kept = 0
        self.sizes: dict[str, int] = {}
        self.bodies: dict[str, bytes] = {}
        self._digests: dict[str, Digest] = {}
        self._magic: dict[str, bytes] = {}
        self._links: dict[str, str] = {}

    def link(self, name: str, target: str) -> None:
        """docker-save lists a layer that two images share as a link. It is another name and nothing more."""
        match = _LINK_TARGET.fullmatch(target)
        if match is None or not _LINK_NAME.fullmatch(name):
            raise BadArchive(f"{name[:150]!r} is a symbolic link to {target[:150]!r}; only plain files are taken")
        self._links[name] = match[1]

    async def take(self, member: Member) -> None:
        self.sizes[member.name] = member.size
        if maybe_blob(member.name) is not None:
            # Its name is its digest, and the import holds it to that. What may be a manifest is kept for the head.
            if member.size <= MAX_MANIFEST_BYTES and self._n_kept + member.size <= MAX_KEPT_BYTES:
                body = await _all_of(member, MAX_MANIFEST_BYTES)
                if b'"schemaVersion"' in body:
                    self._n_kept += len(body)
                    self.bodies[member.name] = body
            return
        if member.name in _DOCUMENTS:
            self.bodies[member.name] = await _all_of(member, layout.MAX_INDEX_BYTES)
            return
        hashed = hashlib.sha256()
        async for piece in member.pieces:
            if member.name not in self._magic:
                self._magic[member.name] = piece[:4]
            hashed.update(piece)
        self._digests[member.name] = Digest("sha256", hashed.hexdigest())

    def manifest(self, image: layout.DockerImage, renamed: dict[str, Digest]) -> bytes:
        """An OCI manifest of a docker-save image. Raises BadArchive when a member of it is not there."""
        import json

        def named(name: str, media_type: str) -> dict[str, Any]:
            name = self._links.get(name, name)
            digest = self._digests.get(name) or maybe_blob(name)
            if digest is None or name not in self.sizes:
                raise BadArchive(f"{layout.DOCKER_FILE} names {name[:150]!r}, which is not in the archive")
            renamed[name] = digest
            return Descriptor(media_type, digest, self.sizes[name]).to_json()

        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": named(image.config, "application/vnd.oci.image.config.v1+json"),
            "layers": [named(name, self._layer_type(name)) for name in image.layers],
        }
        return json.dumps(document, separators=(",", ":")).encode()

    def _layer_type(self, name: str) -> str:
        magic = self._magic.get(self._links.get(name, name), b"")
        packing = "+gzip" if magic.startswith(_GZIP) else "+zstd" if magic.startswith(_ZSTD) else ""
        return f"application/vnd.oci.image.layer.v1.tar{packing}"


async def _all_of(member: Member, most: int) -> bytes:
    if member.size > most:
        raise BadArchive(f"{member.name} of {member.size} bytes is longer than any: {most} at most")
    return b"".join([piece async for piece in member.pieces])


async def _wrapped(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def _run(never_waits: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that only awaits others of its kind: blocking reads are done when they return."""
    try:
        never_waits.send(None)
    except StopIteration as result:
        return result.value  # type: ignore[no-any-return]
    raise RuntimeError("a coroutine that never waits did")


def _stepped(never_waits: AsyncIterator[T]) -> Iterator[T]:
    """The same for a generator."""
    while True:
        try:
            yield _run(_next(never_waits))
        except StopAsyncIteration:
            return


async def _next(iterator: AsyncIterator[T]) -> T:
    return await anext(iterator)


# -- writing -----------------------------------------------------------------------------------------------------------


class Writing:
    """A bundle on its way to files, which get their names when all of it is there and synced.

    Raises OSError as files do, and BadRequest where zstd is asked for and missing.
    """

    def __init__(self, path: Path, *, split: int | None = None, is_packed: bool = False) -> None:
        """`split`: at most so many bytes in one file; FILE.001 and so on then."""
        self._path = path
        self._split = split
        self._paths: list[Path] = []
        self._file: IO[bytes] | None = None
        self._n_in_part = 0
        self.n_bytes = 0
        #: breakwater.json, once it has passed: what a signature is of.
        self.contents = b""
        self._head: bytearray | None = bytearray()
        self._packer = _zstandard().ZstdCompressor(level=3).compressobj() if is_packed else None

    def write(self, piece: bytes) -> None:
        """The next bytes of the tar."""
        self._look(piece)
        self._out(self._packer.compress(piece) if self._packer is not None else piece)

    def finish(self) -> list[Path]:
        """Everything is written: sync it, and give it its names."""
        if self._packer is not None:
            self._out(self._packer.flush())
        self._close_part()
        names = [path.with_name(path.name.removesuffix(".unfinished")) for path in self._paths]
        for path, name in zip(self._paths, names, strict=True):
            path.rename(name)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return names

    def give_up(self) -> None:
        """Nothing stays."""
        if self._file is not None:
            self._file.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _out(self, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest:
            if self._file is None:
                number = f".{len(self._paths) + 1:03}" if self._split else ""
                self._paths.append(self._path.with_name(f"{self._path.name}{number}.unfinished"))
                self._file, self._n_in_part = self._paths[-1].open("wb"), 0
            room = len(rest) if self._split is None else min(len(rest), self._split - self._n_in_part)
            self._file.write(rest[:room])
            self._n_in_part += room
            self.n_bytes += room
            rest = rest[room:]
            if self._n_in_part == self._split:
                self._close_part()

    def _close_part(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _look(self, piece: bytes) -> None:
        """Keep the first member as it passes."""
        if self._head is None:
            return
        self._head += piece
        if len(self._head) >= 512:
            size = int(bytes(self._head[124:135]).rstrip(b"\0 ") or b"0", 8)
            if len(self._head) >= 512 + size:
                self.contents = bytes(self._head[512 : 512 + size])
                self._head = None
