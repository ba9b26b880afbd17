"""An image layout as a folder, read as the tar that it would be. Blocks, like everything that reads files here."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from proxy.archives.tar import PIECE_BYTES, block_of
from proxy.errors import BadArchive, BadRequest
from proxy.oci import layout


def pieces_of(folder: Path) -> Iterator[bytes]:
    """The tar of a layout's folder (image-layout.md), its documents first, in pieces of bounded size.

    Raises BadRequest for a folder that is none, BadArchive for anything in it but plain files, or one that changes while
    it is read, OSError when something cannot be read. Nothing is followed: a link leads to nowhere.
    """
    if not (folder / layout.LAYOUT_FILE).exists():
        raise BadRequest(f"{folder} is a folder and no image layout: there is no {layout.LAYOUT_FILE} in it")
    for name in (layout.LAYOUT_FILE, layout.INDEX_FILE):
        yield from _member(folder, name)
    for algorithm in sorted(os.listdir(folder / "blobs")) if (folder / "blobs").is_dir() else ():
        for name in sorted(os.listdir(folder / "blobs" / algorithm)):
            yield from _member(folder, f"blobs/{algorithm}/{name}")
    yield bytes(1024)


def _member(folder: Path, name: str) -> Iterator[bytes]:
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadArchive(f"{folder} has no {name}: it is no image layout") from None
    except OSError as error:
        raise BadArchive(f"{folder / name} cannot be taken: {error.strerror}") from None
    with open(fd, "rb", buffering=0) as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise BadArchive(f"{folder / name} is no plain file")
        yield block_of(name, about.st_size)
        left = about.st_size
        while left:
            piece = file.read(min(left, PIECE_BYTES))
            if not piece:
                raise BadArchive(f"{folder / name} became shorter while it was read")
            left -= len(piece)
            yield piece
        yield bytes(-about.st_size % 512)
