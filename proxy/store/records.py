"""Tags and links at rest: one small checksummed file each, committed like a blob.

Each record says for itself which holding and which name it is for. A record that was moved, copied into another
holding or altered does not agree with its place or its checksum: it goes to quarantine and is absent, and costs
nothing else. A link is the right to see bytes (house.md conviction 9), so it must not be possible to give one by a
rename.

Never pickle: JSON, and only after the checksum agreed. One hop to a thread does all of a call, a folder of a thousand
links included; aiofiles would make three hops for each file.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from proxy.errors import BreakwaterError, StoreError
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import ALGORITHMS, Digest
from proxy.oci.names import Tag
from proxy.ports import Holding, LinkRecord, TagRecord
from proxy.store.checked_file import CheckedFiles, Ground
from proxy.store.filesystem import meaning
from proxy.store.layout import (
    MANIFESTS,
    NOT_OURS,
    SINGLE_BLOBS,
    TAGS,
    holding_folder,
    maybe_digest,
    maybe_holding,
)
from proxy.store.upkeep import taken_by

T = TypeVar("T")

#: No record is longer. A manifest has at most 4 MiB, and its link says little more than it does.
MAX_BYTES = 16 << 20

_KINDS = (TAGS, MANIFESTS, SINGLE_BLOBS)


class DiskRecords:
    """Tags and links as files below records/ (ports.Records)."""

    def __init__(self, ground: Ground) -> None:
        self._fs = ground.fs
        self._workers = ground.workers
        self._quarantine = ground.quarantine
        self._files = CheckedFiles(ground, ground.folders.records, "record", MAX_BYTES)

    # what the port asks for

    async def tag(self, holding: Holding, tag: Tag) -> TagRecord | None:
        """See ports.Records."""
        return await self._workers.run("reads", self._tag, holding, tag.value)

    async def put_tag(self, holding: Holding, record: TagRecord) -> None:
        """See ports.Records. Raises InvalidTag or InvalidName for what cannot be a name."""
        name = Tag.parse(record.tag).value
        await self._put(holding, (TAGS,), name, lambda: _tag_to_json(holding, record))

    async def links(self, holding: Holding) -> Sequence[LinkRecord]:
        """See ports.Records. Manifests first, each kind in the order of its digests."""
        return await self._workers.run("reads", self._links, holding)

    async def put_link(self, holding: Holding, record: LinkRecord) -> None:
        """See ports.Records."""
        digest = record.descriptor.digest
        parts = (MANIFESTS if record.is_manifest else SINGLE_BLOBS, digest.algorithm)
        await self._put(holding, parts, digest.hex, lambda: _link_to_json(holding, record))

    async def remove(self, holding: Holding, *, tags: Iterable[Tag] = (), links: Iterable[Digest] = ()) -> None:
        """See ports.Records. Durable when it returns: a link is a right, and a right that was taken stays taken."""
        names: dict[tuple[str, ...], list[str]] = {}
        for tag in tags:
            names.setdefault((TAGS,), []).append(tag.value)
        for digest in links:
            for kind in (MANIFESTS, SINGLE_BLOBS):
                names.setdefault((kind, digest.algorithm), []).append(digest.hex)
        await self._workers.run("syncs", self._remove, holding, names)

    async def scan(self) -> AsyncIterator[tuple[Holding, Sequence[TagRecord], Sequence[LinkRecord]]]:
        """See ports.Records.

        What cannot be a record is quarantined. Raises Unavailable when a folder cannot be read.
        """
        for holding in await self._workers.run("reads", self._holdings):
            tags, links = await self._workers.run("reads", self._all_of, holding)
            if tags or links:
                yield holding, tags, links

    # in a worker thread: reading

    def _tag(self, holding: Holding, name: str) -> TagRecord | None:
        found = self._each(holding, (TAGS,), lambda _: True, _json_to_tag, only=name)
        return found[0] if found else None

    def _tags(self, holding: Holding) -> list[TagRecord]:
        return self._each(holding, (TAGS,), _is_tag, _json_to_tag)

    def _links(self, holding: Holding) -> list[LinkRecord]:
        links: list[LinkRecord] = []
        for kind in (MANIFESTS, SINGLE_BLOBS):
            for algorithm in ALGORITHMS:
                is_known = _names_a_digest(algorithm)
                links += self._each(holding, (kind, algorithm), is_known, _json_to_link)
        return links

    def _all_of(self, holding: Holding) -> tuple[list[TagRecord], list[LinkRecord]]:
        return self._tags(holding), self._links(holding)

    def _each(
        self,
        holding: Holding,
        kind: tuple[str, ...],
        is_known: Callable[[str], bool],
        parse: Callable[[Holding, tuple[str, ...], Any], T],
        *,
        only: str = "",
    ) -> list[T]:
        """The records of one folder (or the one called `only`), without the damaged ones."""
        parts = (*holding_folder(holding), *kind)
        found: list[T] = []
        try:
            with self._files.opened(parts) as at:
                for name in [only] if only else sorted(self._fs.names(at)):
                    where = f"the record {'/'.join((*parts, name))}"
                    if not is_known(name):
                        self._quarantine.take(at, name, f"{where} has no proper name")
                        continue
                    payload = self._files.read(at, name, where)
                    if payload is None:
                        continue
                    try:
                        found.append(parse(holding, (*kind, name), json.loads(payload)))
                    except (BreakwaterError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                        self._quarantine.take(at, name, f"{where} makes no sense ({error})")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise meaning(error, f"cannot read the records of {holding}") from error
        return found

    # in a worker thread: finding every holding

    def _holdings(self) -> list[Holding]:
        found: list[Holding] = []
        folders: list[tuple[str, ...]] = [()]
        while folders:
            parts = folders.pop()
            below, has_records = self._below(parts)
            folders += ((*parts, name) for name in reversed(below))
            holding = maybe_holding(parts) if has_records else None
            if holding is not None:
                found.append(holding)
        return found

    def _below(self, parts: tuple[str, ...]) -> tuple[list[str], bool]:
        """The folders below that belong to holdings, and whether this one holds records itself."""
        where = "/".join(("records", *parts))
        try:
            with self._files.opened(parts) as at:
                names = sorted(set(self._fs.names(at)) - NOT_OURS)
                below = [name for name in names if _may_be_below(parts, name)]
                has_records = maybe_holding(parts) is not None and any(name in _KINDS for name in names)
                for name in names:
                    if name not in below and not (has_records and name in _KINDS):
                        self._quarantine.take(at, name, f"{where} had {name[:150]!r}, which is not of this store")
        except FileNotFoundError:
            return [], False
        except OSError as error:
            raise meaning(error, f"cannot list {where}") from error
        return below, has_records

    # in a worker thread: writing

    async def _put(
        self, holding: Holding, kind: tuple[str, ...], name: str, to_json: Callable[[], dict[str, Any]]
    ) -> None:
        parts = (*holding_folder(holding), *kind)
        # Made in a thread, a manifest may name thousands; and before the writing, for which room is made by its length.
        payload = await self._workers.run("reads", lambda: _payload(to_json()))
        await self._files.kept(len(payload), len(parts), self._written, holding, parts, name, payload)

    def _written(self, holding: Holding, parts: tuple[str, ...], name: str, payload: bytes) -> None:
        try:
            self._files.put(parts, name, payload)
        except OSError as error:
            raise meaning(error, f"cannot write a record of {holding}") from error

    def _remove(self, holding: Holding, names: Mapping[tuple[str, ...], Sequence[str]]) -> None:
        parts = holding_folder(holding)
        for kind, some in names.items():
            try:
                with self._files.opened((*parts, *kind)) as at:
                    n_removed = sum(self._is_removed(at, name) for name in some)
                    if n_removed:
                        self._fs.fsync_folder(at)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise meaning(error, f"cannot remove records of {holding}") from error
        # Folders that are empty now stay: removing one races with a record that is being put into it.

    def _is_removed(self, at: int, name: str) -> bool:
        try:
            n_bytes = taken_by(self._fs.look(at, name))
            self._fs.unlink(at, name)
            self._files.upkeep.took(-n_bytes)
        except FileNotFoundError:
            return False
        except IsADirectoryError:
            self._quarantine.take(at, name, f"a folder was in the place of the record {name}")
        return True


# -- names ------------------------------------------------------------------------------------------------------------


def _is_tag(name: str) -> bool:
    try:
        return Tag.parse(name).value == name
    except BreakwaterError:
        return False


def _names_a_digest(algorithm: str) -> Callable[[str], bool]:
    return lambda name: maybe_digest(algorithm, name) is not None


def _may_be_below(parts: tuple[str, ...], name: str) -> bool:
    """Whether `name` below `parts` can be a project, a host or an element of a repository's name."""
    if name in _KINDS:
        return False
    guess = (*parts, name)
    return maybe_holding(guess + ("p", "h", "r")[len(guess) :]) is not None


# -- records as JSON --------------------------------------------------------------------------------------------------


def _payload(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _tag_to_json(holding: Holding, record: TagRecord) -> dict[str, Any]:
    return {
        "holding": [holding.project, holding.host, holding.repository],
        "tag": record.tag,
        "descriptor": _descriptor_to_json(record.descriptor),
        "validatedAt": record.validated_at,
        "source": record.source,
    }


def _json_to_tag(holding: Holding, place: tuple[str, ...], value: dict[str, Any]) -> TagRecord:
    _agree(holding, value)
    record = TagRecord(
        tag=str(value["tag"]),
        descriptor=Descriptor.from_json(value["descriptor"]),
        validated_at=float(value["validatedAt"]),
        source=str(value["source"]),
    )
    if place != (TAGS, record.tag):
        raise StoreError(f"it is the tag {record.tag[:150]!r}")
    return record


def _link_to_json(holding: Holding, record: LinkRecord) -> dict[str, Any]:
    value: dict[str, Any] = {
        "holding": [holding.project, holding.host, holding.repository],
        "isManifest": record.is_manifest,
        "descriptor": _descriptor_to_json(record.descriptor),
        "names": [_descriptor_to_json(descriptor) for descriptor in record.names],
    }
    if record.subject is not None:
        value["subject"] = str(record.subject)
    if record.artifact_type:
        value["artifactType"] = record.artifact_type
    if record.annotations:
        value["annotations"] = dict(record.annotations)
    if record.tags:
        value["tags"] = list(record.tags)
    return value


def _json_to_link(holding: Holding, place: tuple[str, ...], value: dict[str, Any]) -> LinkRecord:
    _agree(holding, value)
    record = LinkRecord(
        descriptor=Descriptor.from_json(value["descriptor"]),
        is_manifest=bool(value["isManifest"]),
        names=tuple(Descriptor.from_json(name) for name in value["names"]),
        subject=Digest.parse(value["subject"]) if "subject" in value else None,
        artifact_type=str(value.get("artifactType", "")),
        annotations={str(key): str(text) for key, text in value.get("annotations", {}).items()},
        tags=tuple(str(tag) for tag in value.get("tags", ())),
    )
    digest = record.descriptor.digest
    if place != (MANIFESTS if record.is_manifest else SINGLE_BLOBS, digest.algorithm, digest.hex):
        raise StoreError(f"it is the link to {digest}")
    return record


def _agree(holding: Holding, value: dict[str, Any]) -> None:
    if value["holding"] != [holding.project, holding.host, holding.repository]:
        raise StoreError("it belongs to another holding")


def _descriptor_to_json(descriptor: Descriptor) -> dict[str, Any]:
    """As image-spec § Properties spells it; the counterpart of Descriptor.from_json."""
    value: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": str(descriptor.digest),
        "size": descriptor.size,
    }
    if descriptor.platform is not None:
        platform = descriptor.platform
        value["platform"] = {"os": platform.os, "architecture": platform.architecture, "variant": platform.variant}
    if descriptor.artifact_type:
        value["artifactType"] = descriptor.artifact_type
    if descriptor.annotations:
        value["annotations"] = descriptor.annotations
    if descriptor.urls:
        value["urls"] = list(descriptor.urls)
    return value
