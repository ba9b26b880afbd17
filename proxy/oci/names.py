"""Names of the distribution-spec, parsed once into values that cannot be wrong.

Grammar: distribution-spec § Pulling manifests (name and reference), with `fullmatch` throughout (`match` with `$`
accepts a trailing newline).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from proxy.errors import InvalidName, InvalidTag
from proxy.oci.digest import Digest

#: One element of a repository name, as a pattern.
COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{COMPONENT}(?:/{COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
#: A registry host in lower case, as a pattern: a DNS name, an IPv4 address or an IPv6 address in brackets; and a port.
HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::[0-9]{{1,5}})?"
_HOST = re.compile(HOST)

#: Many clients refuse host plus name beyond this (distribution-spec § Pulling manifests).
MAX_NAME = 255


@dataclass(frozen=True, slots=True, order=True)
class SourceHost:
    """The registry host as clients name it: `docker.io`, `registry.test:5000`. A key to look up, never to dial."""

    value: str

    @classmethod
    def parse(cls, text: str) -> SourceHost:
        """The host that `text` names, in lower case. Raises InvalidName."""
        lowered = text.lower()
        if len(lowered) > MAX_NAME or not _HOST.fullmatch(lowered):
            raise InvalidName(f"{text[:150]!r} is not a registry host")
        return cls(lowered)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, order=True)
class Repository:
    """A repository within a registry: `library/alpine`."""

    value: str

    @classmethod
    def parse(cls, text: str) -> Repository:
        """The repository that `text` names. Raises InvalidName."""
        if len(text) > MAX_NAME or not _REPOSITORY.fullmatch(text):
            raise InvalidName(
                f"{text[:150]!r} is not a repository name: lower-case letters, digits and separators, "
                "in elements divided by /"
            )
        return cls(text)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, order=True)
class Tag:
    """A tag: at most 128 characters."""

    value: str

    @classmethod
    def parse(cls, text: str) -> Tag:
        """The tag that `text` spells. Raises InvalidTag."""
        if not _TAG.fullmatch(text):
            raise InvalidTag(
                f"{text[:150]!r} is not a tag: letters, digits, '_', '.', '-', at most 128, "
                "not starting with '.' or '-'"
            )
        return cls(text)

    def __str__(self) -> str:
        return self.value


TagOrDigest = Tag | Digest


def parse_tag_or_digest(text: str) -> TagOrDigest:
    """The last element of a manifest URL. A colon means a digest: tags have none. Raises InvalidTag, InvalidDigest."""
    return Digest.parse(text) if ":" in text else Tag.parse(text)


@dataclass(frozen=True, slots=True)
class Reference:
    """Source host, repository and tag or digest, complete: `docker.io/library/alpine:3.20`."""

    host: SourceHost
    repository: Repository
    target: TagOrDigest

    @classmethod
    def parse(cls, text: str) -> Reference:
        """A full reference, host included; `host/name:tag@digest` keeps the digest, no tag means `latest`.

        A name without a dot, a colon or `localhost` in its first element means Docker Hub, and without a slash its
        `library/`, as the docker command line reads it. Raises InvalidName, InvalidTag, InvalidDigest.
        """
        rest, at, digest = text.partition("@")
        first, slash, tail = rest.partition("/")
        if not slash or not ("." in first or ":" in first or first == "localhost"):
            first, tail = "docker.io", rest
        name, colon, tag = tail.rpartition(":")
        if not colon:
            name, tag = tail, ""
        if first in ("docker.io", "index.docker.io"):
            first = "docker.io"
            if "/" not in name:
                name = f"library/{name}"
        # A tag beside a digest is read as well: what cannot be a tag is a mistake worth telling.
        target: TagOrDigest = Tag.parse(tag) if colon else Tag("latest")
        if at:
            target = Digest.parse(digest)
        return cls(SourceHost.parse(first), Repository.parse(name), target)

    def __str__(self) -> str:
        mark = "@" if isinstance(self.target, Digest) else ":"
        return f"{self.host}/{self.repository}{mark}{self.target}"
