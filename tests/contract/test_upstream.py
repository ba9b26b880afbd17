"""ports.Upstream: every implementation passes the suite."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.contract.suites.upstream import IMAGE, REPOSITORY, SIGNATURE, TAGS, UpstreamSuite, World
from tests.support.registry import Guard, ScriptedRegistry
from tests.support.upstream import asking


@pytest.fixture(params=["open", "bearer"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """The client, over a real socket, to a registry that is open to all and to one that wants tokens."""
    guard = Guard(scheme="bearer") if request.param == "bearer" else None
    async with ScriptedRegistry(guard=guard) as registry, asking(registry) as asked:
        registry.put(str(REPOSITORY), IMAGE, *TAGS)
        registry.put(str(REPOSITORY), SIGNATURE)
        yield World(asked.client, lambda content, algorithm: registry.put_blob(str(REPOSITORY), content, algorithm))


class TestRegistryClient(UpstreamSuite):
    """Over HTTP."""
