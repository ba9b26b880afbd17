"""What is carried in and out: prefetch, export, import, as commands ask for them.

Commands reach this through a running server's admin listener, or in a process of their own when none runs; the reports
are plain JSON either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from proxy.engine.prefetch import Prefetch, Step
from proxy.engine.walk import Scope
from proxy.errors import BadRequest
from proxy.oci.names import Reference
from proxy.rules.closure import Platforms

Tell = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Order:
    """What a command asks for. Made of JSON by `parse`."""

    references: tuple[Reference, ...]
    scope: Scope
    project: str | None = None
    pin: bool = False

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

    def __init__(self, prefetch: Prefetch) -> None:
        self._prefetch = prefetch

    async def prefetch(self, order: Order, tell: Tell) -> dict[str, Any]:
        """Fill the store. The report: `images`, each with what is missing of it, and totals."""

        def step(taken: Step) -> None:
            tell({"event": "step", **asdict(taken)})

        filled = await self._prefetch.run(
            order.references, order.scope, project=order.project, pin=order.pin, tell=step
        )
        return report_of([asdict(one) for one in filled])


def report_of(images: Sequence[Mapping[str, Any]], **also: Any) -> dict[str, Any]:
    """The report of any carrying: one entry for each image, and whether something is missing."""
    return {
        "event": "report",
        "images": list(images),
        "n_images": len(images),
        "n_missing": sum(bool(image["missing"]) for image in images),
        **also,
    }
