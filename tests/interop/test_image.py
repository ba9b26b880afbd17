"""The image: built from Dockerfile on a debootstrapped root, with no registry in reach, then carried by Breakwater itself.

The root is Debian's, of the release that the tests run on. Making it takes longer than all the rest, so it is kept as an
archive in the system's folder for temporary files and used again.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import upstreams_at
from tests.support import ports
from tests.support.clients import Skopeo
from tests.support.origin import Origin
from tests.support.process import Breakwater, Child, eventually, program, run

REPOSITORY = Path(__file__).parents[2]
#: Making the root takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(600)

BASE, BUILT = "localhost/debian:here", "localhost/breakwater:test"
#: Who it runs as: nobody of the host.
USER = "65532:65532"


_NOT_NEEDED = [
    f"--exclude=./{path}"
    for path in ("var/cache/*", "var/lib/apt/lists/*", "usr/share/doc", "usr/share/man", "usr/share/locale")
]


def debian_root(scratch: Path) -> Path:
    """An archive of a minimal Debian with Python, made once."""
    codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    kept = Path(tempfile.gettempdir()) / f"breakwater-root-{codename}-{os.getuid()}.tar"
    if kept.exists():
        return kept
    listed = run(["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)"]).splitlines()
    mirror = next(line.split()[0] for line in listed if line.endswith(f" {codename}"))
    root = scratch / "debian"
    root.mkdir()
    # In memory: dpkg syncs every file it unpacks, and this one is thrown away.
    run([program("mount"), "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(root)])
    try:
        wanted = "--include=python3-venv,ca-certificates"
        run([program("debootstrap"), "--variant=minbase", wanted, codename, str(root), mirror], timeout_s=600)
        run([program("tar"), "-C", str(root), *_NOT_NEEDED, "-cf", f"{kept}.new", "."])
        Path(f"{kept}.new").rename(kept)
    finally:
        run([program("umount"), str(root)])
    return kept


class Builder:
    """buildah with storage of its own, as far as it works in a container without privileges of a runtime's."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir()
        settings = scratch / "storage.conf"
        settings.write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{scratch}/graph"\nrunroot = "{scratch}/runroot"\n'
        )
        self._env = {"CONTAINERS_STORAGE_CONF": str(settings), "BUILDAH_ISOLATION": "chroot"}

    def __call__(self, *words: str) -> str:
        return run([program("buildah"), *words], self._env, timeout_s=600).strip()

    def base(self, archive: Path) -> None:
        """The archive as an image of one layer."""
        container = self("from", "scratch")
        self("add", "-q", container, str(archive), "/")
        self("commit", "-q", container, BASE)
        self("rm", container)

    def build(self, wheels: Path) -> None:
        """As Dockerfile says, without the network."""
        given = ("BASE=" + BASE, "PIP_NO_INDEX=1", "PIP_FIND_LINKS=/wheels")
        words = [word for argument in given for word in ("--build-arg", argument)]
        self(
            "bud", "-q", "--format", "docker", *words, "--volume", f"{wheels}:/wheels:ro", "-t", BUILT, str(REPOSITORY)
        )


@pytest.fixture(scope="module")
def builder(scratch: Path) -> Iterator[Builder]:
    """With the image built."""
    builder = Builder(scratch / "images")
    wheels = scratch / "wheels"
    # Of Debian's own Python, which is the root's.
    run(["/usr/bin/python3", "-m", "venv", str(scratch / "pip")])
    fetch = [str(scratch / "pip/bin/pip"), "wheel", "-q", "-w", str(wheels), str(REPOSITORY), "hatchling>=1.25"]
    run(fetch, timeout_s=600)
    builder.base(debian_root(scratch))
    builder.build(wheels)
    yield builder


@pytest.fixture(scope="module")
def config(builder: Builder) -> dict[str, Any]:
    """What the image says of how to run it."""
    inspected: dict[str, Any] = json.loads(builder("inspect", "--type", "image", BUILT))["Docker"]["config"]
    return inspected


@pytest.fixture(scope="module")
def root(builder: Builder) -> Iterator[Path]:
    """Its file system, mounted."""
    container = builder("from", BUILT)
    yield Path(builder("mount", container))
    builder("rm", container)


def test_it_is_run_by_nobody_and_says_what_it_needs(config: dict[str, Any], root: Path) -> None:
    """Its own user, its ports, its volume, a healthcheck without curl, SIGTERM; no installer is left in it."""
    assert config["User"] == USER
    assert set(config["ExposedPorts"]) == {"5000/tcp", "5001/tcp"}
    assert set(config["Volumes"]) == {"/var/lib/breakwater"}
    assert config["Healthcheck"]["Test"] == ["CMD", "breakwater", "status", "--json"]
    assert config["Entrypoint"] + config["Cmd"] == ["breakwater", "serve"]
    assert not list((root / "opt/breakwater").rglob("pip"))
    theirs = [path for path in (root / "opt/breakwater").rglob("*") if path.lstat().st_uid != 0]
    assert not theirs, f"the one it runs as may change {theirs[:3]}"
    assert (root / "var/lib/breakwater").stat().st_uid == 65532


def test_it_is_small(root: Path) -> None:
    """What we add to the base, compiled and all: under 120 MiB."""
    assert int(run(["du", "-sm", str(root / "opt/breakwater")]).split()[0]) < 120


def test_it_is_pulled_through_breakwater(builder: Builder, scratch: Path, origin: Origin) -> None:
    """Pushed to a registry by buildah, pulled through Breakwater by skopeo: the digest is the one that was pushed."""
    digest = scratch / "digest"
    target = f"docker://{origin.address}/library/breakwater:1"
    builder("push", "-q", "--tls-verify=false", "--digestfile", str(digest), BUILT, target)
    with Breakwater(scratch / "carrier", upstreams_at(origin.url)) as breakwater:
        with Skopeo(scratch / "skopeo", breakwater.address) as client:
            assert client.pull("library/breakwater", "1") == digest.read_text().strip()
        breakwater.stop_cleanly()


class Contained(Child):
    """The image's command on its own root: read-only but for /tmp and the volume, as its own user."""

    def __init__(self, scratch: Path, root: Path, config: dict[str, Any], command: list[str]) -> None:
        self.port, self.admin_port = ports.take(), ports.take()
        store = scratch / "volume"
        store.mkdir()
        os.chown(store, 65532, 65532)
        self.environment = [
            *config["Env"],
            f"BREAKWATER_SERVER__LISTEN=127.0.0.1:{self.port}",
            f"BREAKWATER_SERVER__ADMIN_LISTEN=127.0.0.1:{self.admin_port}",
        ]
        # What a runtime does, of which none runs everywhere that this test must.
        script = (
            'set -e; mount --rbind "$1" "$1"; mount -o remount,bind,ro "$1"; mount -t tmpfs tmpfs "$1/tmp"; '
            'mount -t proc proc "$1/proc"; mount --bind "$2" "$1/var/lib/breakwater"; '
            f'root="$1"; shift 2; exec chroot --userspec={USER} "$root" "$@"'
        )
        inside = [str(root), str(store), "/usr/bin/env", "-i", *self.environment, *command]
        super().__init__(
            "the image", [program("unshare"), "--mount", "bash", "-c", script, "bash", *inside], scratch / "image.log"
        )

    def is_ready(self) -> bool:
        return "serves" in self.log()

    def run(self, *command: str) -> subprocess.CompletedProcess[bytes]:
        """Run something beside it, as `docker exec` does."""
        into = [program("nsenter"), "-t", str(self.pid), "--mount", "--root", "--setuid", "65532", "--setgid", "65532"]
        words = [*into, "--", "/usr/bin/env", "-i", *self.environment, *command]
        return subprocess.run(words, capture_output=True, check=False)


def test_it_serves_on_a_read_only_root_and_its_healthcheck_says_so(
    scratch: Path, root: Path, config: dict[str, Any]
) -> None:
    """It needs nothing but its volume and /tmp; alive is told by its own command; SIGTERM ends it well."""
    with Contained(scratch, root, config, config["Entrypoint"] + config["Cmd"]) as running:
        assert running.run("touch", "/opt/breakwater/x", "/etc/x").returncode != 0
        assert running.run("id", "-u").stdout.strip() == b"65532"
        healthy = running.run(*config["Healthcheck"]["Test"][1:])
        assert healthy.returncode == 0, healthy.stderr
        assert running.stop() == 0
    eventually(lambda: "stopped" in running.log(), "it says that it has stopped")
