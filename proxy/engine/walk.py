"""Walks from a reference to everything that makes the image: manifests, blobs, referrers, signatures.

Where manifests come from is the source's business: through the read path with upstream behind it (prefetch), or from
what is here and nothing else (export, import). A document that names itself or a million others ends the walk, never
the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from proxy.engine.manifests import Held
from proxy.errors import BreakwaterError, Denied, InvalidManifest, NotFound
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.names import Tag, TagOrDigest
from proxy.rules.closure import Platforms, chosen, cosign_tags, is_carried

#: Manifests of one image, referrers included. The largest public indexes name some dozens.
MAX_MANIFESTS = 5_000
#: Indexes within indexes, and referrers of referrers.
MAX_DEPTH = 8


class Source(Protocol):
    """One repository as a walk sees it."""

    async def manifest(self, target: TagOrDigest) -> Held:
        """The manifest that `target` means. Raises a NotFound when there is none, or why it cannot be had."""
        ...

    async def referrers(self, digest: Digest) -> Iterable[Descriptor]:
        """What refers to `digest`. Raises like `manifest`."""
        ...


@dataclass(frozen=True, slots=True)
class Scope:
    """What of an image is wanted."""

    platforms: Platforms = field(default_factory=Platforms)
    referrers: bool = True


@dataclass(slots=True)
class Closure:
    """Everything that a reference leads to. `manifests` has children before what names them, `top` among them."""

    top: Held
    manifests: dict[Digest, Held] = field(default_factory=dict)
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)
    #: Children of indexes that the platforms leave out.
    left_out: dict[Digest, Descriptor] = field(default_factory=dict)
    #: Manifests that refer to others of these, in the order of `manifests`.
    referrers: list[Digest] = field(default_factory=list)
    #: Tags of cosign's scheme, and what they mean.
    tags: dict[Tag, Digest] = field(default_factory=dict)
    #: What should be there and could not be had: digest or tag, and why.
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Manifests and blobs together, each once."""
        bodies = sum(held.descriptor.size for held in self.manifests.values())
        return bodies + sum(blob.size for blob in self.blobs.values())

    def digests(self) -> dict[Digest, int]:
        """Every digest with its size in bytes: manifests first."""
        sizes = {digest: held.descriptor.size for digest, held in self.manifests.items()}
        return sizes | {digest: blob.size for digest, blob in self.blobs.items()}


async def closure_of(source: Source, target: TagOrDigest, scope: Scope) -> Closure:
    """Walk from `target`. Raises what the source raises for `target` itself; what is missing below it is reported."""
    top = await source.manifest(target)
    walk = _Walk(source, scope, Closure(top))
    await walk.into(top, 0)
    if scope.referrers:
        await walk.about([top, *(held for held in tuple(walk.closure.manifests.values()) if held is not top)])
    return walk.closure


class _Walk:
    def __init__(self, source: Source, scope: Scope, closure: Closure) -> None:
        self._source = source
        self._scope = scope
        self.closure = closure

    async def into(self, held: Held, depth: int) -> None:
        """A manifest and what it names; itself last."""
        closure, digest = self.closure, held.descriptor.digest
        if digest in closure.manifests:
            return
        if depth > MAX_DEPTH or len(closure.manifests) >= MAX_MANIFESTS:
            raise InvalidManifest(f"{closure.top.descriptor.digest} names more manifests, or deeper, than any image")
        manifest = held.manifest
        taken, left = chosen(manifest.children, self._scope.platforms, attestations=self._scope.referrers)
        if manifest.children and not taken:
            there = ", ".join(str(child.platform) for child in left if child.platform)
            closure.missing[str(digest)] = f"no child is for {self._scope.platforms}; there are {there}"
        closure.left_out.update((child.digest, child) for child in left)
        for child in taken:
            await self._into_child(child, depth)
        for blob in (manifest.config, *manifest.layers):
            if blob is not None and is_carried(blob):
                closure.blobs[blob.digest] = blob
        closure.manifests[digest] = held

    async def _into_child(self, child: Descriptor, depth: int) -> None:
        if child.digest in self.closure.manifests:
            return
        try:
            held = await self._source.manifest(child.digest)
        except BreakwaterError as error:
            self.closure.missing[str(child.digest)] = str(error)
            return
        await self.into(held, depth + 1)

    async def about(self, subjects: list[Held], depth: int = 0) -> None:
        """What refers to these, by the referrers API and by cosign's tags; and what refers to that."""
        found: list[Held] = []
        for subject in subjects:
            digest = subject.descriptor.digest
            try:
                for descriptor in await self._source.referrers(digest):
                    await self._take(descriptor.digest, found, str(descriptor.digest))
            except NotFound:
                pass
            except BreakwaterError as error:
                self.closure.missing[f"referrers of {digest}"] = str(error)
            for tag in cosign_tags(digest):
                if (held := await self._take(tag, found, tag.value)) is not None:
                    self.closure.tags[tag] = held.descriptor.digest
        if found and depth < MAX_DEPTH:
            await self.about(found, depth + 1)

    async def _take(self, target: TagOrDigest, found: list[Held], name: str) -> Held | None:
        if isinstance(target, Digest) and target in self.closure.manifests:
            return None
        try:
            held = await self._source.manifest(target)
        except (NotFound, Denied) as error:
            if isinstance(target, Digest):
                self.closure.missing[name] = str(error)
            return None  # a tag of cosign's that is not there, or may not be had, was never promised
        except BreakwaterError as error:
            self.closure.missing[name] = str(error)
            return None
        if held.descriptor.digest not in self.closure.manifests:
            await self.into(held, 1)
            self.closure.referrers.append(held.descriptor.digest)
            found.append(held)
        return held
