"""Bundles: images out of one store (export.py) and into another (intake.py, brought.py), as members of an OCI layout.

Here is what both directions need of a store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.engine.capacity import Capacity
from proxy.engine.charges import Charges
from proxy.engine.links import Links
from proxy.engine.manifests import Manifests
from proxy.engine.pins import Pins
from proxy.engine.pull import Pull
from proxy.engine.shelf import Shelf
from proxy.engine.tags import Tags
from proxy.engine.tasks import TaskOwner
from proxy.engine.verification import Verification
from proxy.oci.digest import Digest
from proxy.oci.endpoints import RepositoryPath
from proxy.oci.names import Reference
from proxy.ports import BlobStore, Clock, Records
from proxy.rules.routes import Route

#: What is read and written in one hop.
PIECE_BYTES = 1 << 20

Tell = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What both directions need."""

    pull: Pull
    blobs: BlobStore
    records: Records
    links: Links
    manifests: Manifests
    verification: Verification
    tags: Tags
    capacity: Capacity
    charges: Charges
    pins: Pins
    clock: Clock
    owner: TaskOwner

    def shelf(self, route: Route) -> Shelf:
        """A repository as it is here."""
        rules = self.pull.plan.rules[route.project]
        return Shelf(route, rules, records=self.records, links=self.links, manifests=self.manifests)

    def route(self, reference: Reference, project: str | None) -> Route:
        """Where a reference belongs. Raises UnknownName for an upstream or a project that is not configured."""
        return self.pull.plan.routes.route(RepositoryPath(project, reference.repository.value), reference.host.value)

    def is_here(self, digest: Digest, size: int) -> bool:
        """Whether the store has it, in this size."""
        return self.capacity.ledger.size_of(digest) == size
