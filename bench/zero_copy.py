"""Which way of sending a file web/serve.py should take: ours, aiofastnet's, aiohttp's, beside one nginx worker.

    python -m bench.zero_copy [--rounds 3] [--seconds 2] [--mib 180]

Each is the least that can be called a server: aiohttp's low-level server on uvloop, one file. aiofastnet must be
installed for its row (it is no dependency of ours); nginx for the last.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WAYS = ("ours", "aiofastnet", "aiohttp FileResponse", "nginx, one worker")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", choices=WAYS[:3])
    parser.add_argument("--file")
    parser.add_argument("--port", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--mib", type=int, default=180)
    parser.add_argument("--way", action="append", choices=WAYS)
    asked = parser.parse_args()
    if asked.serve:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(asked.serve, Path(asked.file), asked.port))
    else:
        _compare(asked.rounds, asked.seconds, asked.mib, asked.way or WAYS)


async def _serve(way: str, path: Path, port: int) -> None:
    from aiohttp import web

    from proxy.clock import SystemClock
    from proxy.oci.digest import Verifier
    from proxy.oci.ranges import Range
    from proxy.ports import FileIdentity, LocalFile
    from proxy.web.serve import Sender
    from proxy.web.server import DataServer, Limits

    sender = Sender(SystemClock(), n_lanes=int(os.environ.get("LANES", 0)) or None)
    size = path.stat().st_size

    class Blob:
        def __init__(self) -> None:
            self.fd = os.open(path, os.O_RDONLY)
            self.size = size
            self.identity = FileIdentity(0, size, 0)

        async def read(self, offset: int, limit: int, verifier: Verifier | None = None) -> bytes:
            raise AssertionError("sent from, never read")

        def close(self) -> None:
            os.close(self.fd)

    async def ours(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(size)})
        await sender.send(request, response, LocalFile(Blob()), (Range(0, size),))
        return response

    async def fastnet(request: web.BaseRequest) -> web.StreamResponse:
        import aiofastnet

        response = web.StreamResponse(headers={"Content-Length": str(size)})
        writer = await response.prepare(request)
        assert writer is not None
        assert request.transport is not None
        writer.send_headers()
        await writer.drain()
        loop = asyncio.get_running_loop()
        with open(path, "rb") as file:
            for offset in range(0, size, 1 << 20):  # in turns, else one fast client has the loop for the whole file
                await aiofastnet.sendfile(loop, request.transport, file, offset, min(1 << 20, size - offset))
                await asyncio.sleep(0)
        return response

    async def file_response(_: web.BaseRequest) -> web.StreamResponse:
        return web.FileResponse(path)

    if way == "ours":
        limits = Limits(send_buffer_bytes=int(os.environ.get("SEND_BUFFER", Limits().send_buffer_bytes)))
        await DataServer(ours, log=logging.getLogger(), limits=limits).start([f"127.0.0.1:{port}"])
    else:
        server = web.Server(fastnet if way == "aiofastnet" else file_response)
        loop = asyncio.get_running_loop()
        if way == "aiofastnet":
            import aiofastnet

            await aiofastnet.create_server(loop, server, "127.0.0.1", port, backlog=4096)
        else:
            await loop.create_server(server, "127.0.0.1", port, backlog=4096)
    await asyncio.Event().wait()


def _compare(rounds: int, seconds: float, mib: int, ways: Sequence[str]) -> None:
    figures: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "body"
        path.write_bytes(os.urandom(1 << 20) * mib)
        for _ in range(rounds):
            for way in ways:
                process, port = _start(way, path, Path(folder))
                if process is None:
                    continue
                try:
                    for clients in (1, 16, 64):
                        figures.setdefault((way, clients), []).append(_measure(process.pid, port, clients, seconds))
                finally:
                    process.terminate()
                    process.wait()
    print(f"{'GB/s · cpu-s/GB':24}" + "".join(f"{n:>5} clients      " for n in (1, 16, 64)) + " peak MiB")
    for way in ways:
        if (way, 1) not in figures:
            print(f"{way:24} missing")
            continue
        cells = [
            f"{statistics.median(f['gbs'] for f in figures[way, n]):6.2f} · "
            f"{statistics.median(f['cpu'] for f in figures[way, n]):.3f}    "
            for n in (1, 16, 64)
        ]
        print(f"{way:24}" + "".join(cells) + f"{max(f['peak'] for f in figures[way, 64]):6.0f}")


def _start(way: str, path: Path, folder: Path) -> tuple[subprocess.Popen[bytes] | None, int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    if way.startswith("nginx"):
        (folder / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {folder}/pid; error_log stderr crit;"
            "events { worker_connections 512; }"
            f"http {{ access_log off; sendfile on; tcp_nopush on; server {{ listen 127.0.0.1:{port} backlog=4096;"
            f" root {folder}; }} }}"
        )
        command = ["nginx", "-c", str(folder / "nginx.conf")]
    elif way == "aiofastnet" and importlib.util.find_spec("aiofastnet") is None:
        return None, port
    else:
        command = [sys.executable, "-m", "bench.zero_copy", "--serve", way, "--file", str(path), "--port", str(port)]
    try:
        # What clients that end in the middle make a server say is not of interest here.
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        return None, port
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process, port
        except ConnectionRefusedError:
            time.sleep(0.02)


def _measure(pid: int, port: int, clients: int, seconds: float) -> dict[str, Any]:
    def cpu() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = cpu()
    load = [sys.executable, "-m", "bench.load", "blobs", f"127.0.0.1:{port}", "--path", "/body"]
    run = subprocess.run(
        [*load, "--clients", str(clients), "--seconds", str(seconds)], check=True, stdout=subprocess.PIPE
    )
    counted = json.loads(run.stdout)
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    gigabytes = counted["bytes"] / 1e9
    return {"gbs": gigabytes / counted["seconds"], "cpu": (cpu() - before) / gigabytes, "peak": peak, **counted}


if __name__ == "__main__":
    main()
