"""Manifests and indexes, read but never written.

Decides what a document is and what it names. The caller keeps the bytes and serves them as they came (INV-9); nothing
here re-serialises. The refusals close the gap between our reading of a document and a client's: a document that two
parsers understand differently can carry one image past a rule and another one into a runtime (CVE-2021-41190,
GHSA-mc8v-mgrf-8f4m). Most clients are written in Go, whose JSON reader takes the last of duplicated keys and does not
mind their case; so duplicated keys and keys that differ from ours only by case are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from proxy.errors import InvalidDigest, InvalidManifest
from proxy.oci.descriptor import Descriptor
from proxy.oci.mediatypes import INDEX_TYPES, KNOWN, OCI_INDEX, OCI_MANIFEST, SCHEMA1_TYPES, bare, is_index

#: distribution-spec § Pushing Manifests: a registry SHOULD take manifests of 4 MiB, and may refuse larger ones.
MAX_MANIFEST_BYTES = 4 * 1024 * 1024

_SCHEMA1_SENTENCE = (
    "this is a Docker schema 1 manifest, which was withdrawn in 2017 and is not served here; "
    "push the image again with a current client to republish it as schema 2 or OCI"
)

_DOCUMENT_KEYS = (
    "schemaVersion",
    "mediaType",
    "artifactType",
    "config",
    "layers",
    "manifests",
    "subject",
    "annotations",
)
_DESCRIPTOR_KEYS = ("mediaType", "digest", "size", "urls", "annotations", "data", "artifactType", "platform")
#: Folded spelling -> ours.
_FOLDED_DOCUMENT_KEYS = {key.casefold(): key for key in (*_DOCUMENT_KEYS, "fsLayers")}
_FOLDED_DESCRIPTOR_KEYS = {key.casefold(): key for key in _DESCRIPTOR_KEYS}

#: An escaped surrogate, paired or not: the sign that strings must be checked for ones that no encoding can carry.
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says. `media_type` is one of `mediatypes.KNOWN`.

    An index has `children` and neither `config` nor `layers`; every other manifest has a `config` and perhaps `layers`.
    """

    media_type: str
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()
    children: tuple[Descriptor, ...] = ()
    #: What this manifest refers to (image-spec, manifest.md § subject). Named, but not needed to use the image.
    subject: Descriptor | None = None
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_index(self) -> bool:
        """Whether this names manifests rather than blobs."""
        return is_index(self.media_type)

    @property
    def names(self) -> tuple[Descriptor, ...]:
        """Everything that belongs to it: children, config, layers, in this order, as often as it names them."""
        config = () if self.config is None else (self.config,)
        return (*self.children, *config, *self.layers)

    @property
    def referrer_type(self) -> str:
        """The artifactType under which the referrers API lists it: its own, else its config's media type.

        distribution-spec § Listing Referrers; "" for an index that has none.
        """
        if self.artifact_type or self.config is None:
            return self.artifact_type
        return self.config.media_type

    @property
    def said_type(self) -> str:
        """What it is beside its media type, for rules and records: for a referrer, the type under which it is listed."""
        return self.referrer_type if self.subject else self.artifact_type

    @classmethod
    def parse(cls, body: bytes, media_type: str) -> Manifest:
        """The manifest that `body` is. `media_type` is the Content-Type it came with, "" for none.

        The document's own mediaType decides; then a Content-Type that we know; then the shape. Raises InvalidManifest:
        over 4 MiB, not one JSON object in UTF-8, too deeply nested, keys that could be read in two ways, schema 1, an
        unknown type, a shape or a Content-Type that contradicts the type, a descriptor that is none.
        """
        if len(body) > MAX_MANIFEST_BYTES:
            raise InvalidManifest(f"a manifest of {len(body)} bytes is over the limit of {MAX_MANIFEST_BYTES}")
        document = read_object(body)
        resolved = _resolve(document, bare(media_type))
        subject, artifact_type = document.get("subject"), document.get("artifactType")
        annotations = document.get("annotations")
        return cls(
            media_type=resolved,
            config=None if resolved in INDEX_TYPES else _descriptor(document.get("config"), "config"),
            # Of these two, the one that does not belong to the type is absent, or `_resolve` would have refused.
            layers=_descriptors(document, "layers"),
            children=_descriptors(document, "manifests"),
            subject=None if subject is None else _descriptor(subject, "subject"),
            artifact_type=artifact_type if isinstance(artifact_type, str) else "",
            annotations=(
                {k: v for k, v in annotations.items() if isinstance(v, str)} if isinstance(annotations, dict) else {}
            ),
        )


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` is: strict UTF-8, no duplicated keys, no NaN, only strings that can be written again.

    Raises InvalidManifest for anything else, however deep, long or broken.
    """
    try:
        # Decoded here: json.loads would also take UTF-16 and UTF-32, which other readers do not.
        text = body.decode("utf-8")
        document = json.loads(text, object_pairs_hook=_unambiguous, parse_constant=_refuse_constant)
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise InvalidManifest("the document is nested too deeply to be a manifest") from None
    except ValueError as error:  # of which UnicodeError, JSONDecodeError and numbers of absurd length are kinds
        raise InvalidManifest(f"the document is not JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise InvalidManifest("the document is JSON, but not an object")
    return document


def _resolve(document: dict[str, Any], content_type: str) -> str:
    """The true media type, or InvalidManifest. A key that is present counts, even with null, as it does for clients."""
    _refuse_look_alikes(document, _FOLDED_DOCUMENT_KEYS)
    own = "" if document.get("mediaType") is None else document["mediaType"]
    if not isinstance(own, str):
        raise InvalidManifest("the document's mediaType is not a string")
    version = document.get("schemaVersion")
    if own in SCHEMA1_TYPES or content_type in SCHEMA1_TYPES or version == 1 or "fsLayers" in document:
        raise InvalidManifest(_SCHEMA1_SENTENCE)
    if type(version) is not int or version != 2:
        raise InvalidManifest("the document's schemaVersion is not 2")
    if own and own not in KNOWN:
        raise InvalidManifest(f"{own[:120]!r} is not a manifest type that is served here")
    if own and content_type in KNOWN and content_type != own:
        raise InvalidManifest(f"the document says it is {own}, but it was sent as {content_type}")
    names_manifests, names_blobs = "manifests" in document, "config" in document or "layers" in document
    if names_manifests and names_blobs:
        raise InvalidManifest("the document claims to be an index and an image manifest at once (CVE-2021-41190)")
    if not names_manifests and not names_blobs:
        raise InvalidManifest("the document names neither manifests nor a config")
    resolved = own or (content_type if content_type in KNOWN else OCI_INDEX if names_manifests else OCI_MANIFEST)
    if is_index(resolved) != names_manifests:
        raise InvalidManifest(f"the document is called {resolved}, but has the shape of another type (CVE-2021-41190)")
    return resolved


def _descriptors(document: dict[str, Any], key: str) -> tuple[Descriptor, ...]:
    values = document.get(key)
    if values is None:  # absent, or what Go writes for an empty list
        return ()
    if not isinstance(values, list):
        raise InvalidManifest(f"the document's {key} is not a list")
    return tuple([_descriptor(value, key) for value in values])


def _descriptor(value: Any, key: str) -> Descriptor:
    if not isinstance(value, dict):
        raise InvalidManifest(f"the document's {key} is missing or not a descriptor")
    _refuse_look_alikes(value, _FOLDED_DESCRIPTOR_KEYS)
    try:
        return Descriptor.from_json(value)
    except InvalidDigest as error:
        # InvalidDigest is what a client is told of its own request; this is somebody else's document.
        raise InvalidManifest(f"the document's {key} names {error}") from None


def _refuse_look_alikes(value: dict[str, Any], known: Mapping[str, str]) -> None:
    """`known` maps folded spellings to ours. casefold, because Go folds U+017F to s and U+212A to k as well."""
    for key in value:
        ours = known.get(key.casefold(), key)
        if ours != key:
            raise InvalidManifest(f"some readers take the key {key[:80]!r} for {ours!r} and others do not")


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise InvalidManifest("the document gives one key twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidManifest(f"{name} is not JSON")
