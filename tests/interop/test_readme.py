"""What README tells people to do is done as it is written there.

Two things are put in place of others: the address, because port 5000 may be taken, and paths outside the scratch
folder. The source host of its examples is an upstream of the Breakwater under test, which leads to the test's registry.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.interop.conftest import upstreams_at
from tests.support.clients import NO_WAY_OUT, Containerd, Docker, Podman
from tests.support.images import Image, multi_arch
from tests.support.origin import Origin
from tests.support.process import Breakwater, run

README = Path(__file__).parents[2] / "README.md"
#: The source host, repository and tag of the examples.
HOST, REPOSITORY, TAG = "quay.io", "prometheus/busybox", "latest"


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: the headings it stands under, outermost first, its language, and what it says."""

    headings: tuple[str, ...]
    language: str
    text: str


def blocks(markdown: str) -> Iterator[Block]:
    """Every fenced block of a document."""
    headings: list[str] = []
    language = ""
    lines: list[str] | None = None
    for line in markdown.splitlines():
        if line.startswith("```"):
            if lines is None:
                language, lines = line.removeprefix("```"), []
            else:
                yield Block(tuple(headings), language, "\n".join(lines) + "\n")
                lines = None
        elif lines is not None:
            lines.append(line)
        elif line.startswith("#"):
            marks, _, title = line.partition(" ")
            headings[len(marks) - 1 :] = [title]


def block_of(*, heading: str, language: str) -> str:
    """The only block of this language under a heading of this name. Its absence is a failure: README has lost it."""
    found = [b.text for b in blocks(README.read_text()) if b.headings[-1] == heading and b.language == language]
    assert len(found) == 1, f"README has {len(found)} {language} blocks under {heading!r}"
    return found[0]


@pytest.fixture(scope="module")
def pushed(origin: Origin) -> Image:
    """The image of README's examples."""
    return origin.push(REPOSITORY, TAG, multi_arch(5000))


@pytest.fixture(scope="module")
def breakwater(scratch: Path, origin: Origin) -> Iterator[Breakwater]:
    """A Breakwater to which the examples' source host is one of its upstreams."""
    settings = upstreams_at(origin.url)
    settings["upstreams"][HOST] = {"url": origin.url}
    with Breakwater(scratch / "breakwater", settings) as running:
        yield running
        running.stop_cleanly()


def at(breakwater: Breakwater, text: str) -> str:
    """`text` with the address of the running Breakwater in place of README's."""
    replaced = text.replace("localhost:5000", breakwater.address).replace("127.0.0.1:5000", breakwater.address)
    assert breakwater.address in replaced, "README does not say where to point the client"
    return replaced


def test_containerd_set_up_as_in_readme_pulls(scratch: Path, breakwater: Breakwater, pushed: Image) -> None:
    """README, "containerd": its hosts.toml, as it stands."""
    setup = at(breakwater, block_of(heading="containerd", language="toml"))
    with Containerd(scratch / "containerd", breakwater.address, setup, host=HOST) as client:
        assert client.pull(REPOSITORY, TAG) == pushed.digest


def test_podman_set_up_as_in_readme_pulls(scratch: Path, breakwater: Breakwater, pushed: Image) -> None:
    """README, "CRI-O and podman": its registries.conf, as it stands; CRI-O reads it through the same library."""
    setup = at(breakwater, block_of(heading="CRI-O and podman", language="toml"))
    with Podman(scratch / "podman", breakwater.address, setup, host=HOST) as client:
        assert client.pull(REPOSITORY, TAG) == pushed.digest


def test_docker_set_up_as_in_readme_pulls(scratch: Path, origin: Origin, breakwater: Breakwater, pushed: Image) -> None:
    """README, "Docker": its daemon.json for Docker Hub's images, and its `docker pull` by path for others."""
    hub = origin.push("library/readme", "1", multi_arch(5001))
    with Docker(
        scratch / "docker", breakwater.address, at(breakwater, block_of(heading="Docker", language="json"))
    ) as client:
        assert client.pull("library/readme", "1") == hub.digest
        by_path = f"127.0.0.1:5000/{HOST}/{REPOSITORY}:{TAG}"
        assert f"docker pull {by_path}" in README.read_text()
        assert client.pull_as_written(at(breakwater, by_path)) == pushed.digest


def test_quick_start_of_readme_pulls_with_skopeo(scratch: Path, breakwater: Breakwater, pushed: Image) -> None:
    """README, "Quick start": the skopeo line copies the image of this platform."""
    lines = [b.text for b in blocks(README.read_text()) if "Quick start" in b.headings and "skopeo" in b.text]
    command = shlex.split(at(breakwater, lines[0].splitlines()[0]))
    target = command.pop()
    assert target.startswith("dir:")
    run([*command, f"dir:{scratch}/busybox"], NO_WAY_OUT)
    assert (scratch / "busybox" / "manifest.json").read_bytes() == pushed.children[0].body
