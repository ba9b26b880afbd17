"""The works P1…P7: what is done, and what is written down of it. Each measures every server in turn, once a round."""

from __future__ import annotations

import base64
import compileall
import json
import re
import resource
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import proxy
from bench import load
from bench.servers import (
    CACHES,
    HOST,
    ROBOT,
    Image,
    Missing,
    Server,
    breakwater,
    make_image,
    n_asked,
    nginx_static,
    nginx_tls,
    origin,
    ruled,
    unlogged,
)
from bench.slow_disk import forget, throttled

MIB = 1 << 20


@dataclass(slots=True)
class Ledger:
    """Every figure of a run: (work, case, server, unit) -> one value a round; and what was left out, and why."""

    figures: dict[tuple[str, str, str, str], list[float]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def put(self, work: str, case: str, server: Server, **values: float) -> None:
        """Write down what one round gave."""
        self.settings.setdefault(server.name, server.settings)
        for unit, value in values.items():
            self.figures.setdefault((work, case, server.name, unit), []).append(value)

    def miss(self, sentence: str) -> None:
        """Something was left out."""
        if sentence not in self.missing:
            self.missing.append(sentence)

    def judge_client(self, work: str, case: str, server: str, counted: dict[str, Any]) -> None:
        """Say where the client was the bottleneck, or did not get what it asked for."""
        share = counted.get("client_cpu_s", 0.0) / max(counted["seconds"], 1e-9)
        if share > 0.9:
            self._warn(f"{work} {case}, {server}: the client's own CPU was {share:.0%} of the time")
        if counted.get("failures"):
            self._warn(f"{work} {case}, {server}: {counted['failures']} requests failed ({counted['failure']})")

    def _warn(self, sentence: str) -> None:
        self.warnings.append(sentence)


@dataclass(slots=True)
class Bench:
    """The common ground of a run: an origin with images, and servers that stay up with warm caches."""

    folder: Path
    ledger: Ledger
    seconds: float
    is_quick: bool
    root: Path = field(init=False)
    images: dict[str, Image] = field(init=False)
    origin: Server = field(init=False)
    #: Ours with 500 rules and robots on, for the warm manifest row alone.
    ruled: Server = field(init=False)
    #: Ours with the request log off, for the same row.
    unlogged: Server = field(init=False)
    warm: dict[str, Server] = field(default_factory=dict)
    round: int = 0
    _n_folders: int = 0
    _up: ExitStack = field(default_factory=ExitStack)

    def set_up(self) -> None:
        """Make the images, start everything, warm every cache."""
        # As an installation does it; a tree that was just cloned would compile itself in the first start that is measured.
        compileall.compile_dir(Path(proxy.__file__).parent, quiet=1)
        self.root = self.folder / "root"
        small = 24 if self.is_quick else 50
        self.images = {
            "big": make_image(self.root, "big", [small * MIB] * 8),
            "crowd": make_image(self.root, "crowd", [(60 if self.is_quick else 180) * MIB]),
        }
        images = list(self.images.values())
        self.origin = self._noted(origin(self.folder / "origin", self.root, images))
        for name, start in CACHES.items():
            try:
                self.warm[name] = self._noted(start(self.folder / f"warm-{name.replace(' ', '-')}", self.origin))
            except Missing as missing:
                self.ledger.miss(str(missing))
        self.ruled = self._noted(ruled(self.folder / "ruled", self.origin))
        self.unlogged = self._noted(unlogged(self.folder / "unlogged", self.origin))
        self.warm["nginx static"] = self._noted(nginx_static(self.folder / "static", self.root, images))
        for server in self.warm.values():
            for image in self.images.values():
                run("pull", server, path=image.tag, clients=3)
            server.settle()

    def in_turn(self, *, caches_only: bool = False) -> list[Server]:
        """The servers that are there, another one first in each round: going first is never for nothing."""
        names = [name for name in self.warm if not caches_only or name in CACHES]
        by = self.round % len(names)
        return [self.warm[name] for name in names[by:] + names[:by]]

    def _noted(self, server: Server) -> Server:
        self._up.callback(server.stop)
        return server

    def tear_down(self) -> None:
        """Stop everything that was started, also when `set_up` came only half-way."""
        self._up.close()

    @contextmanager
    def cold(self, name: str) -> Iterator[Server]:
        """The server `name` afresh, with an empty cache, and an origin of its own that counts from nothing."""
        self._n_folders += 1
        folder = self.folder / f"cold-{self._n_folders}"
        server = CACHES[name](folder, self.origin)
        (self.origin.folder / "asked").open("w").close()
        try:
            yield server
        finally:
            server.stop()
            shutil.rmtree(folder)


def run(what: str, server: Server, **options: Any) -> dict[str, Any]:
    """Run a load against a server; its figures, with the server's CPU seconds for it."""
    command = [sys.executable, "-m", "bench.load", what, server.address]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    before = server.cpu_s()
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{server.name}: {what} failed; see above, and {server.folder}/log")
    return {**json.loads(done.stdout), "server_cpu_s": server.cpu_s() - before}


# -- P1: warm bodies ---------------------------------------------------------------------------------------------------


def p1(bench: Bench) -> None:
    """One warm blob, as often as it goes, for 1, 16 and 64 clients."""
    path = bench.images["crowd"].blobs[0]
    for clients in (1, 16, 64):
        for server in bench.in_turn():
            server.forget_peak()
            case = f"{clients:>2} clients"
            counted = run("blobs", server, path=path, clients=clients, seconds=bench.seconds)
            bench.ledger.judge_client("P1", case, server.name, counted)
            gigabytes = counted["bytes"] / 1e9
            bench.ledger.put(
                "P1", case, server,
                **{"GB/s": gigabytes / counted["seconds"], "cpu-s/GB": counted["server_cpu_s"] / gigabytes,
                   "peak MiB": server.memory_mib()},
            )  # fmt: skip


# -- P2: warm manifests ------------------------------------------------------------------------------------------------


def p2(bench: Bench) -> None:
    """A warm manifest over 32 connections, by a fresh tag and by digest."""
    if shutil.which("wrk") is None:
        bench.ledger.miss("P2: wrk is not installed (apt: wrk)")
        return
    image = bench.images["big"]
    named = replace(bench.ruled, name=f"{bench.ruled.name}, Basic")
    headers = {bench.ruled.name: f"Bearer {_token(bench.ruled)}", named.name: f"Basic {_LOGIN}"}
    for case, path in (("by tag", image.tag), ("by digest", image.manifest)):
        for server in [*bench.in_turn(), bench.ruled, named, bench.unlogged]:
            if server.name in headers:  # its secret is checked once a minute, and its manifest fetched once
                _fetch(f"http://{server.address}{path}", headers[server.name])
            before, client_before = server.cpu_s(), _children_cpu()
            command = [
                "wrk",
                "-t1",
                "-c32",
                "-H",
                f"Accept: {load.ACCEPT}",
                *(["-H", f"Authorization: {headers[server.name]}"] if server.name in headers else []),
                f"-d{max(1, round(bench.seconds))}s",
                f"http://{server.address}{path}",
            ]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rate = float(re.search(r"Requests/sec:\s+([0-9.]+)", said)[1])  # type: ignore[index]  # or wrk has changed
            failed = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
            counted: dict[str, Any] = {
                "seconds": max(1, round(bench.seconds)),
                "client_cpu_s": _children_cpu() - client_before,
                "failures": int(failed[1]) if failed else 0,
                "failure": "status",
            }
            bench.ledger.judge_client("P2", case, server.name, counted)
            cost = 1e6 * (server.cpu_s() - before) / (rate * counted["seconds"])
            bench.ledger.put("P2", case, server, **{"requests/s": rate, "cpu-µs each": cost})


_LOGIN = base64.b64encode(":".join(ROBOT).encode()).decode()


def _token(server: Server) -> str:
    """A token of the bench's robot, and the manifests pulled with it once."""
    return str(json.loads(_fetch(f"http://{server.address}/token", f"Basic {_LOGIN}"))["token"])


def _fetch(url: str, authorization: str) -> bytes:
    asked = urllib.request.Request(url, headers={"Authorization": authorization, "Accept": load.ACCEPT})
    with urllib.request.urlopen(asked) as answer:
        return bytes(answer.read())


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# -- P3, P4: cold ------------------------------------------------------------------------------------------------------


def p3(bench: Bench) -> None:
    """The big image through an empty cache, three streams, as containerd does it."""
    image = bench.images["big"]
    for name in (warm.name for warm in bench.in_turn(caches_only=True)):
        with bench.cold(name) as server:
            before = server.cpu_s()
            counted = run("pull", server, path=image.tag, clients=3)
            server.settle()
            bench.ledger.judge_client("P3", "400 MiB, 3 streams", server.name, counted)
            gigabytes = counted["bytes"] / 1e9
            bench.ledger.put(
                "P3", "400 MiB, 3 streams", server,
                **{"seconds": counted["seconds"], "cpu-s/GB": (server.cpu_s() - before) / gigabytes,
                   "peak MiB": server.memory_mib()},
            )  # fmt: skip


def p4(bench: Bench, clients: int) -> None:
    """Many cold clients, one blob: how often is upstream asked, and how soon has everybody something."""
    image = bench.images["crowd"]
    for name in (warm.name for warm in bench.in_turn(caches_only=True)):
        if clients > 64 and name not in ("breakwater", "nginx proxy_cache"):
            bench.ledger.miss(f"P4 with {clients} clients: {name} left out (it asks upstream for each of them)")
            continue
        with bench.cold(name) as server:
            load.read_document((HOST, server.port), image.tag)  # a client has the manifest before it asks for a layer
            before = server.cpu_s()
            counted = run("once", server, path=image.blobs[0], clients=clients)
            case = f"{clients} clients, {180 if not bench.is_quick else 60} MiB"
            bench.ledger.judge_client("P4", case, server.name, counted)
            gigabytes = counted["bytes"] / 1e9
            bench.ledger.put(
                "P4", case, server,
                **{"seconds": counted["seconds"], "upstream GETs": n_asked(bench.origin, image.blobs[0]),
                   "last first byte s": counted["first_byte_s"][1],
                   "cpu-s/GB": (server.cpu_s() - before) / gigabytes, "peak MiB": server.memory_mib()},
            )  # fmt: skip


# -- P6, P7: in company ------------------------------------------------------------------------------------------------


def p6(bench: Bench, connections: int = 10_000) -> None:
    """Hits beside many idle connections."""
    for name in ("breakwater", "nginx static"):
        server = bench.warm[name]
        server.forget_peak()
        command = [sys.executable, "-m", "bench.load", "idle", server.address, "--clients", str(connections)]
        idle = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        assert idle.stdout is not None and idle.stdin is not None
        try:
            if not idle.stdout.readline():
                bench.ledger.miss(f"P6: {connections} connections could not be opened to {name} (ulimit -n?)")
                continue
            counted = run("latency", server, path=bench.images["big"].manifest, seconds=bench.seconds)
            bench.ledger.put(
                "P6", f"{connections:,} idle", server,
                **{"p50 ms": counted["p50_ms"], "p99 ms": counted["p99_ms"], "RSS MiB": server.memory_mib("VmRSS")},
            )  # fmt: skip
        finally:
            idle.stdin.close()
            idle.wait()


def p7(bench: Bench, streams: int = 64) -> None:
    """A manifest while blob streams saturate the machine."""
    for server in bench.in_turn():
        command = [sys.executable, "-m", "bench.load", "blobs", server.address]
        command += ["--path", bench.images["crowd"].blobs[0], "--clients", str(streams)]
        command += ["--seconds", str(bench.seconds + 1)]
        streaming = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        time.sleep(0.5)
        counted = run("latency", server, path=bench.images["big"].manifest, seconds=bench.seconds)
        said, _ = streaming.communicate()
        moved = json.loads(said)
        bench.ledger.put(
            "P7", f"beside {streams} streams", server,
            **{"p50 ms": counted["p50_ms"], "p99 ms": counted["p99_ms"], "max ms": counted["max_ms"],
               "streams GB/s": moved["bytes"] / 1e9 / moved["seconds"]},
        )  # fmt: skip


def disk(bench: Bench, readers: int = 8, bytes_per_s: int = 20_000_000) -> None:
    """A manifest, and a small blob, while readers wait for layers not in memory, on a disk throttled to 20 MB/s."""
    image = bench.images["big"]
    layers = image.blobs[:readers]
    digests = [layer.rpartition("sha256:")[2] for layer in layers]
    for name in ("breakwater", "nginx static"):
        server = bench.warm[name]
        folder = bench.root if name == "nginx static" else server.folder / "store"
        cold = [path for path in folder.rglob("*") if path.name.removeprefix("sha256:") in digests]
        manifest = json.loads(load.read_document((HOST, server.port), image.manifest))
        config = f"{image.tag.rpartition('/manifests/')[0]}/blobs/{manifest['config']['digest']}"
        command = [sys.executable, "-m", "bench.load", "blobs", server.address, "--clients", str(readers)]
        command += [word for layer in layers for word in ("--path", layer)] + ["--seconds", str(bench.seconds + 1)]
        for case, path in (("manifest", image.manifest), ("small blob", config)):
            load.read_document((HOST, server.port), path)
            try:
                with throttled(server.pids(), bench.folder, bytes_per_s):
                    forget(cold)
                    reading = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
                    time.sleep(0.5)
                    counted = run("latency", server, path=path, seconds=bench.seconds)
                    moved = json.loads(reading.communicate()[0])
            except Missing as missing:
                bench.ledger.miss(f"DISK: {missing}")
                return
            bench.ledger.put(
                "DISK", case, server,
                **{"p50 ms": counted["p50_ms"], "p99 ms": counted["p99_ms"], "max ms": counted["max_ms"],
                   "readers MB/s": moved["bytes"] / 1e6 / moved["seconds"]},
            )  # fmt: skip


# -- beside the targets ------------------------------------------------------------------------------------------------


def tls(bench: Bench) -> None:
    """Warm bodies beneath TLS, to four curl processes. Mostly encryption, on both sides, on the same cores."""
    for tool in ("curl", "openssl"):
        if shutil.which(tool) is None:
            bench.ledger.miss(f"TLS: {tool} is not installed")
            return
    folder = bench.folder / "tls"
    folder.mkdir(exist_ok=True)
    pair = (folder / "cert.pem", folder / "key.pem")
    subject = ["-subj", "/CN=localhost", "-days", "2"]
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*new, *subject, "-keyout", pair[1], "-out", pair[0]], check=True, stderr=subprocess.DEVNULL)
    image = bench.images["crowd"]
    images = list(bench.images.values())
    ours = breakwater(bench.folder / "warm-tls", bench.origin, certificate=pair)
    theirs = nginx_tls(folder / "nginx", bench.root, images, pair)
    for server in (ours, theirs):
        try:
            for path in (image.tag, image.blobs[0]):
                subprocess.run(["curl", "-sfko", "/dev/null", f"https://{server.address}{path}"], check=True)
            server.settle()
            before, began = server.cpu_s(), time.monotonic()
            url = f"https://{server.address}{image.blobs[0]}"
            clients = [subprocess.Popen(["curl", "-sfko", "/dev/null", url, "-o", "/dev/null", url]) for _ in range(4)]
            failed = sum(client.wait() != 0 for client in clients)
            seconds = time.monotonic() - began
            gigabytes = 8 * (bench.root / image.blobs[0].lstrip("/")).stat().st_size / 1e9
            if failed:
                bench.ledger.warnings.append(f"TLS, {server.name}: {failed} of 4 clients failed")
            bench.ledger.put(
                "TLS", "4 curl, 1 worker", server,
                **{"GB/s": gigabytes / seconds, "cpu-s/GB": (server.cpu_s() - before) / gigabytes,
                   "peak MiB": server.memory_mib()},
            )  # fmt: skip
        finally:
            server.stop()
    shutil.rmtree(bench.folder / "warm-tls")
    shutil.rmtree(folder)
