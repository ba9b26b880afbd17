"""A client of the scripted upstream, with owned tasks, a clock that stands still, and a record of what it sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from proxy.engine.tasks import TaskOwner
from proxy.events import UpstreamAsked, UpstreamBytes, UpstreamUnreached
from proxy.oci.names import Repository
from proxy.upstream.client import RegistryClient
from proxy.upstream.policy import UpstreamPolicy
from proxy.upstream.wire import Lookup, system_lookup
from tests.support.clock import ManualClock
from tests.support.registry import ScriptedRegistry

#: The source host in every sentence and event of these clients.
HOST = "registry.test"
ALPINE = Repository.parse("library/alpine")


class Asking:
    """A client with what surrounds it."""

    def __init__(self, client: RegistryClient, clock: ManualClock, owner: TaskOwner) -> None:
        self.client = client
        self.clock = clock
        self.owner = owner
        self.seen: list[UpstreamAsked | UpstreamUnreached | UpstreamBytes] = []

    @property
    def asked(self) -> list[tuple[str, str, int]]:
        """(kind, method, status) of every request that the client says it sent."""
        return [(one.kind, one.method, one.status) for one in self.seen if isinstance(one, UpstreamAsked)]

    @property
    def n_bytes(self) -> int:
        """Body bytes that the client says it received."""
        return sum(one.n_bytes for one in self.seen if isinstance(one, UpstreamBytes))


@asynccontextmanager
async def asking(
    registry: ScriptedRegistry | str, *, lookup: Lookup = system_lookup, **policy: Any
) -> AsyncIterator[Asking]:
    """A client of `registry` (or of the upstream at a URL); `policy` are fields of UpstreamPolicy."""
    url = registry if isinstance(registry, str) else registry.url
    clock, owner = ManualClock(), TaskOwner(print)
    seen: list[UpstreamAsked | UpstreamUnreached | UpstreamBytes] = []
    client = RegistryClient(
        UpstreamPolicy(HOST, url, **policy),
        clock=clock,
        spawn=owner.spawn,
        observer=seen.append,
        lookup=lookup,
        chance=lambda: 0.0,
    )
    asked = Asking(client, clock, owner)
    asked.seen = seen
    try:
        yield asked
        assert len(client._wire) == 0, "an answer was not closed"
    finally:
        await owner.aclose()
        await client.aclose()
