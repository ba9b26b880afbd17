"""The servers under measurement: started, asked what they cost, stopped. What is not installed says so."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
HOST = "127.0.0.1"


class Missing(Exception):
    """This server cannot be had here; the message says what to install."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image of random layers in the origin's folder: `name` and the path of each thing in it."""

    name: str
    manifest: str
    tag: str
    blobs: tuple[str, ...]


def make_image(root: Path, name: str, layer_sizes: list[int]) -> Image:
    """Write it below `root` as the URLs that name it."""
    base = root / "v2" / "bench" / name
    (base / "blobs").mkdir(parents=True)
    (base / "manifests").mkdir()

    def put(folder: str, content: bytes) -> dict[str, object]:
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        (base / folder / digest).write_bytes(content)
        return {"digest": digest, "size": len(content)}

    config = put("blobs", json.dumps({"architecture": "amd64", "os": "linux", "name": name}).encode())
    layers = []
    for size in layer_sizes:
        block = os.urandom(1 << 20)
        layers.append(put("blobs", (block * (size // len(block) + 1))[:size]))
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **config},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **layer} for layer in layers],
    }
    manifest = put("manifests", json.dumps(document).encode())
    shutil.copy(base / "manifests" / str(manifest["digest"]), base / "manifests" / "latest")
    path = f"/v2/bench/{name}"
    return Image(
        name,
        f"{path}/manifests/{manifest['digest']}",
        f"{path}/manifests/latest",
        tuple(f"{path}/blobs/{layer['digest']}" for layer in layers),
    )


@dataclass(slots=True)
class Server:
    """A running server. CPU seconds and memory are those of its whole process tree."""

    name: str
    settings: str
    port: int
    process: subprocess.Popen[bytes]
    folder: Path
    #: Of ours alone.
    admin_port: int = 0

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def cpu_s(self) -> float:
        """CPU seconds used so far."""
        ticks = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_mib(self, what: str = "VmHWM") -> float:
        """Peak (VmHWM) or present (VmRSS) resident memory."""
        total = 0
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(what + ":"):
                    total += int(line.split()[1])
        return total / 1024

    def forget_peak(self) -> None:
        """Start the peak anew."""
        for pid in self.pids():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def settle(self) -> None:
        """Return when it has stopped working: commits, background writes."""
        before = -1.0
        for _ in range(100):
            now = self.cpu_s()
            if now - before < 0.02:
                return
            before = now
            time.sleep(0.3)

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def pids(self) -> list[int]:
        """It, and what it has started."""
        found, waiting = [], [self.process.pid]
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found


def _launch(name: str, settings: str, port: int, folder: Path, command: list[str], install: str) -> Server:
    if shutil.which(command[0]) is None:
        raise Missing(f"{command[0]} is not installed ({install})")
    log = (folder / "log").open("ab")
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    log.close()
    server = Server(name, settings, port, process, folder)
    give_up_at = time.monotonic() + 60
    while time.monotonic() < give_up_at and process.poll() is None:
        try:
            socket.create_connection((HOST, port)).close()
            return server
        except OSError:
            time.sleep(0.02)
    if process.poll() is None:
        server.stop()
    raise Missing(f"{name} did not start: {(folder / 'log').read_text(errors='replace')[-400:]}")


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


_NGINX = """daemon off; pid {folder}/pid; error_log {folder}/error.log warn; worker_processes {workers};
worker_rlimit_nofile 16000;
events {{ worker_connections 15000; }}
http {{
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  sendfile on; tcp_nopush on; keepalive_requests 1000000000; open_file_cache max=1000;
  {http}
  server {{ listen {host}:{port} backlog=4096 {ssl}; {server} }}
}}
"""
_REGISTRY_LOCATIONS = """
  root {root}; default_type application/octet-stream;
  add_header Docker-Distribution-API-Version registry/2.0;
  location = /v2/ {{ default_type application/json; return 200 "{{}}"; }}
  location ~ /blobs/(sha256:[0-9a-f]+)$ {{ add_header Docker-Content-Digest $1; }}
  location ~ /manifests/(sha256:[0-9a-f]+)$ {{ default_type {type}; add_header Docker-Content-Digest $1; }}
  location ~ /manifests/latest$ {{ default_type {type}; add_header Docker-Content-Digest $latest; }}
"""


def _nginx(name: str, settings: str, folder: Path, *, workers: str, http: str, server: str, ssl: str = "") -> Server:
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    text = _NGINX.format(folder=folder, workers=workers, host=HOST, port=port, http=http, server=server, ssl=ssl)
    (folder / "nginx.conf").write_text(text)
    return _launch(name, settings, port, folder, ["nginx", "-c", str(folder / "nginx.conf")], "apt: nginx-light")


def _files(root: Path, images: list[Image]) -> tuple[str, str]:
    tags = "".join(f'"{image.tag}" "{image.manifest.rpartition("/")[2]}"; ' for image in images)
    return f"map $uri $latest {{ {tags} }}", _REGISTRY_LOCATIONS.format(root=root, type=MANIFEST_TYPE)


def nginx_static(folder: Path, root: Path, images: list[Image]) -> Server:
    """The ceiling: the same files, one worker process, as we are one."""
    http, server = _files(root, images)
    settings = "static files, 1 worker, sendfile, no access log"
    return _nginx("nginx static", settings, folder, workers="1", http="access_log off; " + http, server=server)


def nginx_tls(folder: Path, root: Path, images: list[Image], certificate: tuple[Path, Path]) -> Server:
    """The same beneath TLS."""
    http, server = _files(root, images)
    pair = f"ssl_certificate {certificate[0]}; ssl_certificate_key {certificate[1]};"
    return _nginx(
        "nginx static", "TLS, 1 worker", folder, workers="1", http="access_log off; " + http + pair, server=server,
        ssl="ssl",
    )  # fmt: skip


def origin(folder: Path, root: Path, images: list[Image]) -> Server:
    """The upstream of all the others, which writes down every request."""
    http, server = _files(root, images)
    log = f'log_format asked "$request_method $uri"; access_log {folder}/asked asked;'
    return _nginx("origin", "the upstream", folder, workers="1", http=log + http, server=server)


def n_asked(origin_server: Server, path: str) -> int:
    """How often the upstream was asked to GET `path` since it started."""
    return (origin_server.folder / "asked").read_text().splitlines().count(f"GET {path}")


def nginx_cache(folder: Path, upstream: Server) -> Server:
    """proxy_cache with the lock set so that it coalesces: one fetch, everybody else waits for it."""
    http = (
        f"access_log off; proxy_cache_path {folder}/cache keys_zone=bodies:10m max_size=20g use_temp_path=off;"
        f"upstream origin {{ server {upstream.address}; keepalive 8; }}"
    )
    server = (
        "location / { proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection ''; "
        "proxy_cache bodies; proxy_cache_key $uri; proxy_cache_valid 200 1h; proxy_cache_lock on; "
        "proxy_cache_lock_timeout 1h; proxy_cache_lock_age 1h; proxy_max_temp_file_size 0; }"
    )
    settings = "proxy_cache, lock on (1 h), all cores, no hashing, no fsync"
    return _nginx("nginx proxy_cache", settings, folder, workers="auto", http=http, server=server)


def docker_registry(folder: Path, upstream: Server) -> Server:
    """docker-registry 2.8 as a pull-through cache."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/store}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '{HOST}:{port}'}}\nproxy: {{remoteurl: 'http://{upstream.address}'}}\n"
    )
    command = ["docker-registry", "serve", str(folder / "config.yml")]
    return _launch("docker-registry", "pull-through, file system", port, folder, command, "apt: docker-registry")


def distribution(folder: Path, upstream: Server) -> Server:
    """distribution v3, where a binary called `registry` is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/store}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '{HOST}:{port}'}}\nproxy: {{remoteurl: 'http://{upstream.address}'}}\n"
    )
    command = ["registry", "serve", str(folder / "config.yml")]
    return _launch("distribution v3", "pull-through, file system", port, folder, command, "no Debian package; binary")


#: A robot of the bench: its name and secret, and what the settings say of it.
ROBOT = ("bench", "bw_bench")
_HASH = "$scrypt$ln=14,r=8,p=1$YmVuY2gtc2FsdC0xNi1ieQ$Xg+99AKrYMqDk0pu2xa3HvTcUe/cDGCbhboLllh0gY0"
RULED = "breakwater, 500 rules"
UNLOGGED = "breakwater, log of errors"


def ruled(folder: Path, upstream: Server) -> Server:
    """Ours with 500 rules and robots: every manifest is for a robot, and shown a token for."""
    allow = [f"bench.example/bench/app{n}:v*" for n in range(250)] + ["bench.example/bench/**"]
    deny = [f"**:bad{n}" for n in range(250)]
    more = f"""
[projects.ruled]
match = ["bench.example/**"]
allow = {allow!r}
deny = {deny!r}
access = ["{ROBOT[0]}"]
quota = "10GiB"
[robots.{ROBOT[0]}]
secret_hash = '{_HASH}'
projects = ["ruled"]
"""
    return breakwater(folder, upstream, name=RULED, projects=more)


def unlogged(folder: Path, upstream: Server) -> Server:
    """Ours, with `request_log = "errors"`."""
    return breakwater(folder, upstream, name=UNLOGGED, request_log="errors")


_PROJECTS = """
[projects.bench]
match = ["bench.example/**"]
allow = ["bench.example/bench/**"]
"""


def breakwater(
    folder: Path,
    upstream: Server,
    *,
    certificate: tuple[Path, Path] | None = None,
    name: str = "breakwater",
    projects: str = _PROJECTS,
    capacity: str = "20GiB",
    request_log: str = "all",
) -> Server:
    """Ours, with rules and the request log on."""
    folder.mkdir(parents=True, exist_ok=True)
    port, admin = free_port(), free_port()
    tls = f'tls = {{ cert = "{certificate[0]}", key = "{certificate[1]}" }}' if certificate else ""
    (folder / "breakwater.toml").write_text(
        f"""
[server]
listen = "{HOST}:{port}"
admin_listen = "{HOST}:{admin}"
default_upstream = "bench.example"
request_log = "{request_log}"
{tls}
[log]
format = "json"
[store]
path = "{folder}/store"
capacity = "{capacity}"
min_free = "1%"
[upstreams."bench.example"]
url = "http://{upstream.address}"
tag_ttl = "1h"
{projects}
[policy]
deny = ["sha256:{"0" * 64}"]
"""
    )
    command = [sys.executable, "-m", "proxy", "serve", "--config", str(folder / "breakwater.toml")]
    logged = "on" if request_log == "all" else f"of {request_log} alone"
    settings = f"rules on, request log {logged}, every byte hashed and synced"
    environment_root = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = environment_root
    server = _launch(name, settings, port, folder, command, "this repository")
    server.admin_port = admin
    return server


#: In the order of the table. Each starts with an empty cache.
CACHES: dict[str, Callable[[Path, Server], Server]] = {
    "breakwater": breakwater,
    "docker-registry": docker_registry,
    "distribution v3": distribution,
    "nginx proxy_cache": nginx_cache,
}
