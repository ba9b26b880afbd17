"""Bundles between Breakwater and the tools that others have: ours read by them, theirs by us, byte for byte."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import upstreams_at
from tests.support.clients import TEST_HOST, Containerd, Docker, Podman, Skopeo
from tests.support.commands import breakwater_command
from tests.support.images import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    Blob,
    Image,
    artifact,
    digest_of,
    image,
    index,
    multi_arch,
    write_layout,
)
from tests.support.origin import Origin
from tests.support.process import Breakwater, program, run

_SEED = count(82_000)
KIB = 1024
APP, SMALL = f"{TEST_HOST}/team/app:1", "docker.io/library/small:2"


@dataclass(frozen=True, slots=True)
class Carried:
    """A bundle of two images, and what they were."""

    path: Path
    app: Image
    small: Image
    sbom: Image
    mirror: Breakwater


def sealed_at(folder: Path, **server: Any) -> Breakwater:
    """A Breakwater on the far side of the gap: every address it knows leads nowhere."""
    settings = upstreams_at("http://127.0.0.1:9")
    return Breakwater(folder, {**settings, "server": {**settings["server"], "sealed": True, **server}})


@pytest.fixture(scope="module")
def carried(scratch: Path, origin: Origin) -> Carried:
    """Prefetched from a real registry and exported, signed, with no server running."""
    app = origin.push("team/app", "1", multi_arch(next(_SEED), (40 * KIB, 300 * KIB)))
    sbom = origin.push("team/app", None, artifact(app, "application/spdx+json", b"what is in it"))
    origin.push("team/app", app.digest.replace(":", "-"), index([sbom]))
    small = origin.push("library/small", "2", image(next(_SEED), (10 * KIB, 100 * KIB), docker=True))
    mirror = Breakwater(scratch / "connected", upstreams_at(origin.url))
    run([program("openssl"), "genpkey", "-algorithm", "ed25519", "-out", str(scratch / "key.pem")])
    run([program("openssl"), "pkey", "-in", str(scratch / "key.pem"), "-pubout", "-out", str(scratch / "key.pub")])
    done = breakwater_command(mirror, "prefetch", APP, SMALL)
    assert done.code == 0, done.err + done.out
    path = scratch / "bundle.tar"
    done = breakwater_command(mirror, "export", "-o", str(path), "--sign", str(scratch / "key.pem"), APP, SMALL)
    assert done.code == 0, done.err + done.out
    return Carried(path, app, small, sbom, mirror)


@pytest.fixture
def sealed(scratch: Path) -> Iterator[Breakwater]:
    """The far side, with nothing in it, not running."""
    breakwater = sealed_at(scratch / f"sealed-{next(_SEED)}")
    yield breakwater
    if breakwater.is_running:
        breakwater.stop_cleanly()


# -- ours, read by them ------------------------------------------------------------------------------------------------


def test_skopeo_reads_a_bundle_by_full_reference(carried: Carried, scratch: Path) -> None:
    """Every image by its name, indexes byte-identical, every blob what its name says.

    Skopeo 1.9 finds no entry of Docker's media types in a layout; it reads those as docker-archive.
    """
    with Skopeo(scratch / "skopeo-reads", "127.0.0.1:9") as skopeo:
        target = scratch / f"skopeo-{next(_SEED)}"
        command = [program("skopeo"), "--policy", str(skopeo._policy), "copy"]
        run([*command, "--all", f"oci-archive:{carried.path}:{APP}", f"dir:{target}"])
        assert (target / "manifest.json").read_bytes() == carried.app.body
        for path in target.iterdir():
            if len(path.name) == 64:
                assert digest_of(path.read_bytes()) == f"sha256:{path.name}"
        target = scratch / f"skopeo-{next(_SEED)}"
        run([*command, f"docker-archive:{carried.path}:{SMALL}", f"dir:{target}"])
        assert (target / carried.small.blobs[0].digest[7:]).read_bytes() == carried.small.blobs[0].content


def test_podman_loads_a_bundle(carried: Carried, scratch: Path) -> None:
    """All images, under their full references."""
    with Podman(scratch / "podman-loads", "127.0.0.1:9") as podman:
        podman._podman("load", "--signature-policy", f"{podman._scratch}/policy.json", "-i", str(carried.path))
        names = podman._podman("images", "--format", "{{.Repository}}:{{.Tag}}").split()
        assert sorted(names) == sorted([APP, SMALL])
        single = f"oci-archive:{carried.path}:{APP}"
        podman._podman("pull", "--quiet", "--signature-policy", f"{podman._scratch}/policy.json", single)


def test_containerd_imports_a_bundle(carried: Carried, scratch: Path) -> None:
    """All images with their digests: what a node that is filled by hand does."""
    with Containerd(scratch / "containerd-imports", "127.0.0.1:9") as containerd:
        run(containerd._ctr("images", "import", "--all-platforms", "--no-unpack", str(carried.path)))
        listed = {line.split()[0]: line.split()[2] for line in run(containerd._ctr("images", "list")).splitlines()[1:]}
        assert {name: listed[name] for name in (APP, SMALL)} == {APP: carried.app.digest, SMALL: carried.small.digest}


def test_docker_loads_a_bundle(carried: Carried, scratch: Path) -> None:
    """A daemon that knows no layouts reads the manifest.json beside it."""
    with Docker(scratch / "docker-loads", "127.0.0.1:9") as docker:
        run(docker._docker("load", "--quiet", "--input", str(carried.path)))
        names = run(docker._docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}")).split()
        assert sorted(names) == sorted([APP, "small:2"])


# -- ours, read by us --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_running", [True, False], ids=["server runs", "no server"])
def test_a_bundle_makes_a_sealed_registry(
    carried: Carried, sealed: Breakwater, scratch: Path, is_running: bool
) -> None:
    """By tag and by digest, referrers along; what is absent is a 404 that says sealed; status says what it is of."""
    if is_running:
        sealed.start()
    done = breakwater_command(sealed, "import", "--json", "--key", str(scratch / "key.pub"), str(carried.path))
    assert done.code == 0, done.err
    assert done.report["n_missing"] == 0
    if not is_running:
        sealed.start()
    with Skopeo(scratch / f"skopeo-{next(_SEED)}", sealed.address) as skopeo:
        assert skopeo.pull("team/app", "1") == carried.app.digest
    with Containerd(scratch / f"containerd-{next(_SEED)}", sealed.address) as containerd:
        assert containerd.pull("team/app", "1") == carried.app.digest
    referrers = run([program("curl"), "-s", f"{sealed.url}/v2/{TEST_HOST}/team/app/referrers/{carried.app.digest}"])
    assert [each["digest"] for each in json.loads(referrers)["manifests"]] == [carried.sbom.digest]
    tags = json.loads(run([program("curl"), "-s", f"{sealed.url}/v2/{TEST_HOST}/team/app/tags/list"]))
    assert tags["tags"] == ["1"]
    absent = run([program("curl"), "-si", f"{sealed.url}/v2/{TEST_HOST}/team/app/manifests/2"])
    assert absent.startswith("HTTP/1.1 404")
    assert "sealed" in absent
    [imported] = sealed.status()["seal"]["imports"]
    assert imported["n_images"] == 2
    assert imported["signed_by"].startswith("ed25519:")
    assert imported["imported_at"] >= imported["created_at"] > 0
    assert f"signed by {imported['signed_by']}" in breakwater_command(sealed, "status").out

    # And on from there: the same bundle again, blob for blob.
    onward = scratch / f"onward-{next(_SEED)}.tar"
    done = breakwater_command(sealed, "export", "-o", str(onward), "--project", "default")
    assert done.code == 0, done.err + done.out
    assert blobs_in(onward) == blobs_in(carried.path)


def blobs_in(path: Path) -> set[str]:
    with tarfile.open(path) as tar:
        return {name for name in tar.getnames() if name.startswith("blobs/")}


def test_importing_twice_adds_nothing(carried: Carried, sealed: Breakwater) -> None:
    """What is here is verified again and not written again."""
    first = breakwater_command(sealed, "import", "--json", str(carried.path)).report
    second = breakwater_command(sealed, "import", "--json", str(carried.path)).report
    assert first["bundles"][0]["new_bytes"] == first["bundles"][0]["n_bytes"]
    assert (second["n_missing"], second["bundles"][0]["new_bytes"]) == (0, 0)


@pytest.mark.parametrize("zstd", [[], ["--zstd"]], ids=["plain", "zstd"])
def test_small_media(carried: Carried, sealed: Breakwater, scratch: Path, zstd: list[str]) -> None:
    """--split: parts of at most that size, taken together whichever is named; a part that is missing is said."""
    name = f"parts-{next(_SEED)}.tar"
    big = image(next(_SEED), (3_000 * KIB,))
    mirror, path = carried.mirror, scratch / name
    # Filled from a bundle of another tool, so that no registry is needed for it.
    run_layout = scratch / f"layout-{next(_SEED)}.tar"
    layout_archive(run_layout, big, f"{TEST_HOST}/team/{name}:1")
    assert breakwater_command(mirror, "import", str(run_layout)).code == 0
    done = breakwater_command(mirror, "export", "-o", str(path), "--split", "1MiB", *zstd, f"{TEST_HOST}/team/{name}:1")
    assert done.code == 0, done.err
    parts = sorted(scratch.glob(f"{name}.*"))
    assert [part.name for part in parts] == [f"{name}.{n:03}" for n in range(1, len(parts) + 1)]
    assert len(parts) == 3
    assert all(part.stat().st_size == 1 << 20 for part in parts[:-1])

    parts[1].rename(scratch / "away")
    done = breakwater_command(sealed, "import", str(parts[0]))
    assert done.code == 1
    assert "parts" in done.err
    (scratch / "away").rename(parts[1])
    done = breakwater_command(sealed, "import", str(path), "--json")
    assert done.code == 0, done.err
    assert done.report["images"][0]["digest"] == big.digest


def layout_archive(path: Path, wanted: Image, name: str) -> None:
    """An OCI archive as a script of somebody's would make it."""
    folder = path.with_suffix(".d")
    write_layout(folder, wanted, name)
    run([program("tar"), "-C", str(folder), "-cf", str(path), "."])


def test_an_upgrade_carries_only_what_is_new(carried: Carried, sealed: Breakwater, scratch: Path) -> None:
    """--since: shared layers stay at home, and the delta alone is refused where the base is not."""
    base = image(next(_SEED), (200 * KIB, 30 * KIB))
    newer = index([image(next(_SEED), (5 * KIB,)), base])
    for tag, wanted in (("1", index([base])), ("2", newer)):
        archive = scratch / f"upgrade-{next(_SEED)}.tar"
        layout_archive(archive, wanted, f"{TEST_HOST}/team/upgrade:{tag}")
        assert breakwater_command(carried.mirror, "import", str(archive)).code == 0
    first, second = scratch / "first.tar", scratch / "second.tar"
    reference = f"{TEST_HOST}/team/upgrade"
    assert breakwater_command(carried.mirror, "export", "-o", str(first), f"{reference}:1").code == 0
    done = breakwater_command(carried.mirror, "export", "-o", str(second), "--since", str(first), f"{reference}:2")
    assert done.code == 0, done.err
    assert not blobs_in(first) & blobs_in(second)
    assert second.stat().st_size < 60 * KIB

    done = breakwater_command(sealed, "import", str(second))
    assert done.code == 1
    assert "builds on an earlier one" in done.err
    done = breakwater_command(sealed, "import", "--json", str(first), str(second))
    assert done.code == 0, done.err
    assert [each["digest"] for each in done.report["images"]] == [index([base]).digest, newer.digest]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        pytest.param("another key", "not of this bundle", id="another key"),
        pytest.param("no signature", "is not signed", id="no signature"),
        pytest.param("other contents", "hash", id="content that was changed"),
    ],
)
def test_what_was_not_signed_is_refused(
    carried: Carried, sealed: Breakwater, scratch: Path, harm: str, said: str
) -> None:
    """--key: judged before anything is kept, and every digest is held to it."""
    path = scratch / f"signed-{next(_SEED)}.tar"
    body = bytearray(carried.path.read_bytes())
    key = scratch / "key.pub"
    if harm == "other contents":
        at = body.rindex(b"ustar") + 2000
        body[at] ^= 1
    path.write_bytes(body)
    if harm != "no signature":
        path.with_name(f"{path.name}.sig").write_bytes(carried.path.with_name("bundle.tar.sig").read_bytes())
    if harm == "another key":
        run([program("openssl"), "genpkey", "-algorithm", "ed25519", "-out", str(scratch / "other.pem")])
        key = scratch / "other.pub"
        run([program("openssl"), "pkey", "-in", str(scratch / "other.pem"), "-pubout", "-out", str(key)])
    done = breakwater_command(sealed, "import", "--key", str(key), str(path))
    assert done.code == 1
    assert said in done.err
    assert not list((sealed.store / "breakwater" / "blobs").rglob("*[0-9a-f]" * 60)) if sealed.store.exists() else True


def test_openssl_checks_the_same_signature(carried: Carried, scratch: Path) -> None:
    """The signature is of breakwater.json, byte for byte: no tool of ours is needed to check it."""
    with tarfile.open(carried.path) as tar:
        first = tar.next()
        assert first is not None
        assert first.name == "breakwater.json"
        member = tar.extractfile(first)
        assert member is not None
        (scratch / "contents").write_bytes(member.read())
    verify = [program("openssl"), "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", str(scratch / "key.pub")]
    run([*verify, "-in", str(scratch / "contents"), "-sigfile", f"{carried.path}.sig"])


@pytest.mark.parametrize(
    ("bound", "is_ours", "said"),
    [
        pytest.param("capacity", False, "raise store.capacity; nothing was written", id="the capacity, another tool's"),
        pytest.param("quota", True, "more of the quota of project 'team'", id="a quota, ours"),
        pytest.param("quota", False, "more of the quota of project 'team'", id="a quota, another tool's"),
    ],
)
def test_an_import_that_cannot_fit_writes_nothing(scratch: Path, bound: str, is_ours: bool, said: str) -> None:
    """Judged by the contents and the manifests, before the first byte is kept."""
    far = sealed_at(scratch / f"small-{next(_SEED)}")
    archive = scratch / f"big-{next(_SEED)}.tar"
    layout_archive(archive, image(next(_SEED), (100 * KIB, 5_000 * KIB)), f"{TEST_HOST}/team/big:1")
    if is_ours:
        near, archive_ = sealed_at(scratch / f"near-{next(_SEED)}"), scratch / f"ours-{next(_SEED)}.tar"
        assert breakwater_command(near, "import", str(archive)).code == 0
        assert breakwater_command(near, "export", "-o", str(archive_), f"{TEST_HOST}/team/big:1").code == 0
        archive = archive_
    text = far.settings_path.read_text()
    if bound == "capacity":
        text = text.replace('"8GiB"', '"4MiB"')
    else:
        text += f'\n[projects.team]\nmatch = ["{TEST_HOST}/team/**"]\nquota = "4MiB"\n'
    far.settings_path.write_text(text)
    done = breakwater_command(far, "import", str(archive))
    assert done.code == 1
    assert said in done.err
    assert stored_blobs(far) == []


def test_pins_beyond_the_capacity_are_refused(carried: Carried, scratch: Path) -> None:
    """A pin is a promise; one that cannot be kept is not given."""
    far = sealed_at(scratch / f"pinned-{next(_SEED)}", sealed=False)
    far.settings_path.write_text(far.settings_path.read_text().replace('"8GiB"', '"5MiB"'))
    done = breakwater_command(far, "import", "--pin", "--json", str(carried.path))
    assert done.code == 0, done.err
    far.start()
    assert far.status()["pins"]["references"] == 2
    archive, name = scratch / f"more-{next(_SEED)}.tar", f"{TEST_HOST}/team/more:1"
    layout_archive(archive, image(next(_SEED), (4_400 * KIB,)), name)
    done = breakwater_command(far, "import", "--pin", str(archive))
    assert done.code == 1
    assert "room" in done.err
    with Skopeo(scratch / f"skopeo-{next(_SEED)}", far.address) as skopeo:
        assert skopeo.pull("team/app", "1") == carried.app.digest
    far.stop_cleanly()


# -- theirs, read by us ------------------------------------------------------------------------------------------------


def test_archives_of_skopeo_are_taken(carried: Carried, origin: Origin, sealed: Breakwater, scratch: Path) -> None:
    """oci-archive with an index, byte for byte; a bare tag needs the repository's name."""
    named, bare = scratch / f"theirs-{next(_SEED)}.tar", scratch / f"theirs-{next(_SEED)}.tar"
    with Skopeo(scratch / f"skopeo-{next(_SEED)}", "127.0.0.1:9") as skopeo:
        copy = [program("skopeo"), "--policy", str(skopeo._policy), "copy", "--all", "--src-tls-verify=false"]
        run([*copy, f"docker://{origin.address}/team/app:1", f"oci-archive:{named}:{TEST_HOST}/team/theirs:1"])
        run([*copy, f"docker://{origin.address}/team/app:1", f"oci-archive:{bare}:7"])
    done = breakwater_command(sealed, "import", "--json", str(named))
    assert done.code == 0, done.err
    assert [(each["reference"], each["digest"]) for each in done.report["images"]] == [
        (f"{TEST_HOST}/team/theirs:1", carried.app.digest)
    ]
    done = breakwater_command(sealed, "import", str(bare))
    assert done.code == 1
    assert "--name" in done.out
    done = breakwater_command(sealed, "import", "--json", "--name", f"{TEST_HOST}/team/bare", str(bare))
    assert done.code == 0, done.err + done.out
    assert done.report["images"][0]["reference"] == f"{TEST_HOST}/team/bare:7"


def test_a_layout_in_a_folder_is_taken(carried: Carried, origin: Origin, sealed: Breakwater, scratch: Path) -> None:
    """skopeo copy … oci:FOLDER, and what buildkit and others write: byte for byte; a link in it leads nowhere."""
    folder = scratch / f"layout-{next(_SEED)}"
    with Skopeo(scratch / f"skopeo-{next(_SEED)}", "127.0.0.1:9") as skopeo:
        copy = [program("skopeo"), "--policy", str(skopeo._policy), "copy", "--all", "--src-tls-verify=false"]
        run([*copy, f"docker://{origin.address}/team/app:1", f"oci:{folder}:{TEST_HOST}/team/folder:1"])
    done = breakwater_command(sealed, "import", "--json", str(folder))
    assert done.code == 0, done.err
    assert [(each["reference"], each["digest"]) for each in done.report["images"]] == [
        (f"{TEST_HOST}/team/folder:1", carried.app.digest)
    ]
    layer = next(path for path in (folder / "blobs" / "sha256").iterdir())
    layer.rename(scratch / "elsewhere")
    layer.symlink_to(scratch / "elsewhere")
    done = breakwater_command(sealed, "import", str(folder))
    assert (done.code, layer.name in done.err) == (1, True)
    done = breakwater_command(sealed, "import", str(scratch))
    assert (done.code, "no image layout" in done.err) == (1, True), done


def test_a_pipe_is_told_no(carried: Carried, sealed: Breakwater) -> None:
    """What can be read only once cannot be judged before it is kept."""
    pipe = sealed.scratch / "pipe"
    os.mkfifo(pipe)
    done = breakwater_command(sealed, "import", str(pipe))
    assert (done.code, "read twice" in done.err) == (1, True), done


def test_archives_of_containerd_are_taken(carried: Carried, sealed: Breakwater, scratch: Path) -> None:
    """ctr images export: a layout and a manifest.json, as docker save writes them since version 25."""
    path = scratch / f"ctr-{next(_SEED)}.tar"
    with Containerd(scratch / f"containerd-{next(_SEED)}", "127.0.0.1:9") as containerd:
        run(containerd._ctr("images", "import", "--all-platforms", "--no-unpack", str(carried.path)))
        run(containerd._ctr("images", "export", "--all-platforms", str(path), APP))
    done = breakwater_command(sealed, "import", "--json", str(path))
    assert done.code == 0, done.err + done.out
    assert (APP, carried.app.digest) in [(each["reference"], each["digest"]) for each in done.report["images"]]


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_archives_of_podman_are_taken(carried: Carried, sealed: Breakwater, scratch: Path, kind: str) -> None:
    """podman save, in both of its formats; the config, and so the image, is the same."""
    path = scratch / f"podman-{next(_SEED)}.tar"
    with Podman(scratch / f"podman-{next(_SEED)}", "127.0.0.1:9") as podman:
        policy = ["--signature-policy", f"{podman._scratch}/policy.json"]
        podman._podman("load", *policy, "-i", str(carried.path))
        podman._podman("save", "--quiet", "--format", kind, "-o", str(path), SMALL)
    assert_same_image(sealed, path, scratch, carried.small)


def test_archives_of_docker_are_taken(carried: Carried, sealed: Breakwater, scratch: Path) -> None:
    """docker save of two images that share nothing, packed by the operator with gzip."""
    path = scratch / f"docker-{next(_SEED)}.tar"
    with Docker(scratch / f"docker-{next(_SEED)}", "127.0.0.1:9") as docker:
        run(docker._docker("load", "--quiet", "--input", str(carried.path)))
        run(docker._docker("save", "--output", str(path), "small:2", APP))
    run([program("gzip"), str(path)])
    assert_same_image(sealed, path.with_name(f"{path.name}.gz"), scratch, carried.small, n_images=2)


def assert_same_image(sealed: Breakwater, path: Path, scratch: Path, wanted: Image, n_images: int = 1) -> None:
    """Imported, served and pulled: the same config and layers of the same content."""
    done = breakwater_command(sealed, "import", "--json", str(path))
    assert done.code == 0, done.err + done.out
    assert done.report["n_images"] == n_images
    assert SMALL in [each["reference"] for each in done.report["images"]]
    with sealed, Skopeo(scratch / f"skopeo-{next(_SEED)}", sealed.address) as skopeo:
        inspect = [program("skopeo"), "--policy", str(skopeo._policy), "inspect", "--config", "--raw"]
        config = run([*inspect, "--tls-verify=false", f"docker://{sealed.address}/{SMALL}"])
        ours, theirs = json.loads(config), json.loads(wanted.blobs[0].content)
        assert ours["rootfs"] == theirs["rootfs"]
        target = scratch / f"pulled-{next(_SEED)}"
        copy = [program("skopeo"), "--policy", str(skopeo._policy), "copy", "--src-tls-verify=false"]
        run([*copy, f"docker://{sealed.address}/{SMALL}", f"dir:{target}"])
        sealed.stop_cleanly()


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_kills", "n_mib"),
    [
        pytest.param(3, 32, id="3 kills, 32 MiB"),
        pytest.param(100, 64, id="100 kills, 64 MiB", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_a_killed_import_goes_on_and_ends_right(scratch: Path, n_kills: int, n_mib: int) -> None:
    """kill -9 at moments spread over the import: nothing half is seen, and the next try is complete and right."""
    wanted = multi_arch(next(_SEED), tuple((n_mib << 20) // 16 for _ in range(8)))
    archive, name = scratch / f"killed-{next(_SEED)}.tar", f"{TEST_HOST}/team/killed"
    layout_archive(archive, wanted, f"{name}:1")
    near = sealed_at(scratch / f"near-{next(_SEED)}")
    assert breakwater_command(near, "import", str(archive)).code == 0
    bundle = scratch / f"killed-{next(_SEED)}.bundle"
    assert breakwater_command(near, "export", "-o", str(bundle), f"{name}:1").code == 0

    command = [sys.executable, "-m", "proxy", "import", "--config"]
    n_partial, chance = 0, random.Random("kill")
    for _ in range(n_kills):
        far = sealed_at(scratch / f"far-{next(_SEED)}")
        child = subprocess.Popen(
            [*command, str(far.settings_path), str(bundle)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        n_blobs = chance.randrange(21)
        while child.poll() is None and len(stored_blobs(far)) < n_blobs:
            pass
        time.sleep(chance.random() * 0.01)
        child.kill()
        child.wait()
        blobs = stored_blobs(far)
        for path in blobs:
            assert digest_of(path.read_bytes()) == f"sha256:{path.name}"
        n_partial += 0 < len(blobs) < 21
        tags = list((far.store / "breakwater" / "records").rglob("_tags/1"))
        assert len(blobs) == 21 if tags else True
        done = breakwater_command(far, "import", "--json", str(bundle))
        assert done.code == 0, done.err
        assert done.report["images"][0]["digest"] == wanted.digest
        blobs = stored_blobs(far)
        assert {f"sha256:{path.name}" for path in blobs} == {digest_of(path.read_bytes()) for path in blobs}
        assert len(blobs) == 21
        shutil.rmtree(far.scratch)
    print(f"{n_kills} kills, {n_partial} of them between the first blob and the last")
    assert n_partial


def stored_blobs(breakwater: Breakwater) -> list[Path]:
    """The files under blobs/."""
    return [path for path in (breakwater.store / "breakwater" / "blobs").rglob("*") if path.is_file()]


def test_export_says_what_is_missing_and_writes_nothing(carried: Carried, scratch: Path) -> None:
    """Exit code 1, no file: half a bundle would be found out on the other side."""
    path = scratch / f"none-{next(_SEED)}.tar"
    done = breakwater_command(carried.mirror, "export", "-o", str(path), APP, f"{TEST_HOST}/team/app:9")
    assert done.code == 1
    assert "prefetch it first" in done.out
    assert not list(scratch.glob(f"{path.name}*"))


@pytest.mark.parametrize(
    ("n_mib", "is_ours"),
    [
        pytest.param(192, True, id="192 MiB"),
        pytest.param(10_240, True, id="10 GiB", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
        pytest.param(10_240, False, id="10 GiB of another tool", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_an_import_has_little_in_memory(scratch: Path, n_mib: int, is_ours: bool) -> None:
    """Bounded memory whatever the bundle's size, and its rate beside that of ctr."""
    folder, path = scratch / f"large-{next(_SEED)}", scratch / f"large-{next(_SEED)}.tar"
    members = large_layout(folder, n_mib, is_ours=is_ours)
    run([program("tar"), "-C", str(folder), "-cf", str(path), *members], timeout_s=3600)
    shutil.rmtree(folder)
    far = sealed_at(scratch / f"far-{next(_SEED)}")
    far.settings_path.write_text(far.settings_path.read_text().replace('"8GiB"', f'"{n_mib + 64 + n_mib // 64}MiB"'))
    command = [sys.executable, "-m", "proxy", "import", "--config", str(far.settings_path), str(path)]
    began = time.monotonic()
    with (scratch / "large.log").open("w") as log:
        child, peak_kib = subprocess.Popen(command, stdout=log, stderr=log), 0
    while child.poll() is None:
        # Not ru_maxrss: that counts what this process had before it became the other.
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text())
        peak_kib = max(peak_kib, int(found[1]) if found else 0)
        time.sleep(0.02)
    took_s = time.monotonic() - began
    assert child.returncode == 0, (scratch / "large.log").read_text()
    print(f"import of {n_mib} MiB: {n_mib / took_s:.0f} MiB/s, {peak_kib / 1024:.0f} MiB in memory at most")
    assert 0 < peak_kib < 256 * 1024
    with Containerd(scratch / f"containerd-{next(_SEED)}", "127.0.0.1:9") as containerd:
        began = time.monotonic()
        run(containerd._ctr("images", "import", "--no-unpack", str(path)), timeout_s=3600)
        print(f"ctr images import of the same: {n_mib / (time.monotonic() - began):.0f} MiB/s")
    shutil.rmtree(far.scratch)
    path.unlink()


def large_layout(folder: Path, n_mib: int, *, is_ours: bool) -> list[str]:
    """One image of so many MiB in layers of 64 MiB: random bytes, each layer with another beginning.

    Returns the members in their order: as our export has them, or with nothing but the layers first.
    """
    noise, layers = os.urandom(64 << 20), []
    for n in range(max(1, n_mib // 64)):
        body = n.to_bytes(8, "big") + noise[8:]
        digest = digest_of(body)
        at = folder / "blobs" / digest.replace(":", "/")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(body)
        layers.append({"mediaType": OCI_LAYER, "digest": digest, "size": len(body)})
    config = Blob(
        json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers"}}).encode(), OCI_CONFIG
    )
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config.descriptor, "layers": layers}
    wanted = Image(json.dumps(document).encode(), OCI_MANIFEST, (config,))
    write_layout(folder, wanted, f"{TEST_HOST}/team/large:1")
    blobs = [{"digest": wanted.digest, "size": len(wanted.body)}, config.descriptor, *layers]
    names = [f"blobs/{each['digest'].replace(':', '/')}" for each in blobs]
    if not is_ours:
        return [*reversed(names), "index.json", "oci-layout"]
    contents = {"breakwater": 1, "created_at": 0, "images": 1, "documents": {}, "elsewhere": {}, "left_out": []}
    contents["members"] = {each["digest"]: each["size"] for each in blobs}
    (folder / "breakwater.json").write_text(json.dumps(contents))
    return ["breakwater.json", "oci-layout", "index.json", *names]


def test_what_a_sealed_upstream_has_stays(carried: Carried, origin: Origin, scratch: Path) -> None:
    """`sealed` under one upstream: it is never asked and loses nothing, while others come and go beside it."""
    settings = upstreams_at(origin.url)
    settings["upstreams"][TEST_HOST] = {"url": "http://127.0.0.1:9", "sealed": True}
    half = Breakwater(scratch / f"half-{next(_SEED)}", settings)
    half.settings_path.write_text(half.settings_path.read_text().replace('"8GiB"', '"6MiB"'))
    assert breakwater_command(half, "import", str(carried.path)).code == 0
    with half, Skopeo(scratch / f"skopeo-{next(_SEED)}", half.address) as skopeo:
        for _ in range(3):
            name = f"library/passing-{next(_SEED)}"
            origin.push(name, "1", image(next(_SEED), (3_000 * KIB,)))
            skopeo.host = "docker.io"
            skopeo.pull(name, "1")
        assert half.status()["store"]["evicted_bytes"] > 0
        skopeo.host = TEST_HOST
        assert skopeo.pull("team/app", "1") == carried.app.digest
        done = breakwater_command(half, "prefetch", f"{TEST_HOST}/team/app:9")
        assert done.code == 1
        assert "sealed" in done.out
        half.stop_cleanly()


def test_policy_holds_on_the_way_in_and_out(carried: Carried, scratch: Path) -> None:
    """Promise 6: what may not be pulled is neither imported under its name nor exported."""
    far = sealed_at(scratch / f"strict-{next(_SEED)}")
    far.settings_path.write_text(f'{far.settings_path.read_text()}\n[policy]\ndeny = ["{TEST_HOST}/team/**"]\n')
    done = breakwater_command(far, "import", "--json", str(carried.path))
    assert done.code == 1
    refused = [each for each in done.report["images"] if each["missing"]]
    assert [each["reference"] for each in refused] == [APP]
    assert "team/**" in next(iter(refused[0]["missing"].values()))
    files = [path for path in (far.store / "breakwater" / "blobs").rglob("*") if path.is_file()]
    assert len(files) == 4, "only what the other image needs stays"

    with carried.mirror.settings_path.open("a") as settings:
        settings.write(f'\n[policy]\ndeny = ["{carried.app.children[0].blobs[1].digest}"]\n')
    done = breakwater_command(carried.mirror, "export", "-o", str(scratch / "denied.tar"), APP)
    assert done.code == 1
    assert "is denied" in done.out
    text = carried.mirror.settings_path.read_text()
    carried.mirror.settings_path.write_text(text[: text.index("\n[policy]")])
