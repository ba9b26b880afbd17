"""Descriptors (image-spec, descriptor.md): media type, digest, size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from proxy.errors import InvalidManifest
from proxy.oci.digest import Digest


@dataclass(frozen=True, slots=True)
class Platform:
    """What an index says of a child: `linux/arm64/v8`."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Points at content. `size` in bytes."""

    media_type: str
    digest: Digest
    size: int
    platform: Platform | None = None
    artifact_type: str = ""
    annotations: dict[str, str] = field(default_factory=dict)
    #: image-spec § urls. Never dereferenced by us (CVE-2020-15157); kept so that a rule can refuse it.
    urls: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Any) -> Descriptor:
        """A descriptor from parsed JSON. Raises InvalidManifest or InvalidDigest for anything that is not one."""
        if not isinstance(value, dict):
            raise InvalidManifest("a descriptor is not a JSON object")
        media_type, digest, size = value.get("mediaType", ""), value.get("digest"), value.get("size")
        if not isinstance(media_type, str) or not isinstance(digest, str):
            raise InvalidManifest("a descriptor lacks its mediaType or digest")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
            raise InvalidManifest(f"the descriptor of {digest[:80]} has no usable size")
        platform = value.get("platform")
        annotations = value.get("annotations")
        urls = value.get("urls")
        return cls(
            media_type=media_type,
            digest=Digest.parse(digest),
            size=size,
            platform=_platform(platform) if isinstance(platform, dict) else None,
            artifact_type=artifact_type if isinstance(artifact_type := value.get("artifactType"), str) else "",
            annotations=(
                {k: v for k, v in annotations.items() if isinstance(v, str)} if isinstance(annotations, dict) else {}
            ),
            urls=tuple(u for u in urls if isinstance(u, str)) if isinstance(urls, list) else (),
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back to the same value. Fields that say nothing are left out."""
        value: dict[str, Any] = {"mediaType": self.media_type, "digest": str(self.digest), "size": self.size}
        if self.platform is not None:
            platform = {"architecture": self.platform.architecture, "os": self.platform.os}
            value["platform"] = platform | ({"variant": self.platform.variant} if self.platform.variant else {})
        if self.artifact_type:
            value["artifactType"] = self.artifact_type
        if self.annotations:
            value["annotations"] = dict(self.annotations)
        if self.urls:
            value["urls"] = list(self.urls)
        return value


def _platform(value: dict[str, Any]) -> Platform:
    def word(key: str) -> str:
        found = value.get(key, "")
        return found if isinstance(found, str) else ""

    return Platform(word("os"), word("architecture"), word("variant"))
