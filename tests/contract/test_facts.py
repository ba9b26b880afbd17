"""ports.Facts: every implementation passes the suite."""

from __future__ import annotations

import pytest

from proxy.ports import Facts
from tests.contract.conftest import Store
from tests.contract.suites.facts import FactsSuite


@pytest.fixture
def facts(store: Store) -> Facts:
    """One implementation."""
    return store.facts


class TestFacts(FactsSuite):
    """Over memory and disk."""
