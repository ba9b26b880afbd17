"""Upstreams as the engine sees them: who to ask for a route, under which policy, and what a sealed one answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from proxy.errors import UnknownBlob, UnknownManifest, UnknownName
from proxy.oci.digest import Digest
from proxy.oci.names import Repository, TagOrDigest
from proxy.ports import BlobBody, ManifestHead, TagPage, Upstream, UpstreamManifest
from proxy.rules.freshness import TagPolicy
from proxy.rules.gates.access import Login
from proxy.rules.routes import Route


@dataclass(frozen=True, slots=True)
class PassThrough:
    """An upstream that judges each client's own login.

    `as_login` gives the upstream as one login is shown to it, None for as nobody is; the same one for the same login.
    What it decides is remembered for `remembered_s` seconds.
    """

    as_login: Callable[[Login | None], Upstream]
    remembered_s: float


@dataclass(frozen=True, slots=True)
class Origin:
    """One upstream as one project sees it. `negative_ttl_s`: how long "not found" is remembered, in seconds.

    Where there is `pass_through`, `upstream` is for what Breakwater does by itself, and each client is asked for as
    the login that it shows (engine/admission.py).
    """

    host: str
    upstream: Upstream
    tag_policy: TagPolicy
    negative_ttl_s: float = 10.0
    pass_through: PassThrough | None = None


class Origins:
    """Every configured upstream; a project with credentials of its own has its own client."""

    def __init__(
        self, shared: Mapping[str, Origin], of_project: Mapping[tuple[str, str], Origin] | None = None
    ) -> None:
        self._shared = shared
        self._of_project = of_project or {}

    def of(self, route: Route) -> Origin:
        """Whom to ask. The route came from the same settings, so there always is one."""
        return self._of_project.get((route.project, route.host)) or self._shared[route.host]


class SealedUpstream:
    """An upstream that is never asked: what is not here does not exist, and the answer says why."""

    def __init__(self, host: str) -> None:
        self._host = host

    async def manifest(self, repository: Repository, target: TagOrDigest) -> UpstreamManifest:
        """Raises UnknownManifest."""
        self._no_manifest(repository, target)

    async def manifest_head(self, repository: Repository, target: TagOrDigest) -> ManifestHead:
        """Raises UnknownManifest."""
        self._no_manifest(repository, target)

    async def blob(self, repository: Repository, digest: Digest, *, offset: int = 0) -> BlobBody:
        """Raises UnknownBlob."""
        self._no_blob(repository, digest)

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """Raises UnknownBlob."""
        self._no_blob(repository, digest)

    async def tags(self, repository: Repository, *, n: int | None, last: str | None) -> TagPage:
        """Raises UnknownName."""
        raise UnknownName(f"{self._host}/{repository}: this registry is sealed and has no tags of it")

    async def referrers(self, repository: Repository, digest: Digest, *, artifact_type: str) -> bytes | None:
        """None: the answer is what is here."""
        return None

    def _no_manifest(self, repository: Repository, target: TagOrDigest) -> NoReturn:
        mark = "@" if isinstance(target, Digest) else ":"
        raise UnknownManifest(
            f"{self._host}/{repository}{mark}{target} is not in this registry, which is sealed; import it in a bundle"
        )

    def _no_blob(self, repository: Repository, digest: Digest) -> NoReturn:
        raise UnknownBlob(
            f"{digest} of {self._host}/{repository} is not in this registry, which is sealed; import it in a bundle"
        )
