"""ports.BlobStore: every implementation passes the suite."""

from __future__ import annotations

import pytest

from proxy.ports import BlobStore
from tests.contract.conftest import Store
from tests.contract.suites.blob_store import BlobStoreSuite


@pytest.fixture
def blobs(store: Store) -> BlobStore:
    """One implementation."""
    return store.blobs


class TestBlobStore(BlobStoreSuite):
    """Over memory and disk."""
