"""What a store was made of and when: the imports, remembered in a note of the store and told by status."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from proxy.engine.tasks import TaskOwner
from proxy.ports import Notes

NOTE, VERSION = "seal", 1
#: Imports remembered; the oldest are forgotten, and only counted.
MAX_IMPORTS = 100


class Seal:
    """The imports of this store, latest last. True for this process."""

    def __init__(self, notes: Notes, owner: TaskOwner) -> None:
        self._notes = notes
        self._owner = owner
        self._imports: list[dict[str, Any]] = []
        self._n_imports = 0

    async def load(self) -> None:
        """Read the note; one that makes no sense is as good as none. Raises Unavailable."""
        body = await self._notes.get(NOTE)
        try:
            document = json.loads(body) if body else {}
            if document.get("version") == VERSION:
                self._imports = [dict(one) for one in document["imports"]]
                self._n_imports = int(document["n_imports"])
        except (ValueError, KeyError, TypeError, AttributeError):
            self._imports, self._n_imports = [], 0

    async def add(self, summary: Mapping[str, Any], n_images: int) -> None:
        """Something was imported. Raises OutOfSpace or Unavailable when that cannot be written down."""
        self._imports = [*self._imports, {**summary, "n_images": n_images}][-MAX_IMPORTS:]
        self._n_imports += 1
        document = {"version": VERSION, "n_imports": self._n_imports, "imports": self._imports}
        await self._owner.uninterrupted(self._notes.put(NOTE, json.dumps(document).encode()), "write the seal")

    def as_json(self) -> dict[str, Any]:
        """For status: how many imports there were, and the latest of them."""
        return {"n_imports": self._n_imports, "imports": self._imports[-10:]}
