"""P5: a store of very many small blobs: the first hit after a start, memory, and hits while thousands are evicted.

    python -m bench.million FOLDER 1000000        make such a store, to look at by hand (a minute)

The store is made as an earlier life would have left it: every blob right and readable, paid for by a project, its use
remembered, and some of them named by manifests. So a start has everything to take up that it can have.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import load
from bench.servers import HOST, MANIFEST_TYPE, Server, breakwater
from bench.work import MIB, Bench, run
from proxy.clock import SystemClock
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.ports import Holding, LinkRecord, Use
from proxy.store.disk import DiskStore

#: Blobs that a manifest names, and how many manifests there are at most.
_NAMED, _MANIFESTS = 50, 200
#: How often the store is opened: the first hit is the median of them.
_STARTS = 5
#: The project that pays for all of them, and the repository that has them.
_PROJECT, _HOST, _REPOSITORY = "bench", "bench.example", "bench/many"


def content_of(n: int) -> bytes:
    """Blob `n`: the same in every run."""
    return b"blob %d" % n


def fill(path: Path, n_blobs: int) -> None:
    """Make the store below `path`."""
    asyncio.run(_make_records(path, n_blobs))
    ours = path / "breakwater"
    blobs = ours / "blobs" / "sha256"
    for folder in (blobs, *(blobs / f"{n:02x}" for n in range(256))):
        folder.mkdir(mode=0o700, exist_ok=True)
    journal = os.open(ours / "charges" / _PROJECT, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(journal, "w") as charges:
        for n in range(n_blobs):
            content = content_of(n)
            name = hashlib.sha256(content).hexdigest()
            fd = os.open(blobs / name[:2] / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
            os.write(fd, content)
            os.close(fd)
            said = f"+ sha256:{name} {len(content)}"
            charges.write(f"{zlib.crc32(said.encode()):08x} {said}\n")
    os.sync()  # what writing a million files leaves to be written is not of the life that is measured


async def _make_records(path: Path, n_blobs: int) -> None:
    store = await DiskStore.open(path, clock=SystemClock(), report=print)
    holding = Holding(_PROJECT, _HOST, _REPOSITORY)
    for n in range(min(_MANIFESTS, n_blobs // _NAMED)):
        parts = [_descriptor(content_of(m)) for m in range(n * _NAMED, (n + 1) * _NAMED)]
        manifest = Descriptor(MANIFEST_TYPE, Digest.of(b"manifest %d" % n), 100)
        await store.records.put_link(holding, LinkRecord(manifest, names=tuple(parts)))
    step = 100_000
    for start in range(0, n_blobs, step):
        some = range(start, min(start + step, n_blobs))
        await store.facts.remember([Use(Digest.of(content_of(n)), len(content_of(n)), n + 1) for n in some], [])
    await store.aclose()


def _descriptor(content: bytes) -> Descriptor:
    return Descriptor("application/octet-stream", Digest.of(content), len(content))


def p5(bench: Bench, n_blobs: int) -> None:
    """How soon is the first hit, what do so many cost in memory, and how long does a hit take beside other work."""
    case = f"{n_blobs:,} blobs"
    folder = bench.folder / "million"
    fill(folder / "store", n_blobs)
    taken = _on_disk(folder / "store")
    # Just enough that the first layer pulled below has others go.
    capacity = taken + 8 * MIB
    hit = f"/v2/{_HOST}/{_REPOSITORY}/blobs/{Digest.of(content_of(7))}"
    for _ in range(_STARTS - 1):
        server, _ = _started(bench, folder, capacity, case, hit)
        server.stop()
    server, began = _started(bench, folder, capacity, case, hit)
    try:
        with _watched(server, hit) as counting:
            _wait_until_counted(server)
        counted = time.monotonic() - began
        with _watched(server, hit) as at_rest:
            time.sleep(bench.seconds)
        n_before = _gauge(server, "breakwater_store_blobs")
        with _watched(server, hit) as evicting:
            for path in bench.images["big"].blobs:
                run("once", server, path=path, clients=1)
                if (n_evicted := n_before - _gauge(server, "breakwater_store_blobs")) >= n_blobs / 100:
                    break
            time.sleep(bench.seconds)  # what was begun goes on to the low mark
        bench.ledger.put(
            "P5", case, server,
            **{"counted s": counted, "peak MiB": server.memory_mib(),
               "RSS MiB": server.memory_mib("VmRSS"), "evicted blobs": n_evicted,
               "hit max ms, at rest": at_rest["max_ms"], "hit max ms, while counted": counting["max_ms"],
               "hit p99 ms, while counted": counting["p99_ms"], "hit max ms, while evicting": evicting["max_ms"],
               "hit p99 ms, while evicting": evicting["p99_ms"]},
        )  # fmt: skip
    finally:
        server.stop()


def _started(bench: Bench, folder: Path, capacity: int, case: str, hit: str) -> tuple[Server, float]:
    """A server that has answered its first hit, and when its start began."""
    began = time.monotonic()
    server = breakwater(folder, bench.origin, capacity=f"{capacity}B")
    load.read_document((HOST, server.port), hit)
    bench.ledger.put("P5", case, server, **{"first hit s": time.monotonic() - began})
    return server, began


@contextmanager
def _watched(server: Server, path: str) -> Iterator[dict[str, Any]]:
    """Hits, one after the other, for as long as this lasts; filled in at its end."""
    said: dict[str, Any] = {}
    command = [sys.executable, "-m", "bench.load", "watch", server.address, "--path", path]
    watching = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )  # fmt: skip
    try:
        assert watching.stdout is not None
        watching.stdout.readline()  # it has begun
        yield said
    finally:
        text, _ = watching.communicate(b"")
    said |= json.loads(text)


def _wait_until_counted(server: Server) -> None:
    give_up_at = time.monotonic() + 300
    while not _gauge(server, "breakwater_store_counted"):
        if time.monotonic() > give_up_at:
            raise RuntimeError("the store was not counted within 300 s")
        time.sleep(0.25)


def _gauge(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"http://{HOST}:{server.admin_port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name + " ")))


def _on_disk(path: Path) -> int:
    return sum(
        os.lstat(Path(at) / name).st_blocks * 512 for at, below, names in os.walk(path) for name in (*names, ".")
    )


if __name__ == "__main__":
    fill(Path(sys.argv[1]), int(sys.argv[2]))
