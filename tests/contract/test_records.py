"""ports.Records: every implementation passes the suite."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.ports import Records
from proxy.store.disk import DiskStore
from tests.contract.conftest import Store
from tests.contract.suites.records import RecordsSuite, StrictNamesSuite
from tests.support.clock import ManualClock


@pytest.fixture
def records(store: Store) -> Records:
    """One implementation."""
    return store.records


class TestRecords(RecordsSuite):
    """Over memory and disk."""


class TestRecordsOnDisk(StrictNamesSuite):
    """Over disk."""

    @pytest.fixture
    async def records(self, tmp_path: Path) -> AsyncIterator[Records]:
        """The implementation whose names become paths."""
        store = await DiskStore.open(tmp_path, clock=ManualClock(), report=print)
        yield store.records
        await store.aclose()
