"""START: kill -9 in the middle of a pull, and how soon the next process answers with what was here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

from bench import load
from bench.servers import HOST, breakwater
from bench.work import Bench, run


def restart(bench: Bench) -> None:
    """From the start of the process to its first right manifest and blob, Python's own start included.

    One whole image is in the store, and a pull of another was cut off: its leftovers are swept beside the first answers.
    """
    image, other = bench.images["big"], bench.images["crowd"]
    folder = bench.folder / "killed"
    server = breakwater(folder, bench.origin)
    run("pull", server, path=image.tag, clients=3)
    server.settle()
    command = [sys.executable, "-m", "bench.load", "pull", server.address, "--path", other.tag, "--clients", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=_ROOT) as pull:
        time.sleep(0.4)  # it has begun, or is about to: both are moments at which power goes
        server.process.kill()
        server.process.wait()
        pull.kill()
    began = time.monotonic()
    server = breakwater(folder, bench.origin)
    try:
        document = load.read_document((HOST, server.port), image.manifest)
        config = json.loads(document)["config"]["digest"]
        place = f"{image.tag.rpartition('/manifests/')[0]}/blobs/{config}"
        body = load.read_document((HOST, server.port), place)
        first_hit_s, cpu_s = time.monotonic() - began, server.cpu_s()
        if f"sha256:{hashlib.sha256(body).hexdigest()}" != config:
            raise RuntimeError(f"{server.name} answered {config} with something else after a kill")
        bench.ledger.put("START", "after kill -9", server, **{"first hits s": first_hit_s, "cpu-s": cpu_s})
    finally:
        server.stop()


_ROOT = Path(__file__).parents[1]
