"""The load: clients that cost little, run as a process of their own. Prints one JSON object.

Bodies are discarded in the kernel (`recv` with MSG_TRUNC), so one process takes what a server gives. Its own CPU time
is reported: where that comes near the wall-clock time, the figure is the client's and not the server's.

    python -m bench.load blobs   HOST:PORT --path /v2/… --clients 16 --seconds 3
    python -m bench.load once    HOST:PORT --path /v2/… --clients 64
    python -m bench.load pull    HOST:PORT --path /v2/<name>/manifests/<tag> --clients 3
    python -m bench.load latency HOST:PORT --path /v2/… --seconds 3
    python -m bench.load watch   HOST:PORT --path /v2/… (like latency, until its standard input ends)
    python -m bench.load idle    HOST:PORT --clients 10000
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable

_STEP = 4 << 20
#: docker-registry refuses an OCI manifest to those who do not name its type.
ACCEPT = "application/vnd.oci.image.manifest.v1+json, */*"


class Client:
    """One keep-alive connection, discarding bodies."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.head = b""
        self.left = -1
        self.first_byte_at = 0.0
        self.n_body = 0

    def ask(self, path: str) -> None:
        """Send a request; small enough to be taken at once."""
        self.socket.send(f"GET {path} HTTP/1.1\r\nHost: bench\r\nAccept: {ACCEPT}\r\n\r\n".encode())
        self.head = b""
        self.left = -1
        self.first_byte_at = 0.0

    def take(self, scratch: bytearray) -> tuple[int, bool]:
        """Receive once: body bytes, and whether the response is complete."""
        if self.left < 0:
            got = self.socket.recv(2048)
            if not got:
                raise ConnectionError("closed before the head was complete")
            self.head += got
            head, found, rest = self.head.partition(b"\r\n\r\n")
            if not found:
                return 0, False
            status = int(head.split(b" ", 2)[1])
            if status != 200:
                raise ConnectionError(f"status {status}: {rest[:200]!r}")
            lines = head.lower().split(b"\r\n")
            length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
            self.left = length - len(rest)
            n = len(rest)
        else:
            n = self.socket.recv_into(scratch, min(self.left, _STEP), socket.MSG_TRUNC)
            if n == 0:
                raise ConnectionError(f"cut short, {self.left} bytes missing")
            self.left -= n
        if n and not self.first_byte_at:
            self.first_byte_at = time.monotonic()
        self.n_body += n
        return n, self.left == 0


def drive(clients: list[Client], next_path: Callable[[Client], str | None], until: float) -> dict[str, object]:
    """Keep every client busy until `next_path` has nothing more for any, or the time is over."""
    poll = select.epoll()
    by_fd = {}
    scratch = bytearray(_STEP)
    began = time.monotonic()
    cpu_began = time.process_time()
    n_bytes = n_responses = 0
    first_bytes: list[float] = []
    failures: list[str] = []
    for client in clients:
        path = next_path(client)
        if path is not None:
            client.ask(path)
            by_fd[client.socket.fileno()] = client
            poll.register(client.socket, select.EPOLLIN)
    ended = began
    while by_fd and (now := time.monotonic()) < until:
        for fd, _ in poll.poll(min(1.0, until - now), 256):
            client = by_fd[fd]
            try:
                n, is_complete = client.take(scratch)
            except BlockingIOError:
                continue
            except (ConnectionError, StopIteration) as error:
                failures.append(str(error))
                poll.unregister(fd)
                del by_fd[fd]
                continue
            n_bytes += n
            if not is_complete:
                continue
            n_responses += 1
            first_bytes.append(client.first_byte_at - began)
            path = next_path(client)
            if path is None:
                poll.unregister(fd)
                del by_fd[fd]
            else:
                client.ask(path)
        ended = time.monotonic()
    seconds = min(ended, until) - began
    return {
        "bytes": n_bytes,
        "responses": n_responses,
        "seconds": seconds,
        "client_cpu_s": time.process_time() - cpu_began,
        "first_byte_s": [min(first_bytes, default=0.0), max(first_bytes, default=0.0)],
        "failures": len(failures),
        "failure": failures[0] if failures else "",
    }


def read_document(address: tuple[str, int], path: str) -> bytes:
    """A small body, kept."""
    with socket.create_connection(address) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: bench\r\nAccept: {ACCEPT}\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise ConnectionError(f"{path}: {head[:100]!r} {body[:200]!r}")
    return body


def latencies(address: tuple[str, int], path: str, goes_on: Callable[[float], bool]) -> dict[str, object]:
    """One request after the other on one connection: how long each took. `goes_on` is asked with the seconds so far."""
    client = Client(address)
    client.socket.setblocking(True)
    scratch = bytearray(_STEP)
    taken: list[float] = []
    began = now = time.monotonic()
    while goes_on(now - began):
        client.ask(path)
        while not client.take(scratch)[1]:
            pass
        then, now = now, time.monotonic()
        taken.append(now - then)
    taken.sort()
    return {
        "responses": len(taken),
        "p50_ms": 1000 * taken[len(taken) // 2],
        "p99_ms": 1000 * taken[int(len(taken) * 0.99)],
        "max_ms": 1000 * taken[-1],
        "client_cpu_s": time.process_time(),
        "seconds": now - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["blobs", "once", "pull", "latency", "watch", "idle"])
    parser.add_argument("address")
    parser.add_argument("--path", action="append", default=[])
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    asked = parser.parse_args()
    host, _, port = asked.address.rpartition(":")
    address = (host, int(port))
    paths = asked.path

    if asked.what == "latency":
        print(json.dumps(latencies(address, paths[0], lambda so_far: so_far < asked.seconds)))
        return
    if asked.what == "watch":
        print("{}", flush=True)
        print(json.dumps(latencies(address, paths[0], lambda _: not select.select([sys.stdin], [], [], 0)[0])))
        return
    if asked.what == "idle":
        held = [Client(address) for _ in range(asked.clients)]
        print(json.dumps({"open": len(held)}), flush=True)
        sys.stdin.read()
        return

    began = time.monotonic()
    if asked.what == "pull":
        manifest = json.loads(read_document(address, paths[0]))
        blobs = paths[0].rpartition("/manifests/")[0] + "/blobs/"
        waiting = deque(blobs + entry["digest"] for entry in [manifest["config"], *manifest["layers"]])
        counted = drive(
            [Client(address) for _ in range(asked.clients)],
            lambda _: waiting.popleft() if waiting else None,
            began + 600,
        )
        counted["seconds"] = time.monotonic() - began
    elif asked.what == "once":
        todo = {}
        clients = [Client(address) for _ in range(asked.clients)]
        todo = {client: paths[n % len(paths)] for n, client in enumerate(clients)}
        counted = drive(clients, lambda client: todo.pop(client, None), began + 600)
    else:
        clients = [Client(address) for _ in range(asked.clients)]
        mine = {client: paths[n % len(paths)] for n, client in enumerate(clients)}
        counted = drive(clients, mine.__getitem__, time.monotonic() + asked.seconds)
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
