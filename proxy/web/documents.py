"""The documents of the admin API: what may be asked, what is answered, and how values of the engine become answers.

The OpenAPI document is made of these models, and every request and answer passes one, so neither can lie. Sizes are
bytes, instants are seconds since 1970 by the machine's clock, durations are seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from proxy.engine.catalogue import ImageSeen, Stored, Variant
from proxy.engine.charges import Usage
from proxy.engine.purge import Purged
from proxy.events import Refusal, RepositoryUse
from proxy.oci.descriptor import Descriptor
from proxy.web.api import Document

#: Longer words name nothing.
MAX_CHARS = 512
#: What a selection may be made of; anything else cannot name anything here.
SELECTION = r"^[A-Za-z0-9._:/*@\[\]-]+$"

Limit = Annotated[int, Field(ge=1, le=1000, description="At most this many.")]


#: When somebody last pulled a tag or digest: (project, upstream, repository, target), in seconds since 1970.
LastPull = Callable[[str, str, str, str], float | None]


# -- what is asked -----------------------------------------------------------------------------------------------------


class Few(Document):
    limit: Limit = 50


class Search(Document):
    search: Annotated[str, Field(max_length=MAX_CHARS, description="Words that host/repository:tag contains.")] = ""
    project: Annotated[str, Field(max_length=255, description="Only in this project.")] = ""
    limit: Limit = 50


class OneImage(Document):
    reference: Annotated[
        str,
        Field(
            min_length=1, max_length=MAX_CHARS, description="As docker reads it: `alpine:3`, `quay.io/a/b@sha256:…`."
        ),
    ]
    project: Annotated[str, Field(max_length=255, description="Only in this project.")] = ""


class ToPurge(Document):
    what: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_CHARS,
            pattern=SELECTION,
            description="A reference, a repository, a pattern with * or **, or a digest.",
        ),
    ]
    project: Annotated[str, Field(max_length=255, description="Only in this project.")] = ""
    dry_run: bool = Field(False, description="Only say what would go.")


# -- what is answered ------------------------------------------------------------------------------------------------------


class Open(Document):
    """A part of the status document: it may say more in a later version."""

    model_config = ConfigDict(frozen=True, extra="allow")


class StoreStatus(Open):
    path: str
    used_bytes: int
    reserved_bytes: int
    upkeep_bytes: int = Field(description="Set aside for all that is on disk and is no blob: records, folders, logs.")
    capacity_bytes: int
    blobs: int
    evicted_bytes: int
    state: str = Field(description='"ok", or "degraded: " and why nothing new is kept.')
    counted: bool = Field(description="Whether the store has been counted since the start.")


class TransferStatus(Open):
    digest: str
    upstream: str
    repository: str
    received_bytes: int
    size_bytes: int | None
    readers: int
    age_s: float


class BudgetStatus(Open):
    limit: int | None
    remaining: int | None
    window_s: int | None


class AddressStatus(Open):
    url: str
    circuit: str = Field(description='"closed", "open" (left alone: it did not answer) or "half-open" (one asks).')
    budget: BudgetStatus | None
    is_low: bool = Field(description="Whether what is left is kept for misses.")
    throttled_for_s: float | None = Field(description="For how long it asked to be left alone, if it did.")


class UpstreamStatus(Open):
    state: str = Field(description='"ok" or "failing": what its last answer was; "open": it is left alone for a while.')
    last_error: str | None
    requests: int
    failures: int
    budget: BudgetStatus | None = Field(description="What it last said of its rate limit, if anything.")
    addresses: list[AddressStatus] = Field(description="Each of its addresses, in the order in which they are tried.")


class PinsStatus(Open):
    references: int
    bytes: int = Field(description="What all pins keep on disk, each digest once.")


class RefusedMove(Document):
    project: str
    reference: str
    kept: str = Field(description="The digest that the tag, immutable here, keeps.")
    upstream: str | None = Field(description="What upstream means by it now; null where it has it no longer.")


class Status(Open):
    version: str
    uptime_s: float
    sealed: bool
    seal: dict[str, Any] = Field(
        description="What the store was made of and when: `n_imports`, and the last `imports`."
    )
    prefetch: dict[str, Any] = Field(description="What the last run for the list of `[prefetch]` came to, if any.")
    pins: PinsStatus
    ready: str
    reason: str
    requests: dict[str, int] = Field(description="Since the start, by outcome.")
    response_bytes: int
    upstream_bytes: int
    store: StoreStatus
    transfers: list[TransferStatus]
    refused_tag_moves: list[RefusedMove] = Field(description="Moves upstream of tags that are immutable here.")
    upstreams: dict[str, UpstreamStatus]
    connections: int
    refused_connections: int = Field(description="Beyond `server.max_connections`, since the start; in no `requests`.")
    listen: list[str]


class Transfers(Document):
    transfers: list[TransferStatus]


class Upstreams(Document):
    upstreams: dict[str, UpstreamStatus]


class ProjectUse(Document):
    project: str
    charged_bytes: int
    reserved_bytes: int
    blobs: int
    quota_bytes: int | None
    on_full: str


class Projects(Document):
    projects: list[ProjectUse]


class Repository(Document):
    project: str
    upstream: str
    repository: str
    requests: int
    response_bytes: int
    last_at: float


class Repositories(Document):
    repositories: list[Repository]


class Denial(Document):
    at: float
    remote: str
    method: str
    path: str
    project: str
    rule: str
    upstream: str
    repository: str
    sentence: str


class Denials(Document):
    denials: list[Denial]


class TagSeen(Document):
    tag: str
    digest: str
    validated_at: float


class Found(Document):
    project: str
    upstream: str
    repository: str
    tags: list[TagSeen] = Field(description="Those that match the search, at most 500.")
    n_tags: int
    n_manifests: int
    cached_bytes: int


class Images(Document):
    images: list[Found]
    more: bool = Field(description="Whether there are more than `limit`.")


class LayerSeen(Document):
    digest: str
    media_type: str
    size_bytes: int
    cached: bool


class VariantSeen(Document):
    platform: str = Field(description='As "linux/arm64/v8"; "" where no index says it.')
    attestation: bool
    digest: str
    media_type: str
    known: bool = Field(description="Whether its manifest has been seen here, so that its layers are known.")
    cached: bool = Field(description="Whether all of it is here.")
    size_bytes: int
    cached_bytes: int
    layers: list[LayerSeen] = Field(description="Config first, then layers.")


class ReferrerDocument(Document):
    digest: str
    artifact_type: str
    media_type: str
    size_bytes: int
    cached: bool
    tag: str = Field(description='The tag of cosign\'s scheme that leads to it, or "".')


class Image(Document):
    project: str
    upstream: str
    repository: str
    digest: str
    media_type: str
    tag: str | None
    validated_at: float | None = Field(description="When upstream last vouched for the tag.")
    tags: list[str]
    cached: bool = Field(description="Whether the manifest itself is here.")
    last_pull_at: float | None = Field(description="By this tag or digest, since the start of the process.")
    platforms: list[VariantSeen]
    referrers: list[ReferrerDocument]


class ImageIn(Document):
    reference: str
    found: list[Image] = Field(description="One for each project that has it.")


class PurgedDocument(Document):
    what: str
    dry_run: bool
    tags: list[str]
    manifests: int
    blobs: int
    freed_bytes: int
    busy_blobs: int = Field(description="Being read now; eviction takes them later.")
    pinned_images: int = Field(description="Meant, and left: they are pinned, or their upstream is sealed.")


# -- values become documents -------------------------------------------------------------------------------------------


def project_use_of(use: Usage) -> ProjectUse:
    """What a project uses of its quota."""
    return ProjectUse(
        project=use.project,
        charged_bytes=use.charged_bytes,
        reserved_bytes=use.reserved_bytes,
        blobs=use.n_blobs,
        quota_bytes=use.quota,
        on_full=use.on_full,
    )


def repository_of(use: RepositoryUse) -> Repository:
    """How much a repository was asked for."""
    return Repository(
        project=use.project,
        upstream=use.upstream,
        repository=use.repository,
        requests=use.n_requests,
        response_bytes=use.n_bytes,
        last_at=use.last_at,
    )


def denial_of(refusal: Refusal) -> Denial:
    """A request that a rule refused."""
    return Denial(
        at=refusal.at,
        remote=refusal.remote,
        method=_text(refusal.method),
        path=_text(refusal.path),
        project=refusal.project,
        rule=refusal.rule,
        upstream=refusal.upstream,
        repository=refusal.repository,
        sentence=_text(refusal.sentence),
    )


def found_of(stored: Stored) -> Found:
    """What is cached under one name."""
    tags = [TagSeen(tag=t.tag, digest=str(t.descriptor.digest), validated_at=t.validated_at) for t in stored.tags]
    holding = stored.holding
    return Found(
        project=holding.project,
        upstream=holding.host,
        repository=holding.repository,
        tags=tags,
        n_tags=stored.n_tags,
        n_manifests=stored.n_manifests,
        cached_bytes=stored.cached_bytes,
    )


def image_of(seen: ImageSeen, last_pull: LastPull) -> Image:
    """One image, as far as it is here."""
    holding, digest = seen.holding, str(seen.descriptor.digest)
    targets = [digest] if seen.tag is None else [digest, seen.tag.tag]
    pulls = [last_pull(holding.project, holding.host, holding.repository, target) for target in targets]
    return Image(
        project=holding.project,
        upstream=holding.host,
        repository=holding.repository,
        digest=digest,
        media_type=seen.descriptor.media_type,
        tag=seen.tag.tag if seen.tag is not None else None,
        validated_at=seen.tag.validated_at if seen.tag is not None else None,
        tags=list(seen.tags),
        cached=seen.is_cached,
        last_pull_at=max((at for at in pulls if at is not None), default=None),
        platforms=[_variant(variant) for variant in seen.variants],
        referrers=[
            ReferrerDocument(
                digest=str(each.descriptor.digest),
                artifact_type=each.artifact_type,
                media_type=each.descriptor.media_type,
                size_bytes=each.descriptor.size,
                cached=each.is_cached,
                tag=each.tag,
            )
            for each in seen.referrers
        ],
    )


def _variant(variant: Variant) -> VariantSeen:
    return VariantSeen(
        platform=variant.platform,
        attestation=variant.is_attestation,
        digest=str(variant.descriptor.digest),
        media_type=variant.descriptor.media_type,
        known=variant.is_known,
        cached=variant.is_whole,
        size_bytes=variant.total_bytes,
        cached_bytes=variant.cached_bytes,
        layers=[_layer(part.descriptor, part.is_cached) for part in variant.parts],
    )


def _layer(descriptor: Descriptor, is_cached: bool) -> LayerSeen:
    return LayerSeen(
        digest=str(descriptor.digest),
        media_type=descriptor.media_type,
        size_bytes=descriptor.size,
        cached=is_cached,
    )


def purged_of(purged: Purged) -> PurgedDocument:
    """What a purge did, or would do."""
    return PurgedDocument(
        what=purged.what,
        dry_run=not purged.is_done,
        tags=list(purged.tags),
        manifests=purged.n_manifests,
        blobs=purged.n_blobs,
        freed_bytes=purged.n_bytes,
        busy_blobs=purged.n_busy,
        pinned_images=purged.n_pinned,
    )


def _text(raw: str) -> str:
    """What a client sent, in signs that every encoding can carry."""
    return raw.encode("utf-8", "backslashreplace").decode("utf-8")
