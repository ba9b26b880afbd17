"""Tar as a stream, in both directions; nothing is ever extracted, and nothing but plain files comes out.

`tarfile` reads one header block here and writes one, which it does well. It never sees the archive: its reading takes
extension headers of any size into memory, follows what they say about sparse files and links, and its filters for
extraction have been got round (CVE-2007-4559, CVE-2025-4517, CVE-2025-8194, CVE-2026-7774). Every member is a plain
file or is refused by name; sizes are what the header says, and never negative.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import AsyncIterator, Callable

from proxy.errors import BadArchive
from proxy.oci.layout import MAX_MEMBERS
from proxy.ports import Member

BLOCK = tarfile.BLOCKSIZE
#: What one piece of a member has at most.
PIECE_BYTES = 1 << 20
#: The longest extension header that is read: a path and some times.
MAX_EXTENSION_BYTES = 16 << 10
MAX_NAME = 512

#: Folders that archives list before their files. They are passed over: nothing here has folders.
_FOLDER = re.compile(r"(?:\./)?(?:[A-Za-z0-9_.-]+/)*[A-Za-z0-9_.-]*/?")
#: pax keys that say nothing about content or place.
_HARMLESS = {"mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment"}

_NAMES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a fifo",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.CONTTYPE: "a contiguous file",
    tarfile.XGLTYPE: "a global header",
    tarfile.GNUTYPE_LONGLINK: "a long link",
}


class Bytes:
    """An asynchronous stream of bytes, taken in the amounts that are needed."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    async def some(self, most: int) -> bytes:
        """At most `most` bytes, and at least one; b"" at the end."""
        while not self._rest:
            try:
                self._rest = memoryview(await anext(self._pieces))
            except StopAsyncIteration:
                return b""
        piece, self._rest = bytes(self._rest[:most]), self._rest[most:]
        return piece

    async def exactly(self, n_bytes: int) -> bytes:
        """So many bytes; fewer only at the end of the stream."""
        taken = b""
        while len(taken) < n_bytes and (piece := await self.some(n_bytes - len(taken))):
            taken += piece
        return taken


async def members_of(
    pieces: AsyncIterator[bytes],
    *,
    on_link: Callable[[str, str], None] | None = None,
    max_members: int = MAX_MEMBERS,
) -> AsyncIterator[Member]:
    """The plain files of a tar, in order. What of a member is not read is passed over.

    `on_link` takes the name and the target of a symbolic link, which is refused without it. Raises BadArchive for
    anything else: other kinds of member, names with `..` or an absolute path, a second member of one name, more members
    than `max_members`, damaged headers, an archive that ends too early.
    """
    stream = Bytes(pieces)
    seen: set[str] = set()
    extension = _Extension()
    n_headers = 0
    while True:
        block = await stream.exactly(BLOCK)
        if len(block) < BLOCK:
            raise BadArchive("the archive ends without the mark of its end: it is cut short, or no tar")
        if not any(block):
            return
        n_headers += 1
        if n_headers > 3 * max_members:
            raise BadArchive(f"the archive has more than {max_members} members")
        header = _header(block)
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            await _extend(stream, header, extension)
            continue
        name, size = _checked(extension.name or header.name), header.size
        if extension.size is not None:
            size = extension.size
        link, extension = extension.link or header.linkname, _Extension()
        if header.type == tarfile.DIRTYPE:
            if size or not _FOLDER.fullmatch(name):
                raise BadArchive(f"the folder {name[:150]!r} has content, or a name that no layout has")
            continue
        if name in seen:
            raise BadArchive(f"the archive has {name[:150]!r} twice")
        if len(seen) >= max_members:
            raise BadArchive(f"the archive has more than {max_members} members")
        seen.add(name)
        if header.type == tarfile.SYMTYPE and on_link is not None and not size:
            on_link(name, link)
            continue
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            what = _NAMES.get(header.type, f"a member of type {header.type!r}")
            raise BadArchive(f"{name[:150]!r} is {what}; only plain files are taken")
        body = _Body(stream, name, size)
        yield Member(name, size, body.pieces())
        await body.end()


class _Extension:
    """What extension headers have said about the next member."""

    def __init__(self) -> None:
        self.name = ""
        self.link = ""
        self.size: int | None = None


class _Body:
    """One member's bytes in the stream."""

    def __init__(self, stream: Bytes, name: str, size: int) -> None:
        self._stream = stream
        self._name = name
        self._left = size
        self._padding = -size % BLOCK

    async def pieces(self) -> AsyncIterator[bytes]:
        """What is left of the member."""
        while self._left:
            piece = await self._stream.some(min(self._left, PIECE_BYTES))
            if not piece:
                raise BadArchive(f"the archive ends within {self._name[:150]!r}, {self._left} bytes before its end")
            self._left -= len(piece)
            yield piece

    async def end(self) -> None:
        """Pass over what was not read, and the padding."""
        async for _ in self.pieces():
            pass
        if len(await self._stream.exactly(self._padding)) < self._padding:
            raise BadArchive(f"the archive ends behind {self._name[:150]!r}")
        self._padding = 0


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError, OverflowError) as error:
        raise BadArchive(f"a header of the archive is damaged: {error}") from None
    if not 0 <= header.size < 1 << 63:
        raise BadArchive(f"{header.name[:150]!r} has a size of {header.size} bytes")
    return header


def _checked(name: str) -> str:
    """The name, a leading ./ left out. Raises BadArchive for one that could mean another place."""
    plain = name.removeprefix("./")
    bad = len(plain) > MAX_NAME or plain.startswith("/") or "\\" in plain or not plain.isprintable()
    if bad or ".." in plain.split("/"):
        raise BadArchive(f"{name[:150]!r} is not a name that a member may have")
    return plain


async def _extend(stream: Bytes, header: tarfile.TarInfo, extension: _Extension) -> None:
    if header.size > MAX_EXTENSION_BYTES:
        raise BadArchive(f"an extension header of {header.size} bytes")
    body = await stream.exactly(header.size)
    padding = -header.size % BLOCK
    if len(body) < header.size or len(await stream.exactly(padding)) < padding:
        raise BadArchive("the archive ends within an extension header")
    try:
        if header.type == tarfile.GNUTYPE_LONGNAME:
            extension.name = body.rstrip(b"\0").decode()
        else:
            _take_pax(body, extension)
    except (UnicodeDecodeError, ValueError) as error:
        raise BadArchive(f"an extension header is damaged: {error}") from None


def _take_pax(body: bytes, extension: _Extension) -> None:
    """POSIX.1-2001 pax: records of `<length> <key>=<value>` and a line end, the length being the whole record's."""
    while body.strip(b"\0"):
        length, _, _ = body.partition(b" ")
        if not length.isdigit() or len(length) > 5:
            raise ValueError("a pax record has no length")
        n_bytes = int(length)
        record, body = body[:n_bytes], body[n_bytes:]
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals or len(record) < n_bytes or not record.endswith(b"\n"):
            raise ValueError("a pax record has a wrong length")
        if key == b"path":
            extension.name = value.decode()
        elif key == b"linkpath":
            extension.link = value.decode()
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise ValueError(f"a size of {value[:40]!r}")
            extension.size = int(value)
        elif key.decode() not in _HARMLESS and not key.startswith((b"SCHILY.", b"LIBARCHIVE.")):
            raise BadArchive(f"the pax key {key[:80]!r} is not read here")


# -- writing -----------------------------------------------------------------------------------------------------------


async def framed(members: AsyncIterator[Member]) -> AsyncIterator[bytes]:
    """A tar of these members: plain files of nobody, readable by all, from the beginning of time."""
    async for member in members:
        yield block_of(member.name, member.size)
        n_bytes = 0
        async for piece in member.pieces:
            n_bytes += len(piece)
            yield piece
        if n_bytes != member.size:
            raise BadArchive(f"{member.name} gave {n_bytes} of {member.size} bytes")
        if padding := -member.size % BLOCK:
            yield bytes(padding)
    yield bytes(2 * BLOCK)


def block_of(name: str, size: int) -> bytes:
    """A member's header, in GNU's format: names of any length, and sizes beyond 8 GiB in one block."""
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = size, 0o644, 0
    return header.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
