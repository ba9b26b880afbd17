"""What is carried in and out: prefetch, export, import, as commands ask for them.

Commands reach this through a running server's admin listener, or in a process of their own when none runs; the reports
are plain JSON either way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from proxy.engine.export import Export, Plan
from proxy.engine.intake import Import, Terms
from proxy.engine.prefetch import Prefetch, Step
from proxy.engine.seal import Seal
from proxy.engine.walk import Scope
from proxy.errors import BadRequest
from proxy.oci.layout import Contents
from proxy.oci.names import Reference
from proxy.ports import Member
from proxy.rules.closure import Platforms

Tell = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Order:
    """What a command asks for. Made of JSON by `parse`."""

    references: tuple[Reference, ...]
    scope: Scope
    project: str | None = None
    pin: bool = False
    #: The list of `[prefetch]`, and so all that is to be here at all times. Never asked for by a command.
    is_list: bool = False

    @classmethod
    def parse(cls, value: Any) -> Order:
        """Raises BadRequest, InvalidName, InvalidTag or InvalidDigest for anything that is not an order."""
        if not isinstance(value, dict):
            raise BadRequest("an order is a JSON object")
        texts, platforms, project = value.get("references", []), value.get("platforms", "all"), value.get("project")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadRequest("references: expected a list of strings")
        if project is not None and not isinstance(project, str):
            raise BadRequest("project: expected a string")
        if not isinstance(platforms, str):
            raise BadRequest("platforms: expected a string")
        try:
            wanted = Platforms.parse(platforms)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        return cls(
            tuple(Reference.parse(text) for text in texts),
            Scope(wanted, referrers=value.get("referrers") is not False),
            project,
            pin=value.get("pin") is True,
        )

    def as_json(self) -> dict[str, Any]:
        """What `parse` reads back."""
        return {
            "references": [str(reference) for reference in self.references],
            "platforms": str(self.scope.platforms),
            "referrers": self.scope.referrers,
            "project": self.project,
            "pin": self.pin,
        }


class Freight:
    """Prefetch, export and import of this process."""

    def __init__(
        self,
        prefetch: Prefetch,
        export: Export,
        import_: Import,
        seal: Seal,
        *,
        framed: Callable[[AsyncIterator[Member]], AsyncIterator[bytes]],
        members_of: Callable[[AsyncIterator[bytes]], AsyncIterator[Member]],
    ) -> None:
        """`framed` and `members_of` write and read the archive that members travel in."""
        self._prefetch = prefetch
        self._export = export
        self._import = import_
        self._seal = seal
        self._framed = framed
        self._members_of = members_of
        #: Imports wait for each other: two that bring the same blobs would reserve them twice.
        self._importing = asyncio.Lock()

    async def prefetch(self, order: Order, tell: Tell) -> dict[str, Any]:
        """Fill the store. The report: `images`, each with what is missing of it, and totals."""

        def step(taken: Step) -> None:
            tell({"event": "step", **asdict(taken)})

        filled = await self._prefetch.run(
            order.references, order.scope, project=order.project, pin=order.pin, is_list=order.is_list, tell=step
        )
        return report_of([asdict(one) for one in filled])

    async def plan_export(self, order: Order, since: Sequence[Contents] = ()) -> tuple[Plan, dict[str, Any]]:
        """What a bundle would hold, and the report. Without references it is all that the project has."""
        references: Sequence[Reference] = order.references
        if not references and order.project is not None:
            references = await self._export.references_of(order.project)
        if not references:
            raise BadRequest("there is nothing to export: name images, or a project that has some")
        plan = await self._export.plan(references, order.scope, project=order.project, since=since)
        return plan, report_of(plan.images, bundle_bytes=plan.contents.n_bytes, n_blobs=len(plan.contents.members))

    def bundle(self, plan: Plan, tell: Tell) -> AsyncIterator[bytes]:
        """The bundle itself. Raises what `Export.members` raises, in the middle of it."""
        return self._framed(self._export.members(plan, tell))

    async def take(self, archive: AsyncIterator[bytes], terms: Terms, tell: Tell) -> dict[str, Any]:
        """Import an archive. Raises BadArchive or OutOfSpace, and then nothing of it stays."""
        async with self._importing:
            taken = await self._import.run(self._members_of(archive), terms, tell)
            whole = sum(not image["missing"] for image in taken["images"])
            if whole:
                await self._seal.add(taken["contents"], whole)
        return report_of(taken["images"], contents=taken["contents"])


def report_of(images: Sequence[Mapping[str, Any]], **also: Any) -> dict[str, Any]:
    """The report of any carrying: one entry for each image, and whether something is missing."""
    return {
        "event": "report",
        "images": list(images),
        "n_images": len(images),
        "n_missing": sum(bool(image["missing"]) for image in images),
        **also,
    }
