"""The images that a bundle has brought: what they are called, what they cost each project, and their links.

All or nothing for each image: its links, its charges and its tag come when all of it is there, the tag last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.engine.bundle import Parts, Tell
from proxy.engine.manifests import Held, holding_of
from proxy.engine.pull import check_closure
from proxy.engine.shelf import Arrived
from proxy.engine.walk import Closure, Scope, closure_of
from proxy.errors import BadArchive, BreakwaterError, OutOfSpace, StoreError
from proxy.oci import layout
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.layout import Contents
from proxy.oci.names import Reference, Tag
from proxy.ports import TagRecord
from proxy.rules.closure import Platforms
from proxy.rules.gates.allowlist import Rules
from proxy.rules.routes import Route

#: Whether a blob of this size is there, or will be once the archive has ended.
Has = Callable[[Digest, int], bool]


@dataclass(frozen=True, slots=True)
class _Named:
    """An entry of index.json that is an image of its own."""

    entry: Descriptor
    reference: Reference


class Brought:
    """The images of one bundle. Ends with `release`, which may come again."""

    def __init__(
        self,
        parts: Parts,
        contents: Contents | None,
        index: Iterable[Descriptor],
        name: str = "",
        project: str | None = None,
        *,
        pin: bool = False,
    ) -> None:
        """`contents` of an archive that has none is None. `name` is for images that have none, or only a tag."""
        self._parts = parts
        self._contents = contents
        self._project = project
        self._pin = pin
        self._named: list[_Named] = []
        self._unnamed: list[Descriptor] = []
        #: Images that have a name which is none, reported as they are.
        self._misnamed: list[dict[str, Any]] = []
        #: Room that was found for each project, digest by digest, and is not charged yet.
        self._promised: dict[str, dict[Digest, int]] = {}
        #: Not to be evicted, here or from a quota, before it is linked: also what is here and comes late in the archive.
        self._held: list[Digest] = []
        #: Everything that something links to now.
        self.linked: set[Digest] = set()
        entries = tuple(index)
        for entry in entries:
            reference, why = _reference_of(entry, name, alone=len(entries) == 1)
            if reference is not None:
                self._named.append(_Named(entry, reference))
            elif why:
                self._misnamed.append(_image(str(entry.digest), missing={"name": why}))
            else:
                self._unnamed.append(entry)

    @property
    def _entries(self) -> list[Descriptor]:
        return [*self._unnamed, *(named.entry for named in self._named)]

    # -- room -------------------------------------------------------------------------------------------------------

    async def find_room(self, waiting: Mapping[Digest, Held], has: Has) -> None:
        """Promise each project's quota for the images that will be whole, and judge the pins.

        `waiting`: manifests that are not in the store yet. Raises OutOfSpace when one project, or the pins, have no
        room: then nothing is promised, and nothing was evicted for it.
        """
        parts, arrived = self._parts, Arrived(self._parts.manifests, waiting, self._entries)
        costs: dict[str, dict[Digest, int]] = {}
        for image in self._named:
            try:
                route, closure = await self._closure(image, arrived)
            except BreakwaterError:
                continue  # it will be reported and not linked, and costs nothing
            if not self._missing(closure, has):
                costs.setdefault(route.project, {}).update(sizes := closure.digests())
                for digest in sizes:
                    parts.capacity.hold(digest)
                    self._held.append(digest)
        if self._pin:
            parts.pins.check({digest: size for sizes in costs.values() for digest, size in sizes.items()})
        unpaid = {
            project: {digest: size for digest, size in sizes.items() if digest not in parts.charges.book.of(project)}
            for project, sizes in costs.items()
        }
        for project, sizes in unpaid.items():
            parts.charges.check_room(project, sum(sizes.values()), "the import")
        for project, sizes in unpaid.items():
            if parts.charges.reserve(project, sum(sizes.values())):
                self._promised[project] = sizes

    def release(self) -> None:
        """What was promised and not charged is free again, and what is here may go."""
        while self._promised:
            project, unpaid = self._promised.popitem()
            self._parts.charges.book.release(project, sum(unpaid.values()))
        while self._held:
            self._parts.capacity.unhold(self._held.pop())

    # -- linking ----------------------------------------------------------------------------------------------------

    async def link(self, arrived: Mapping[Digest, int], tell: Tell) -> list[dict[str, Any]]:
        """Link every image that is whole. `arrived`: all that the archive had. The report of each image.

        Raises OutOfSpace or BadArchive, and then what is linked stays.
        """
        source = Arrived(self._parts.manifests, {}, self._entries)
        images = [*self._misnamed]
        for image in self._named:
            images.append(await self._link(image, source, tell))
        # A referrer goes with its subject, and so do the words about it; one whose subject never came is told.
        going_along = {found.digest for subject in arrived for found in await source.referrers(subject)}
        for entry in self._unnamed:
            if entry.digest not in self.linked | going_along:
                images.append(_image(str(entry.digest), missing={"name": "it has no name: give it one with --name"}))
        return images

    async def _link(self, image: _Named, source: Arrived, tell: Tell) -> dict[str, Any]:
        name, closure = str(image.reference), None
        try:
            route, closure = await self._closure(image, source)
            missing = self._missing(closure, self._parts.is_here)
            if not missing:
                await self._publish(route, image, closure)
                self.linked |= closure.digests().keys()
        except (BadArchive, OutOfSpace):
            raise
        except BreakwaterError as error:
            closure, missing = None, {name: str(error)}
        tell({"event": "step", "what": "missing" if missing else "done", "reference": name})
        return _image(name, str(image.entry.digest), closure, missing)

    async def _closure(self, image: _Named, source: Arrived) -> tuple[Route, Closure]:
        """Where an image belongs and all that makes it. Raises Denied by the rules there, or what the walk raises."""
        route = self._parts.route(image.reference, self._project)
        rules = self._parts.pull.plan.rules[route.project]
        _check_name(rules, route, image.reference)
        closure = await closure_of(source, image.entry.digest, Scope(Platforms()))
        for held in closure.manifests.values():
            check_closure(route, rules, held)
        return route, closure

    def _missing(self, closure: Closure, has: Has) -> dict[str, str]:
        """What an image cannot do without: every blob of every manifest that is there, and one child of an index."""
        left_out = self._contents.left_out if self._contents is not None else frozenset()
        missing: dict[str, str] = {}
        for held in closure.manifests.values():
            children = held.manifest.children
            gone = [child.digest for child in children if child.digest not in closure.manifests]
            if children and len(gone) == len(children):
                missing[str(held.descriptor.digest)] = "none of its children is in the bundle or here"
            elif self._contents is not None and self._contents.n_images:
                missing |= {str(d): "it is neither in the bundle nor here" for d in gone if d not in left_out}
        for digest, blob in closure.blobs.items():
            if not has(digest, blob.size):
                missing[str(digest)] = "it is neither in the bundle nor here"
        return missing

    async def _publish(self, route: Route, image: _Named, closure: Closure) -> None:
        """Links first, children before parents; the tag's record last: nobody sees an image that is not whole."""
        parts, holding = self._parts, holding_of(route)
        sizes = closure.digests()
        self._pay(route.project, sizes)
        if self._pin:
            await parts.pins.add(str(image.reference), self._project or "", sizes)
        if parts.pull.plan.origins.of(route).tag_policy.sealed:
            parts.pins.keep_sealed(sizes)
        tag = image.reference.target if isinstance(image.reference.target, Tag) else None
        for digest, held in closure.manifests.items():
            is_top = digest == closure.top.descriptor.digest
            await parts.links.put_manifest(holding, held.descriptor, held.manifest, tag if is_top else None)
        parts.manifests.learned(holding, [*closure.manifests, *((tag,) if tag else ())])
        if tag is not None:
            await parts.tags.learn(holding, self._record(tag, image.entry, closure.top))

    def _pay(self, project: str, sizes: Mapping[Digest, int]) -> None:
        """The project pays for the image, all of it or none. Raises StoreError when its quota does not reach."""
        charges, promised = self._parts.charges, self._promised.get(project, {})
        charges.book.release(project, sum(promised.pop(digest, 0) for digest in sizes))
        unpaid = sum(size for digest, size in sizes.items() if digest not in charges.book.of(project))
        if not charges.made_room(project, unpaid):
            raise StoreError(f"the quota of project {project!r} has no room for it")
        for digest in sizes:
            charges.use(project, digest)

    def _record(self, tag: Tag, entry: Descriptor, top: Held) -> TagRecord:
        try:
            validated_at = float(entry.annotations.get(layout.VALIDATED_AT, ""))
        except ValueError:
            validated_at = self._parts.clock.wall()
        source = entry.annotations.get(layout.SOURCE, "")[:200] or "an imported archive"
        return TagRecord(tag.value, top.descriptor, min(validated_at, self._parts.clock.wall()), source)


def _check_name(rules: Rules, route: Route, reference: Reference) -> None:
    if isinstance(reference.target, Tag):
        rules.check_tag(route.reference, reference.target)
    else:
        rules.check_repository(route.reference)


def _image(
    name: str, digest: str = "", closure: Closure | None = None, missing: Mapping[str, str] | None = None
) -> dict[str, Any]:
    return {
        "reference": name,
        "digest": digest,
        "n_manifests": len(closure.manifests) if closure else 0,
        "n_blobs": len(closure.blobs) if closure else 0,
        "n_bytes": closure.n_bytes if closure else 0,
        "n_referrers": len(closure.referrers) if closure else 0,
        "missing": dict(missing or {}),
    }


def _reference_of(entry: Descriptor, name: str, *, alone: bool) -> tuple[Reference | None, str]:
    """What an entry of index.json is called, and why it is called nothing when it has a name that is none.

    Ours, then containerd's, then the layout's own, which many tools give a bare tag: then `name` says the repository.
    """
    annotations = entry.annotations
    full = annotations.get(layout.REFERENCE) or annotations.get(layout.IMAGE_NAME) or ""
    text = annotations.get(layout.REF_NAME, "")
    if not full and "/" in text:
        full = text
    if not full and name and (text or alone):
        has_tag = ":" in name.rpartition("/")[2] or "@" in name
        full = name if has_tag or not text else f"{name}:{text}"
    if not full:
        return None, f"its name is only {text!r}: say the repository with --name" if text else ""
    try:
        return Reference.parse(full), ""
    except BreakwaterError as error:
        return None, str(error)
