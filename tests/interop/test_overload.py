"""Too many clients at a real process: idle ones, ones that never end their headers, ones that stop reading.

The full form is in `make soak`; what runs everywhere is the same in small. Sockets are this process's, so that together
with the server's they show what one node has.
"""

from __future__ import annotations

import contextlib
import http.client
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from tests.interop.conftest import upstreams_at
from tests.support.images import Image, digest_of, image
from tests.support.origin import Origin
from tests.support.process import Breakwater, eventually

_SEED = count(9000)

#: Connections beyond those of the test that the server takes: for the hits in their company.
_ROOM = 10


@dataclass(frozen=True, slots=True)
class Crowd:
    """How many of each kind."""

    n_idle: int
    n_slow: int
    n_stalled: int

    @property
    def n(self) -> int:
        """All of them."""
        return self.n_idle + self.n_slow + self.n_stalled


SMALL = Crowd(600, 300, 60)
FULL = pytest.param(Crowd(10_000, 5_000, 500), marks=(pytest.mark.soak, pytest.mark.timeout(900)), id="soak")


@pytest.fixture(scope="module", autouse=True)
def _many_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def ask(breakwater: Breakwater, target: str) -> tuple[int, dict[str, str], bytes]:
    """One answer on a connection of its own. Header names are lower case."""
    connection = http.client.HTTPConnection("127.0.0.1", breakwater.port, timeout=60)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def peak_mib(breakwater: Breakwater) -> float:
    """The most memory it has had (VmHWM)."""
    (line,) = [each for each in _status_lines(breakwater) if each.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def _status_lines(breakwater: Breakwater) -> list[str]:
    return Path(f"/proc/{breakwater.pid}/status").read_text().splitlines()


def n_descriptors(breakwater: Breakwater) -> int:
    """Open in the server's process."""
    return len(list(Path(f"/proc/{breakwater.pid}/fd").iterdir()))


def connect(stack: ExitStack, port: int, *, first: bytes = b"", receive_buffer: int = 0) -> socket.socket:
    """A client that says `first` and then nothing."""
    client = stack.enter_context(socket.socket())
    client.settimeout(60)
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(("127.0.0.1", port))
    if first:
        client.sendall(first)
    return client


@pytest.fixture
def pushed(origin: Origin) -> tuple[str, Image]:
    """A repository with an image whose layer does not fit into the kernel's buffers."""
    number = next(_SEED)
    wanted = image(number, (8 << 20,))
    origin.push(f"library/crowd-{number}", "1", wanted)
    return f"/v2/library/crowd-{number}", wanted


@pytest.mark.parametrize("crowd", [pytest.param(SMALL, id="small"), FULL])
def test_a_crowd_costs_little_and_keeps_nobody_from_a_hit(
    scratch: Path, origin: Origin, pushed: tuple[str, Image], crowd: Crowd
) -> None:
    """Memory stays bounded, hits are answered, the next over the cap is told 503 with Retry-After (kubelets then ask
    the next mirror), and when the crowd leaves nothing of it stays."""
    base, wanted = pushed
    layer = max((blob.content for blob in wanted.blobs), key=len)
    settings = upstreams_at(origin.url)
    settings["server"]["max_connections"] = crowd.n + _ROOM
    with Breakwater(scratch / f"crowd-{crowd.n}", settings) as breakwater, ExitStack() as stack:
        assert ask(breakwater, f"{base}/manifests/1")[2] == wanted.body
        assert digest_of(ask(breakwater, f"{base}/blobs/{digest_of(layer)}")[2]) == digest_of(layer)
        eventually(lambda: connections(breakwater) == 0, "the first connections are closed")
        before_mib, n_before = peak_mib(breakwater), n_descriptors(breakwater)

        request = f"GET {base}/blobs/{digest_of(layer)} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        stalled = [connect(stack, breakwater.port, first=request, receive_buffer=4096) for _ in range(crowd.n_stalled)]
        for each in stalled:
            assert each.recv(12) == b"HTTP/1.1 200"
        idle = [connect(stack, breakwater.port) for _ in range(crowd.n_idle)]
        slow = [connect(stack, breakwater.port, first=b"GET /v2/ HTTP/1.1\r\nX-") for _ in range(crowd.n_slow)]
        assert len(idle) == crowd.n_idle

        assert ask(breakwater, f"{base}/manifests/1")[2] == wanted.body
        assert digest_of(ask(breakwater, f"{base}/blobs/{digest_of(layer)}")[2]) == digest_of(layer)
        print(f"{crowd.n} clients: {before_mib:.0f} MiB before, {peak_mib(breakwater):.0f} MiB at most")
        # 12 KiB for each of them, and what serving takes at all.
        assert peak_mib(breakwater) <= before_mib + 32 + crowd.n * 12 / 1024

        eventually(lambda: all(is_closed(each) for each in slow), "endless headers are given up")
        for each in (*slow, *idle):
            if is_closed(each):  # idle ones as well, where all this took longer than keep-alive
                each.close()  # or, with those that take their places, they are more than one process may have
        eventually(lambda: is_told_503(breakwater, crowd.n + _ROOM, stack), "over the cap a client is told 503")

        stack.close()
        eventually(lambda: connections(breakwater) == 0, "the crowd has left")
        eventually(lambda: n_descriptors(breakwater) <= n_before + 8, "its descriptors are closed")
        assert ask(breakwater, f"{base}/manifests/1")[2] == wanted.body
        breakwater.stop_cleanly()


def is_told_503(breakwater: Breakwater, cap: int, stack: ExitStack) -> bool:
    """Fill up to the cap, because slow ones were thrown out, and ask once more."""
    for _ in range(cap - connections(breakwater)):
        connect(stack, breakwater.port)
    with ExitStack() as once, contextlib.suppress(ConnectionError):
        over = connect(once, breakwater.port, first=b"GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n")
        told = over.recv(4096)
        return told.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 5\r\n" in told
    return False


def is_closed(client: socket.socket) -> bool:
    """Whether the server has closed it."""
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def connections(breakwater: Breakwater) -> int:
    """Open client connections, as the metrics say."""
    lines = breakwater.admin("/metrics").splitlines()
    (line,) = [each for each in lines if each.startswith("breakwater_connections ")]
    return int(float(line.split()[1]))
