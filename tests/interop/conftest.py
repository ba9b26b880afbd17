"""A real registry, the real Breakwater in front of it, and a check that nothing of them stays behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import TEST_HOST
from tests.support.origin import Origin
from tests.support.process import Breakwater, clear_away, mounts_in, processes_in


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A folder with a short path (a unix socket's has at most 107 bytes), empty of processes and mounts at the end."""
    folder = Path(tempfile.mkdtemp(prefix="bw-"))
    try:
        yield folder
        assert not processes_in(folder), f"still running in {folder}: {processes_in(folder)}"
        assert not mounts_in(folder), f"still mounted: {mounts_in(folder)}"
    finally:
        clear_away(folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def origin(scratch: Path) -> Iterator[Origin]:
    """A docker-registry with nothing in it."""
    with Origin(scratch / "origin") as running:
        yield running


def upstreams_at(url: str, **also: Any) -> dict[str, Any]:
    """Settings with which Docker Hub and the test's own source host are both at `url`."""
    one = {"url": url, **also}
    return {"server": {"default_upstream": "docker.io"}, "upstreams": {"docker.io": one, TEST_HOST: one}}


@pytest.fixture(scope="module")
def breakwater(scratch: Path, origin: Origin) -> Iterator[Breakwater]:
    """Breakwater in front of `origin`, with an empty store. Held to a clean end when the module is done."""
    with Breakwater(scratch / "breakwater", upstreams_at(origin.url)) as running:
        yield running
        if running.is_running:
            running.stop_cleanly()
