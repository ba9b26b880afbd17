"""ports.Upstream: the double that the engine's tests ask passes the suite first (house.md conviction 6)."""

from __future__ import annotations

import pytest

from tests.contract.suites.upstream import IMAGE, REPOSITORY, SIGNATURE, TAGS, UpstreamSuite, World
from tests.support.engine import FakeUpstream


@pytest.fixture
def world() -> World:
    """A fake that has what the suite asks for."""
    upstream = FakeUpstream()
    upstream.put(IMAGE, *TAGS, repository=REPOSITORY)
    upstream.put(SIGNATURE, repository=REPOSITORY)
    return World(upstream, lambda content, algorithm: upstream.put_blob(content, algorithm, repository=REPOSITORY))


class TestFakeUpstream(UpstreamSuite):
    """In memory."""
