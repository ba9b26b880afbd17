"""The implementations that every suite runs over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.contract.suites")

from proxy.store.disk import DiskStore  # noqa: E402 – after the rewrite was asked for
from proxy.store.memory import MemoryStore  # noqa: E402
from tests.support.clock import ManualClock  # noqa: E402

Store = DiskStore | MemoryStore


@pytest.fixture(params=["memory", "disk"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """A store, empty, of each kind; on disk nothing may have had to be reported at its end."""
    if request.param == "memory":
        made: Store = MemoryStore()
        yield made
        await made.aclose()
        return
    reports: list[str] = []
    made = await DiskStore.open(tmp_path, clock=ManualClock(), report=reports.append)
    yield made
    await made.aclose()
    assert reports == [], "a store that nobody harmed reports nothing"
