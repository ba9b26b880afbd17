"""A mirror that has too much to do must not be why a node cannot pull: real clients, told 503, ask somebody else."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import upstreams_at
from tests.support.clients import TEST_HOST, Client, Containerd, Docker, Podman
from tests.support.crowd import Visit, visit_all
from tests.support.images import MIB, Blob, image, manifest
from tests.support.origin import Origin
from tests.support.process import Breakwater, eventually, to_toml
from tests.support.relay import Relay

_SEED = count(47_000)


def _containerd(scratch: Path, mirror: str, beyond: str) -> Client:
    """What `hosts-toml` prints without --enforce: the mirror, and the registry itself when that one fails."""
    hosts = {"server": f"http://{beyond}", "host": {f"http://{mirror}": {"capabilities": ["pull", "resolve"]}}}
    return Containerd(scratch, mirror, to_toml(hosts))


def _docker(scratch: Path, mirror: str, beyond: str) -> Client:
    """The registry itself would be Docker Hub, which is not to be had here: another mirror stands for it."""
    return Docker(scratch, mirror, json.dumps({"registry-mirrors": [f"http://{mirror}", f"http://{beyond}"]}))


def _podman(scratch: Path, mirror: str, beyond: str) -> Client:
    """A mirror, and the location when that one fails."""
    ours = (
        f'[[registry]]\nprefix = "{TEST_HOST}"\nlocation = "{beyond}"\ninsecure = true\n\n'
        f'[[registry.mirror]]\nlocation = "{mirror}/{TEST_HOST}"\ninsecure = true\n'
    )
    return Podman(scratch, mirror, ours)


@contextmanager
def _full(scratch: Path, origin: Origin) -> Iterator[Breakwater]:
    """A Breakwater with as many connections as it takes."""
    settings = upstreams_at(origin.url)
    settings["server"]["max_connections"] = 4
    with Breakwater(scratch, settings) as breakwater, ExitStack() as held:
        for _ in range(4):
            held.enter_context(socket.create_connection(("127.0.0.1", breakwater.port)))
        eventually(lambda: breakwater.status()["connections"] >= 4, "its connections are taken")
        yield breakwater
        held.close()
        breakwater.stop_cleanly()


@pytest.mark.parametrize("client", [_containerd, _docker, _podman], ids=["containerd", "docker", "podman"])
def test_a_client_that_is_told_503_for_want_of_connections_goes_on_to_the_next(
    scratch: Path, origin: Origin, client: Callable[[Path, str, str], Client]
) -> None:
    """peers.md §5: on 5xx clients fail over; on 429 containerd would hammer the same mirror."""
    number = next(_SEED)
    name = f"library/failover-{number}"
    wanted = origin.push(name, "1", image(number, (100_000, 1 * MIB)))
    with (
        _full(scratch / f"full-{number}", origin) as full,
        client(scratch / f"client-{number}", full.address, origin.url.removeprefix("http://")) as pulling,
    ):
        assert pulling.pull(name, "1") == wanted.digest
        assert "more than 4 connections: refusing" in full.log(), "the client never asked the mirror that is full"
        n_refused = full.status()["refused_connections"]
        assert n_refused > 0
        assert f"breakwater_connections_refused_total {float(n_refused)}" in full.admin("/metrics")
        assert full.status()["requests"]["hit"] + full.status()["requests"]["miss"] == 0


def test_containerd_that_is_told_503_for_want_of_transfers_goes_on_with_the_layer_elsewhere(
    scratch: Path, origin: Origin
) -> None:
    """`transfers.max_concurrent`: the manifest comes from the mirror, and the layer that it has no turn for, once the
    queue's deadline has passed, from the next host. Fail-over is for each request, not for a whole pull."""
    number = next(_SEED)
    occupied = Blob(bytes([number % 251]) * 2 * MIB)
    repository = f"library/turns-{number}"
    origin.push(repository, "occupied", manifest(Blob(b"{}"), [occupied]))
    pushed = origin.push(repository, "1", image(number, (300_000,)))
    with (
        Relay(origin.port, hold_back=MIB, holds=lambda seen: occupied.digest in seen) as relay,
        Breakwater(scratch / f"turns-{number}", _one_at_a_time(relay.url)) as busy,
    ):
        base = f"/v2/{TEST_HOST}/{repository}"
        visit_all(busy.port, [Visit(f"{base}/manifests/occupied")])
        # Held back in the middle, it has the only turn there is until it is released.
        holding, pulled = [Visit(f"{base}/blobs/{occupied.digest}")], list[str]()

        def pull_meanwhile() -> None:
            if not holding[0].n_bytes or pulled:
                return
            beyond = origin.url.removeprefix("http://")
            with _containerd(scratch / f"client-{number}", busy.address, beyond) as containerd:
                pulled.append(containerd.pull(repository, "1"))
            relay.release()

        visit_all(busy.port, holding, after_each_round=pull_meanwhile)
        assert pulled == [pushed.digest]
        lines = [json.loads(line) for line in busy.log().splitlines() if line.startswith("{")]
        refused = [line["path"] for line in lines if line.get("status") == 503]
        assert refused and all("/blobs/" in path for path in refused)
        busy.stop_cleanly()


def _one_at_a_time(url: str) -> dict[str, Any]:
    settings = upstreams_at(url)
    settings["transfers"] = {"max_concurrent": 1, "max_per_upstream": 1, "queue_deadline": "1s"}
    return settings
