"""Filling a store from a list, from a real registry, with a server running and without one."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.interop.conftest import upstreams_at
from tests.support.clients import TEST_HOST, Skopeo
from tests.support.commands import breakwater_command
from tests.support.images import Blob, artifact, image, manifest, multi_arch
from tests.support.images import index as referring_index
from tests.support.origin import Origin
from tests.support.process import Breakwater, eventually

_SEED = count(81_000)
KIB = 1024


@pytest.fixture(params=["server runs", "no server"])
def mirror(request: pytest.FixtureRequest, scratch: Path, origin: Origin) -> Iterator[Breakwater]:
    """Breakwater with an empty store: up, or only installed."""
    breakwater = Breakwater(scratch / f"prefetch-{next(_SEED)}", upstreams_at(origin.url))
    if request.param == "no server":
        yield breakwater
        return
    with breakwater:
        yield breakwater
        breakwater.stop_cleanly()


def test_a_list_is_fetched_once_and_then_served_without_the_origin(
    mirror: Breakwater, scratch: Path, origin: Origin
) -> None:
    """Issue 8, lists: tags resolved once and recorded, referrers and cosign's tags along, the rest not asked again."""
    name = f"team/app-{next(_SEED)}"
    index = origin.push(name, "1", multi_arch(next(_SEED), (40 * KIB, 300 * KIB)))
    sbom = origin.push(name, None, artifact(index, "application/spdx+json", b"what is in it"))
    origin.push(name, index.digest.replace(":", "-"), referring_index([sbom]))  # this registry has no referrers API
    signature = manifest(Blob(b"{}", "application/vnd.oci.image.config.v1+json"), [Blob(b"signed", "text/plain")])
    origin.push(name, f"sha256-{index.digest[7:]}.sig", signature)
    small = f"library/small-{next(_SEED)}"
    origin.push(small, "1", image(next(_SEED), (10 * KIB,)))
    pods = f"""
apiVersion: v1
kind: Pod
spec:
  initContainers: [{{name: a, image: "{TEST_HOST}/{name}:1"}}]
  containers: [{{name: b, image: "{small.removeprefix("library/")}:1"}}]
"""
    done = breakwater_command(mirror, "prefetch", "-f", "-", "--json", text=pods)
    assert done.code == 0, done.err
    by_name = {each["reference"]: each for each in done.report["images"]}
    app = by_name[f"{TEST_HOST}/{name}:1"]
    assert app["digest"] == index.digest
    assert (app["n_manifests"], app["n_referrers"]) == (5, 2)
    assert app["fetched_bytes"] > 300 * KIB
    assert by_name[f"docker.io/{small}:1"]["missing"] == {}

    n_before = len(origin.requests())
    again = breakwater_command(mirror, "prefetch", "-f", "-", "--json", text=pods)
    assert again.code == 0
    assert sum(each["fetched_bytes"] for each in again.report["images"]) == 0
    assert [str(each) for each in origin.requests()[n_before:] if each.names_a_digest and each.status == 200] == []

    was_running = mirror.is_running
    if not was_running:
        mirror.start()
    n_before = len(origin.requests())
    with Skopeo(scratch / f"skopeo-{next(_SEED)}", mirror.address) as skopeo:
        assert skopeo.pull(name, "1") == index.digest
        assert skopeo.pull(name, f"sha256-{index.digest[7:]}.sig") == signature.digest
    assert [str(each) for each in origin.requests()[n_before:] if each.names_a_digest] == []
    if not was_running:
        mirror.stop_cleanly()


def test_pins_are_listed_and_let_go_of(mirror: Breakwater, origin: Origin) -> None:
    """breakwater pins and unpin, with a server and without one; what is not pinned is told, exit code 1."""
    name = f"library/pinned-{next(_SEED)}"
    origin.push(name, "1", image(next(_SEED), (20 * KIB,)))
    reference = f"docker.io/{name}:1"
    assert breakwater_command(mirror, "prefetch", "--pin", reference).code == 0
    [pin] = breakwater_command(mirror, "pins", "--json").report["pins"]
    assert (pin["reference"], pin["digests"], pin["listed"]) == (reference, 3, False)
    assert reference in breakwater_command(mirror, "pins").out

    absent = breakwater_command(mirror, "unpin", f"{name}:2")
    assert (absent.code, "nothing that is pinned is called" in absent.err) == (1, True)
    done = breakwater_command(mirror, "unpin", "--json", name.removeprefix("library/") + ":1")
    assert [each["reference"] for each in done.report["unpinned"]] == [reference]
    assert breakwater_command(mirror, "pins", "--json").report == {"pins": [], "kept_bytes": 0}
    again = breakwater_command(mirror, "prefetch", "--json", reference)
    assert again.report["images"][0]["fetched_bytes"] == 0, "letting go deletes nothing"


def test_only_the_platforms_asked_for_are_fetched(mirror: Breakwater, origin: Origin) -> None:
    """--platform: the index whole, and the children of other platforms left out."""
    name = f"team/one-{next(_SEED)}"
    index = origin.push(name, "1", multi_arch(next(_SEED), (40 * KIB,)))
    done = breakwater_command(mirror, "prefetch", "--json", "--platform", "linux/arm64", f"{TEST_HOST}/{name}:1")
    assert done.code == 0, done.err
    [app] = done.report["images"]
    assert app["digest"] == index.digest
    assert app["n_manifests"] == 2
    asked = [each.target for each in origin.requests() if name in each.target and each.status == 200]
    amd, arm = index.children
    assert any(arm.digest in target for target in asked)
    assert not any(amd.digest in target for target in asked)


def test_what_is_missing_is_said_and_is_a_failure(mirror: Breakwater, origin: Origin) -> None:
    """Exit code 1, the reason beside each name, and the rest of the list done all the same."""
    name = f"library/there-{next(_SEED)}"
    origin.push(name, "1", image(next(_SEED), (5 * KIB,)))
    done = breakwater_command(mirror, "prefetch", f"{name}:1", f"{name}:2", "elsewhere.test/x:1")
    assert done.code == 1
    assert f"missing  docker.io/{name}:2" in done.out
    assert "no upstream is configured for 'elsewhere.test'" in done.out
    assert "1 of 3 images whole" in done.out


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="nothing"),
        pytest.param(["NOT A NAME"], id="no reference"),
        pytest.param(["-f", "/no/such/list"], id="no list"),
        pytest.param(["--platform", "amd64", "a.test/x"], id="no platform"),
    ],
)
def test_a_wrong_order_is_wrong_usage(scratch: Path, origin: Origin, arguments: list[str]) -> None:
    """Exit code 2, one line, nothing begun."""
    mirror = Breakwater(scratch / f"usage-{next(_SEED)}", upstreams_at(origin.url))
    done = breakwater_command(mirror, "prefetch", *arguments)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1


def test_the_list_in_the_settings_is_here_at_all_times(scratch: Path, origin: Origin) -> None:
    """[prefetch]: fetched by the server itself, pinned, and told in status."""
    name = f"library/standing-{next(_SEED)}"
    pushed = origin.push(name, "1", image(next(_SEED), (20 * KIB,)))
    images = scratch / f"standing-{next(_SEED)}.txt"
    images.write_text(f"{name.removeprefix('library/')}:1\n")
    settings = {**upstreams_at(origin.url), "prefetch": {"list": [str(images)], "schedule": "1h"}}
    with Breakwater(scratch / f"standing-{next(_SEED)}", settings) as mirror:
        eventually(lambda: mirror.status()["prefetch"], "the first run is over")
        assert mirror.status()["prefetch"]["missing"] == {}
        assert mirror.status()["pins"]["references"] == 1
        n_before = len(origin.requests())
        with Skopeo(scratch / f"skopeo-{next(_SEED)}", mirror.address) as skopeo:
            skopeo.host = "docker.io"
            assert skopeo.pull(name, "1") == pushed.digest
        assert len(origin.requests()) == n_before
        mirror.stop_cleanly()


def test_progress_is_told_for_each_image_and_in_all(scratch: Path, origin: Origin) -> None:
    """Issue 8: bars on a terminal, each image's and one of all; plain lines elsewhere; with --json nothing but the
    report."""
    names = [f"library/shown-{next(_SEED)}" for _ in range(2)]
    for name in names:
        origin.push(name, "1", image(next(_SEED), (200 * KIB,)))
    references = [f"docker.io/{name}:1" for name in names]
    mirrors = [Breakwater(scratch / f"shown-{next(_SEED)}", upstreams_at(origin.url)) for _ in range(3)]

    done = breakwater_command(mirrors[0], "prefetch", *references)
    assert sorted(line.split()[:2] for line in done.err.splitlines()) == sorted(
        [what, reference] for what in ("done", "resolved") for reference in references
    )
    assert "2 of 2 images whole" in done.out
    assert breakwater_command(mirrors[1], "prefetch", "--json", *references).err == ""

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "proxy", "prefetch", "--config", str(mirrors[2].settings_path), *references]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs) as child:
        os.close(theirs)
        shown = b""
        # The terminal's end is told by an error (tty_ioctl(4): hung up).
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 4096):
                shown += piece
        os.close(ours)
        assert child.wait(60) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))  # colours and moves (ECMA-48)
    assert "in all" in plain
    assert all(f"done     {reference}" in plain for reference in references), plain
