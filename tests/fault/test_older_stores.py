"""Stores that earlier versions left behind, kept as they were: `tests/fault/stores/`, made by those versions themselves.

`first` is of the first version that ran from end to end (8559ae2): no charges, no notes. `charged` is of the day before
records, notes and charges got one frame (7961543). Each has an image of two platforms with an SBOM that refers to it,
and an image of project `team`. A change of the layout that an older store does not survive fails here; one that needs
a migration brings a store of today with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.support import ports
from tests.support.clients import TEST_HOST
from tests.support.crowd import Visit, visit_all
from tests.support.images import Image, artifact, image, multi_arch
from tests.support.process import START_S, Breakwater, eventually, fetched

STORES = Path(__file__).with_name("stores")
APP, TOOL = multi_arch(424242, (600, 900)), image(424243, (700,))
SBOM = artifact(APP, "application/spdx+json", b"what is in it")


def kept(folder: Path, name: str) -> Breakwater:
    """A Breakwater of today with that store, and upstreams that nobody answers at."""
    nowhere = {"url": f"http://127.0.0.1:{ports.take()}"}
    settings: dict[str, Any] = {
        "upstreams": {"docker.io": nowhere, TEST_HOST: nowhere},
        "projects": {"team": {"match": [f"{TEST_HOST}/team/**"], "quota": "10MiB"}},
    }
    breakwater = Breakwater(folder, settings)
    breakwater.store.mkdir()
    with tarfile.open(STORES / f"{name}.tar.gz") as archive:
        archive.extractall(breakwater.store, filter="tar")
    return breakwater


def paths_of(host: str, name: str, tag: str, wanted: Image) -> dict[str, str]:
    """Every way to what a pull of it asked for, with the digest that the answer has."""
    below = {f"manifests/{each.digest}": each.digest for each in wanted.manifests()}
    below |= {f"blobs/{blob.digest}": blob.digest for blob in wanted.all_blobs()}
    return {
        f"/v2/{host}/{name}/{path}": digest for path, digest in {f"manifests/{tag}": wanted.digest, **below}.items()
    }


@pytest.mark.parametrize("name", ["first", "charged"])
def test_the_store_of_an_earlier_version_opens_and_serves_all_it_has(tmp_path: Path, name: str) -> None:
    """Issue 7, "upgrade": tags, digests, layers, referrers, links and what projects pay for are as they were; nothing
    is set aside; what is linked to one repository is not opened by another.
    """
    with kept(tmp_path / name, name) as breakwater:
        wanted = paths_of("docker.io", "library/app", "1", APP) | paths_of(TEST_HOST, "team/tool", "v1", TOOL)
        visits = [Visit(path) for path in wanted]
        visit_all(breakwater.port, visits)
        assert {visit.target: visit.digest for visit in visits} == wanted
        assert {visit.status for visit in visits} == {200}

        referrers = json.loads(read(breakwater.port, f"/v2/docker.io/library/app/referrers/{APP.digest}"))
        assert [each["digest"] for each in referrers["manifests"]] == [SBOM.digest]
        elsewhere = Visit(f"/v2/docker.io/library/other/blobs/{TOOL.all_blobs()[0].digest}")
        visit_all(breakwater.port, [elsewhere])
        assert elsewhere.status == 502, "nobody can be asked whether it is theirs, and here it is not"

        pays = len(TOOL.body) + sum(len(blob.content) for blob in TOOL.all_blobs())
        eventually(lambda: used_by(breakwater, "team") == pays, "what it pays for is counted")
        done = subprocess.run(
            [sys.executable, "-m", "proxy", "verify", "--json", "--config", str(breakwater.settings_path)],
            capture_output=True,
            timeout=START_S,
            check=True,
        )
        assert json.loads(done.stdout)["is_well"]
        assert list((breakwater.store / "breakwater" / "quarantine").iterdir()) == []
        breakwater.stop_cleanly()
        breakwater.start()
        visit_all(breakwater.port, again := [Visit(path) for path in wanted])
        assert {visit.target: visit.digest for visit in again} == wanted, "and at the start after that, too"
        breakwater.stop_cleanly()


def read(port: int, path: str) -> bytes:
    """A body that comes whole."""
    status, body = fetched(port, path)
    assert status == 200, body
    return body


def used_by(breakwater: Breakwater, project: str) -> int:
    """Bytes that a project pays for."""
    rows = breakwater.admin("/api/v1/usage")["projects"]
    return sum(int(each["used_bytes"]) for each in rows if each["project"] == project)


def test_the_store_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    """A downgrade is said to be one, with exit code 1, before anything of the store is touched."""
    breakwater = kept(tmp_path / "newer", "charged")
    ours = breakwater.store / "breakwater"
    (ours / "layout.json").write_text('{"layout": 2}')
    before = sorted(str(path) for path in ours.rglob("*"))
    ended = subprocess.run(
        [sys.executable, "-m", "proxy", "serve", "--config", str(breakwater.settings_path)],
        capture_output=True,
        env=dict(os.environ),
        timeout=START_S,
        check=False,
    )
    assert ended.returncode == 1
    assert b"layout 2" in ended.stderr and b"Traceback" not in ended.stderr
    after = sorted(str(path) for path in ours.rglob("*") if path.name != "lock")
    assert after == [path for path in before if not path.endswith("/lock")]
