"""What `breakwater hosts-toml` prints is put where it says, as it stands, and the client then pulls through Breakwater.

CRI-O is represented by podman: both read registries.conf through the same library.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.support.clients import TEST_HOST, Client, Containerd, Docker, Podman
from tests.support.images import image
from tests.support.origin import Origin
from tests.support.process import Breakwater, run

_SEED = count(4000)

#: client as the command names it, the driver that stands for it, and the file that it says to write.
CLIENTS: dict[str, tuple[Callable[[Path, str, str], Client], str]] = {
    "containerd": (Containerd, f"/etc/containerd/certs.d/{TEST_HOST}/hosts.toml"),
    "podman": (Podman, "/etc/containers/registries.conf.d/50-breakwater.conf"),
    "crio": (Podman, "/etc/containers/registries.conf.d/50-breakwater.conf"),
}


def printed(breakwater: Breakwater, *arguments: str) -> str:
    """What `breakwater hosts-toml` prints for a running Breakwater."""
    return run([sys.executable, "-m", "proxy", "hosts-toml", "--config", str(breakwater.settings_path), *arguments])


def files_in(text: str) -> dict[str, str]:
    """The files in a text that announces each by a comment with its path. The comment stays a part of the file."""
    starts = list(re.finditer(r"^# (/\S+)$", text, re.MULTILINE))
    ends = [*(start.start() for start in starts[1:]), len(text)]
    return {start[1]: text[start.start() : end] for start, end in zip(starts, ends, strict=True)}


@pytest.mark.parametrize("how", [(), ("--enforce",)], ids=["mirror", "the only host"])
@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_set_up_as_printed_pulls_through_breakwater(
    scratch: Path, origin: Origin, breakwater: Breakwater, name: str, how: tuple[str, ...]
) -> None:
    """The printed file works as it stands: an image of a source host that resolves nowhere is pulled."""
    make, path = CLIENTS[name]
    setup = files_in(printed(breakwater, "--client", name, *how, TEST_HOST))[path]
    repository = f"team/setup-{next(_SEED)}"
    pushed = origin.push(repository, "1", image(next(_SEED), (1000, 2000)))
    with make(scratch / f"{name}-{next(_SEED)}", breakwater.address, setup) as client:
        assert client.pull(repository, "1") == pushed.digest


def test_docker_set_up_as_printed_pulls_through_breakwater(
    scratch: Path, origin: Origin, breakwater: Breakwater
) -> None:
    """daemon.json as printed is a whole file, and its mirror is asked at the root."""
    setup = printed(breakwater, "--client", "docker")
    assert list(json.loads(setup)) == ["registry-mirrors"]
    pushed = origin.push("library/setup", "1", image(next(_SEED), (1000, 2000)))
    with Docker(scratch / "docker", breakwater.address, setup) as client:
        assert client.pull("library/setup", "1") == pushed.digest
