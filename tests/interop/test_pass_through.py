"""Real clients log in with their accounts at a real registry, through Breakwater: upstream decides for each of them.

The origin is a docker-registry with an htpasswd file: alice, bob and carol may read everything, nobody else anything.
"""

from __future__ import annotations

import concurrent.futures
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from tests.support.clients import NOWHERE, TEST_HOST, Containerd, Docker, Podman, Skopeo
from tests.support.images import MIB, Image, image
from tests.support.origin import Origin
from tests.support.process import CommandFailed, Guarded, eventually, to_toml

#: Name -> secret. Their hashes are what `htpasswd -B` writes.
SECRETS = {"alice": "hers-7f3a", "bob": "his-91cc", "carol": "carols-52de"}
HTPASSWD = """\
alice:$2y$05$abcdefghijklmnopqrstuuEVOueLIOiwsv2GJpOtwt8ynNSq6XHT.
bob:$2y$05$abcdefghijklmnopqrstuu2muQZ.ebo1xCKCdOulMF92bGi9vwazC
carol:$2y$05$abcdefghijklmnopqrstuupEJT8P/N9g7R2PiAIigRTCQvOoAIhsm
"""
#: What a layer that is watched on its way has, and how fast it comes.
SLOW_BYTES, SLOW_RATE = 12 * MIB, "3MiB/s"
#: What clients print: those without a name are asked for one, those with a wrong one are refused.
ASKED = r"unauthorized|authentication required"
REFUSED = r"denied"

_SEED = count(12_000)


@dataclass(frozen=True, slots=True)
class Place:
    """A registry with accounts, a Breakwater that passes logins on to it, and what is in the registry."""

    origin: Origin
    breakwater: Guarded
    images: dict[str, Image]

    def n_blob_gets(self, name: str) -> int:
        """How many blobs of a repository the origin has handed out."""
        gets = [one for one in self.origin.requests() if one.method == "GET" and one.status == 200]
        return sum(f"/{name}/blobs/" in one.target for one in gets)


@pytest.fixture(scope="module")
def place(scratch: Path) -> Iterator[Place]:
    """The images are pushed before the registry knows any accounts."""
    names = ("skopeo", "podman", "docker", "containerd", "flight", "down")
    images = {name: image(next(_SEED), (SLOW_BYTES if name == "flight" else 50_000, 3000)) for name in names}
    with Origin(scratch / "origin") as origin:
        for name, wanted in images.items():
            origin.push(f"library/{name}", "1", wanted)
    (scratch / "htpasswd").write_text(HTPASSWD)
    auth = {"htpasswd": {"realm": "origin", "path": str(scratch / "htpasswd")}}
    with Origin(scratch / "origin", auth=auth) as origin:
        one = {"url": origin.url, "pass_through": True, "bandwidth": SLOW_RATE}
        settings = {"server": {"default_upstream": "docker.io"}, "upstreams": {"docker.io": one, TEST_HOST: one}}
        with Guarded(scratch / "breakwater", settings) as running:
            yield Place(origin, running, images)
            running.stop_cleanly()


def pulled(place: Place, folder: Path, who: str, repository: str, secret: str = "") -> str:
    """What skopeo pulls, logged in as somebody or as nobody."""
    with Skopeo(folder, place.breakwater.address) as client:
        if who:
            client.login(who, secret or SECRETS[who])
        return client.pull(repository, "1")


def test_skopeo(place: Place, scratch: Path) -> None:
    """Cold and warm: alice and bob read, nobody is asked to log in, a wrong secret is told at the pull."""
    wanted = place.images["skopeo"].digest
    for n, state in enumerate(("cold", "warm")):
        with pytest.raises(CommandFailed, match=ASKED):
            pulled(place, scratch / f"sk-nobody{n}", "", "library/skopeo")
        with pytest.raises(CommandFailed, match=REFUSED):
            pulled(place, scratch / f"sk-wrong{n}", "alice", "library/skopeo", "guessed")
        assert pulled(place, scratch / f"sk-alice{n}", "alice", "library/skopeo") == wanted, state
        assert pulled(place, scratch / f"sk-bob{n}", "bob", "library/skopeo") == wanted, state
    assert place.n_blob_gets("library/skopeo") == len(place.images["skopeo"].all_blobs()), "fetched once for all"


def test_podman(place: Place, scratch: Path) -> None:
    """podman login, then pull by Breakwater's name."""
    at = place.breakwater.address
    with Podman(scratch / "podman", at) as client:
        with pytest.raises(CommandFailed, match=ASKED):
            client.pull_at(at, f"{TEST_HOST}/library/podman", "1")
        client.login(at, "alice", "guessed")
        with pytest.raises(CommandFailed, match=REFUSED):
            client.pull_at(at, f"{TEST_HOST}/library/podman", "1")
        client.login(at, "alice", SECRETS["alice"])
        assert client.pull_at(at, f"{TEST_HOST}/library/podman", "1") == place.images["podman"].digest


def test_docker(place: Place, scratch: Path) -> None:
    """docker login, then pull by Breakwater's name."""
    at = place.breakwater.address
    with Docker(scratch / "docker", at) as client:
        with pytest.raises(CommandFailed, match=rf"{ASKED}|no basic auth"):
            client.pull_at(at, f"{TEST_HOST}/library/docker", "1")
        client.login(at, "alice", "guessed")
        with pytest.raises(CommandFailed, match=REFUSED):
            client.pull_at(at, f"{TEST_HOST}/library/docker", "1")
        client.login(at, "alice", SECRETS["alice"])
        assert client.pull_at(at, f"{TEST_HOST}/library/docker", "1") == place.images["docker"].digest


def test_containerd_with_pull_secrets(place: Place, scratch: Path) -> None:
    """As a kubelet shows a pod's pull secret to the mirror: that is what it is for here. Cold and warm."""
    host = {f"http://{place.breakwater.address}": {"capabilities": ["pull", "resolve"]}}
    setup = to_toml({"server": f"http://{NOWHERE}", "host": host})
    with Containerd(scratch / "ctd", place.breakwater.address, setup) as client:
        for _ in ("cold", "warm"):
            for stranger in ("", "alice:guessed", "eve:hers-7f3a"):
                client.user = stranger
                with pytest.raises(CommandFailed, match=r"401 Unauthorized|403 Forbidden|denied|unauthorized"):
                    client.pull("library/containerd", "1")
                client.reset()
            for name in ("alice", "bob"):
                client.user = f"{name}:{SECRETS[name]}"
                assert client.pull("library/containerd", "1") == place.images["containerd"].digest
                client.reset()


def test_in_flight(place: Place, scratch: Path) -> None:
    """While alice's pull is on its way: bob joins it, nobody and eve do not; the origin hands it out once."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        first = threads.submit(pulled, place, scratch / "fl-alice", "alice", "library/flight")

        def is_on_its_way() -> bool:
            running = place.breakwater.admin("/api/v1/status")["transfers"]
            return any(one["size_bytes"] is not None and one["size_bytes"] > SLOW_BYTES // 2 for one in running)

        eventually(is_on_its_way, "the layer is on its way")
        joined = threads.submit(pulled, place, scratch / "fl-bob", "bob", "library/flight")
        with pytest.raises(CommandFailed, match=ASKED):
            pulled(place, scratch / "fl-nobody", "", "library/flight")
        with pytest.raises(CommandFailed, match=REFUSED):
            pulled(place, scratch / "fl-eve", "bob", "library/flight", "guessed")
        assert is_on_its_way(), "they were refused while it ran"
        assert first.result() == joined.result() == place.images["flight"].digest
    assert place.n_blob_gets("library/flight") == len(place.images["flight"].all_blobs())


def test_upstream_down(place: Place, scratch: Path) -> None:
    """Who was let in reads on for the time that the settings give, and no longer; nobody else gets in meanwhile."""
    wanted = place.images["down"].digest
    one = {"url": place.origin.url, "pass_through": True, "pass_through_ttl": "6s", "tag_ttl": "1h"}
    with Guarded(scratch / "short", {"upstreams": {TEST_HOST: one}}) as running:
        short = Place(place.origin, running, place.images)
        assert pulled(short, scratch / "down-alice", "alice", "library/down") == wanted
        eventually(lambda: _is_decided_anew(short, scratch), "a fresh decision to measure by")
        place.origin.stop()
        try:
            assert pulled(short, scratch / "down-again", "alice", "library/down") == wanted
            with pytest.raises(CommandFailed, match=r"502|Bad Gateway|does not answer|unavailable|refused"):
                pulled(short, scratch / "down-carol", "carol", "library/down")

            def is_over() -> bool:
                try:
                    pulled(short, scratch / f"down-{next(_SEED)}", "alice", "library/down")
                except CommandFailed:
                    return True
                return False

            eventually(is_over, "what was decided is forgotten")
        finally:
            place.origin.start()
        eventually(lambda: not is_over(), "the origin decides again")
        running.stop_cleanly()


def _is_decided_anew(place: Place, scratch: Path) -> bool:
    """Whether this very pull asked the origin about alice, so that the whole time is ahead."""
    n_before = len(place.origin.requests())
    pulled(place, scratch / f"anew-{next(_SEED)}", "alice", "library/down")
    return len(place.origin.requests()) > n_before


def test_no_login_is_written_anywhere(place: Place) -> None:
    """INV-7: neither log, audit, metrics, status nor any file of the store names one; who asked is told by a mark."""
    told = (
        place.breakwater.log() + str(place.breakwater.admin("/metrics")) + str(place.breakwater.admin("/api/v1/status"))
    )
    for word in (*SECRETS, *SECRETS.values(), "guessed"):
        assert word not in told
    for path in place.breakwater.store.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        # Three letters are in any image; what was written about one says where it may be looked for.
        words = SECRETS.values() if "blobs" in path.parts else (*SECRETS, *SECRETS.values())
        assert not [word for word in words if word.encode() in content], path
    assert re.search(r'"caller": "login:[0-9a-f]{12}"', told)
