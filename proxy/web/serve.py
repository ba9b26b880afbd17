"""A body onto a connection: from a file without copying it, from a growing file as it grows, or from memory.

One `Sender` for the data port; `send` is all that others need. It knows nothing of digests, upstreams or why a body is
sent. INV-3 is kept from this side by never sending beyond a tail's frontier, and by ending short, never cleanly, when the
tail fails.

How, and what was rejected:

- Plain TCP and unix sockets: `os.sendfile` onto a duplicate of the connection's descriptor, driven by the loop's readiness
  callbacks, at most `TURN_BYTES` a callback. uvloop has no `loop.sendfile`, and `web.FileResponse` then copies through
  threads (1.5-2.0 GB/s against 3.4-5.9). The duplicate is ours, so its number cannot become another connection's while
  we hold it; the transport has written everything before and writes nothing meanwhile, so bytes never interleave.
- aiofastnet's `sendfile` was measured beside it (bench/README.md has the figures) and not taken: it is slower from 16
  clients on, gives a fast reader the loop for a whole file, and turns a failing disk into a closed connection without
  saying how far it came, so that a body could not be continued from upstream.
- sendfile of a page that is not in memory waits for the disk. So each window is asked for first (`RWF_NOWAIT` on its
  ends), and a cold one is sent from a worker thread, which also has the kernel read ahead. A file system that cannot be
  asked (EOPNOTSUPP) counts as cold.
- TLS, or no descriptor to spare: pieces are read and written through the transport, with sensible watermarks (uvloop's
  own low-water mark is 16 bytes).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from proxy.errors import BreakwaterError, Unavailable
from proxy.oci.ranges import Range
from proxy.ports import BlobSource, Clock, LocalFile, Tail

T = TypeVar("T")

#: Bytes a connection may send before the others have their turn.
TURN_BYTES = 1 << 20
#: The step of the copying path. Smaller costs hops, larger costs memory for every stalled TLS reader.
PIECE_BYTES = 256 << 10
#: Up to this size a body travels with its headers in one write; a duplicate and a sendfile would cost more.
SMALL_BYTES = 64 << 10
#: What the kernel is asked to read ahead once a window was found cold.
READ_AHEAD_BYTES = 8 << 20

#: What a socket says when the peer, or the way to it, is gone. Everything else sendfile says is about the file.
_PEER_ERRNOS = frozenset({
    errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ENETRESET,
})  # fmt: skip
#: File systems that cannot splice say one of these.
_NO_SENDFILE_ERRNOS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

Part = bytes | Range


@dataclass(frozen=True, slots=True)
class Pace:
    """The slowest reader that is kept: fewer than this many bytes/s over `window_s` seconds ends the connection.

    Time in which we had nothing to send does not count. The defaults cut a reader that takes hours for a layer while
    sparing a phone line.
    """

    min_bytes_per_s: int = 10_000
    window_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Sent:
    """How far a body came. `gone`: the client went away; `slow`: it was cut for being too slow."""

    n_bytes: int
    ending: Literal["whole", "gone", "slow"]


class ReadFailed(Unavailable):
    """The file could not be read on. `rest` is what of the body has not left yet; `send` may be called again with it.

    `is_short`: the file ended before its size, so its bytes are not what its name says.
    """

    def __init__(self, sentence: str, *, rest: Sequence[Part], is_short: bool) -> None:
        super().__init__(sentence)
        self.rest = rest
        self.is_short = is_short


class Sender:
    """Sends bodies, and knows every body on its way so that too slow readers can be cut."""

    def __init__(self, clock: Clock, *, pace: Pace | None = None, n_threads: int = 8) -> None:
        """`n_threads` workers wait for the disk, so that the loop does not; they are nobody else's."""
        raise NotImplementedError

    async def send(
        self, request: web.BaseRequest, response: web.StreamResponse, source: BlobSource, parts: Sequence[Part]
    ) -> Sent:
        """Prepare `response` and send `parts` in order: literal bytes, or a range of `source`.

        The headers, Content-Length among them, are set already and go out at once. Not for HEAD. Afterwards, on every path,
        the source's blob is closed or its tail left, so the caller need not. Return the response from the handler as usual.

        A client that goes away, or is too slow, is no error: see `Sent`. Raises whatever the tail raised when the transfer
        fails (the connection then ends short once the handler returns), ReadFailed when the disk fails.
        """
        raise NotImplementedError
