"""How long until somebody is answered: a process that starts, and a command that says what it can do."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench import load
from bench.servers import CACHES, HOST, Missing
from bench.work import Bench

#: Starts a round: one is over in less time than the clock of a busy machine wavers.
_TIMES = 5


def both(bench: Bench) -> None:
    """The rows of this room."""
    answers(bench)
    helps(bench)


def answers(bench: Bench) -> None:
    """From the start of the process to the end of its first answer to `GET /v2/`, with an empty store."""
    for name in (warm.name for warm in bench.in_turn(caches_only=True)):
        for _ in range(_TIMES):
            folder = bench.folder / "starting"
            began = time.monotonic()
            try:
                server = CACHES[name](folder, bench.origin)
            except Missing as missing:
                bench.ledger.miss(str(missing))
                break
            try:
                load.read_document((HOST, server.port), "/v2/")
                bench.ledger.put("S1", "first answer", server, seconds=time.monotonic() - began)
            finally:
                server.stop()
                shutil.rmtree(folder)


def helps(bench: Bench) -> None:
    """`breakwater --help`, from the shell's fork to the end: the floor under every command and every completion."""
    script = Path(sys.executable).with_name("breakwater")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "proxy"]
    for _ in range(_TIMES):
        began = time.monotonic()
        subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL)
        bench.ledger.put("S2", "breakwater --help", bench.warm["breakwater"], seconds=time.monotonic() - began)
