"""Real clients log in as robots, and pull what they may; the message each prints when they may not.

The project `private` belongs to robot ci. Everything else is for everybody.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import upstreams_at
from tests.support.clients import NOWHERE, TEST_HOST, Containerd, Docker, Podman, Skopeo
from tests.support.images import Image, image
from tests.support.origin import Origin
from tests.support.process import CommandFailed, Guarded, to_toml

_SEED = count(7000)


@dataclass(frozen=True, slots=True)
class Door:
    """What runs, and the secret that opens it."""

    breakwater: Guarded
    secret: str
    origin: Origin

    def push(self, repository: str) -> Image:
        """A new image in a repository."""
        return self.origin.push(repository, "1", image(next(_SEED), (50_000, 3000)))


def robot(config: Path, *arguments: str) -> dict[str, Any]:
    """`breakwater robot create`."""
    command = [sys.executable, "-m", "proxy", "robot", "create", "--json", "--config", str(config), *arguments]
    done = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL)
    made: dict[str, Any] = json.loads(done.stdout)
    return made


@pytest.fixture(scope="module")
def door(scratch: Path, origin: Origin) -> Iterator[Door]:
    """A running Breakwater whose robot was made by the command that operators use."""
    project = {"path": "private", "upstream": TEST_HOST, "match": [f"{TEST_HOST}/private/**", "docker.io/private/**"]}
    settings = upstreams_at(origin.url) | {"projects": {"private": project}}
    config = scratch / "before.toml"
    config.write_text(to_toml(settings))
    made = robot(config, "ci", "--project", "private")
    other = robot(config, "other", "--project", "private")
    settings["projects"] = {"private": {**project, "access": ["ci"]}}
    settings["robots"] = {
        "ci": {"secret_hash": made["secret_hash"], "projects": ["private"]},
        "other": {"secret_hash": other["secret_hash"], "projects": ["private"]},
    }
    with Guarded(scratch / "breakwater", settings) as running:
        yield Door(running, made["secret"], origin)
        running.stop_cleanly()


def test_skopeo_logs_in_and_pulls(door: Door, scratch: Path) -> None:
    """skopeo login, then copy; without it, and with a wrong secret, it is told."""
    wanted = door.push("private/skopeo")
    with Skopeo(scratch / "skopeo", door.breakwater.address) as client:
        with pytest.raises(CommandFailed, match=r"unauthorized|authentication required"):
            client.pull("private/skopeo", "1")
        client.reset()
        with pytest.raises(CommandFailed, match=r"invalid username/password|unauthorized"):
            client.login("ci", "bw_wrong")
        client.login("ci", door.secret)
        assert client.pull("private/skopeo", "1") == wanted.digest
        public = door.push("library/skopeo")
        assert client.pull("library/skopeo", "1") == public.digest


def test_anonymous_skopeo_still_pulls_what_is_for_everybody(door: Door, scratch: Path) -> None:
    """It pings /v2/ first, is challenged, and gets an anonymous token."""
    public = door.push("library/anonymous")
    with Skopeo(scratch / "skopeo-anonymous", door.breakwater.address) as client:
        assert client.pull("library/anonymous", "1") == public.digest


def test_podman_logs_in_and_pulls(door: Door, scratch: Path) -> None:
    """podman login, then pull by path; its mirrors are asked without credentials."""
    wanted, public = door.push("private/podman"), door.push("library/podman")
    at = door.breakwater.address
    with Podman(scratch / "podman", at) as client:
        with pytest.raises(CommandFailed, match=r"unauthorized|authentication required"):
            client.pull_at(at, f"{TEST_HOST}/private/podman", "1")
        with pytest.raises(CommandFailed, match=r"invalid username/password|unauthorized"):
            client.login(at, "ci", "bw_wrong")
        client.login(at, "ci", door.secret)
        assert client.pull_at(at, f"{TEST_HOST}/private/podman", "1") == wanted.digest
        assert client.pull_at(at, "private/private/podman", "1") == wanted.digest
        assert client.pull("library/podman", "1") == public.digest


def test_docker_logs_in_and_pulls(door: Door, scratch: Path) -> None:
    """docker login at Breakwater, then pull from it by name; its registry mirror is asked without a name."""
    wanted, public = door.push("private/docker"), door.push("library/docker")
    at = door.breakwater.address
    with Docker(scratch / "docker", at) as client:
        with pytest.raises(CommandFailed, match=r"unauthorized|no basic auth|access denied|denied"):
            client.pull_at(at, f"{TEST_HOST}/private/docker", "1")
        with pytest.raises(CommandFailed, match=r"unauthorized|no robot has this name and secret"):
            client.login(at, "ci", "bw_wrong")
        client.login(at, "ci", door.secret)
        assert client.pull_at(at, f"{TEST_HOST}/private/docker", "1") == wanted.digest
        assert client.pull("library/docker", "1") == public.digest


def hosts_toml(mirror: str, header: str = "") -> str:
    """hosts.toml with Breakwater as the only way, and a header where it is given."""
    host: dict[str, Any] = {"capabilities": ["pull", "resolve"]}
    if header:
        host["header"] = {"Authorization": header}
    return to_toml({"server": f"http://{NOWHERE}", "host": {f"http://{mirror}": host}})


def test_containerd_shows_a_header_from_hosts_toml(door: Door, scratch: Path) -> None:
    """The node's own account, for all that it pulls."""
    wanted, public = door.push("private/header"), door.push("library/header")
    header = "Basic " + base64.b64encode(f"ci:{door.secret}".encode()).decode()
    setup = hosts_toml(door.breakwater.address, header)
    with Containerd(scratch / "ctd-header", door.breakwater.address, setup) as client:
        assert client.pull("private/header", "1") == wanted.digest
        assert client.pull("library/header", "1") == public.digest


def test_containerd_shows_pull_credentials(door: Door, scratch: Path) -> None:
    """A pod's pull secret, over the token flow; somebody else's secret opens nothing, and closes nothing either."""
    wanted, public = door.push("private/secret"), door.push("library/secret")
    with Containerd(scratch / "ctd-secret", door.breakwater.address, hosts_toml(door.breakwater.address)) as client:
        for stranger in ("", "alice:her-password-at-the-upstream", "ci:bw_wrong"):
            client.user = stranger
            with pytest.raises(CommandFailed):
                client.pull("private/secret", "1")
            assert client.pull("library/secret", "1") == public.digest
            client.reset()
        client.user = f"ci:{door.secret}"
        assert client.pull("private/secret", "1") == wanted.digest
        assert client.pull("library/secret", "1") == public.digest


def test_no_secret_reached_the_origin_or_the_log(door: Door) -> None:
    """INV-7: what clients showed was for us, and is written nowhere."""
    store = door.breakwater.store / "breakwater" / "audit" / "audit.jsonl"
    assert door.secret not in door.breakwater.log()
    assert '"event": "denied"' in store.read_text() and door.secret not in store.read_text()
