"""Tar as a stream: what is written is what tarfile reads, and the other way round, however the bytes are cut."""

from __future__ import annotations

import io
import tarfile
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.archives.tar import framed, members_of
from proxy.errors import BadArchive
from proxy.ports import Member

Files = list[tuple[str, bytes]]
FILES: Files = [
    ("oci-layout", b"{}"),
    ("index.json", b""),
    (f"blobs/sha256/{'a' * 64}", b"x" * 512),
    (f"blobs/sha512/{'b' * 128}", b"y" * 70_000),
]


async def one_by_one(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def as_members(files: Files) -> AsyncIterator[Member]:
    for name, body in files:
        yield Member(name, len(body), one_by_one([body[:7], body[7:]]))


async def read(pieces: list[bytes]) -> Files:
    found = []
    async for member in members_of(one_by_one(pieces)):
        found.append((member.name, b"".join([piece async for piece in member.pieces])))
    return found


def cut(body: bytes, at: int) -> list[bytes]:
    return [body[start : start + at] for start in range(0, len(body), at)]


async def test_what_is_written_is_what_tarfile_reads() -> None:
    """Names beyond 100 characters included: a sha512 has 141."""
    body = b"".join([piece async for piece in framed(as_members(FILES))])
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        for (name, content), member in zip(FILES, tar, strict=True):
            stream = tar.extractfile(member)
            assert stream is not None
            assert (member.name, stream.read(), member.mode, member.mtime) == (name, content, 0o644, 0)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("at", [1, 511, 512, 513, 1 << 20])
async def test_every_format_is_read_however_it_is_cut(format: int, at: int) -> None:
    """Folders are passed over, a leading ./ is nothing, times and owners do not matter."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for folder in ("./", "./blobs", "./blobs/sha256"):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, content in FILES[:3]:
            info = tarfile.TarInfo(f"./{name}")
            info.size, info.mtime, info.uname = len(content), 1.5 if format == tarfile.PAX_FORMAT else 1, "ünïcode"
            tar.addfile(info, io.BytesIO(content))
    assert await read(cut(out.getvalue(), at)) == FILES[:3]


async def test_what_is_not_read_is_passed_over() -> None:
    """A reader may skip a member; the next one is right."""
    body = b"".join([piece async for piece in framed(as_members(FILES))])
    names = [member.name async for member in members_of(one_by_one(cut(body, 1000)))]
    assert names == [name for name, _ in FILES]


async def test_a_member_that_is_not_as_long_as_it_says_is_not_written() -> None:
    """The reader could not know where the next one begins."""

    async def lying() -> AsyncIterator[Member]:
        yield Member("index.json", 5, one_by_one([b"four"]))

    with pytest.raises(BadArchive, match="4 of 5"):
        [piece async for piece in framed(lying())]


@given(st.binary(max_size=2000), st.integers(1, 600))
async def test_any_bytes_are_read_or_refused(body: bytes, at: int) -> None:
    """Nothing but BadArchive comes of what somebody sends."""
    try:
        await read(cut(body, at))
    except BadArchive:
        pass
