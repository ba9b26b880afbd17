"""What can be asked below /api/v1/: the operations and the documents they answer with.

Sizes are bytes, instants are seconds since 1970 by the machine's clock, durations are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import ConfigDict, Field

from proxy.engine.catalogue import Catalogue, ImageSeen, Stored, Variant, reference_or_none
from proxy.engine.charges import Usage
from proxy.engine.purge import Purge, Purged
from proxy.errors import BadRequest, UnknownManifest
from proxy.events import Refusal, RepositoryUse
from proxy.oci.descriptor import Descriptor
from proxy.web.api import Document, Operation

#: Longer words name nothing.
MAX_CHARS = 512
#: What a selection may be made of; anything else cannot name anything here.
SELECTION = r"^[A-Za-z0-9._:/*@\[\]-]+$"

Limit = Annotated[int, Field(ge=1, le=1000, description="At most this many.")]


class Activity(Protocol):
    """What is remembered of requests (telemetry/activity.py)."""

    def busiest(self, n: int) -> Sequence[RepositoryUse]: ...
    def refusals(self, n: int) -> Sequence[Refusal]: ...
    def last_pull(self, project: str, upstream: str, repository: str, target: str) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything that operators can look at, as the running parts offer it."""

    status: Callable[[], dict[str, Any]]
    usage: Callable[[], Sequence[Usage]]
    projects: Callable[[], Iterable[str]]
    activity: Activity
    catalogue: Catalogue
    purge: Purge


# -- documents ---------------------------------------------------------------------------------------------------------


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


class RefusedMove(Document):
    project: str
    reference: str
    kept: str = Field(description="The digest that the tag, immutable here, keeps.")
    upstream: str | None = Field(description="What upstream means by it now; null where it has it no longer.")


class Status(Open):
    version: str
    uptime_s: float
    sealed: bool
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


# -- operations --------------------------------------------------------------------------------------------------------


def operations(seen: Seen) -> list[Operation]:
    """All of them, but for those that other rooms bring."""

    async def status(_: Any) -> Status:
        return Status.model_validate(seen.status())

    async def transfers(_: Any) -> Transfers:
        return Transfers.model_validate({"transfers": seen.status()["transfers"]})

    async def upstreams(_: Any) -> Upstreams:
        return Upstreams.model_validate({"upstreams": seen.status()["upstreams"]})

    async def projects(_: Any) -> Projects:
        return Projects(projects=[_project(use) for use in seen.usage()])

    async def repositories(asked: Few) -> Repositories:
        return Repositories(repositories=[_repository(use) for use in seen.activity.busiest(asked.limit)])

    async def denials(asked: Few) -> Denials:
        return Denials(denials=[_denial(refusal) for refusal in seen.activity.refusals(asked.limit)])

    async def images(asked: Search) -> Images:
        return await search(seen, asked)

    async def image(asked: OneImage) -> ImageIn:
        return await look_at(seen, asked.reference, asked.project)

    async def purge(asked: ToPurge) -> PurgedDocument:
        return await take_out(seen, asked)

    return [
        Operation("GET", "status", "What it is doing, in one document.", status, Status),
        Operation("GET", "transfers", "Transfers that run now.", transfers, Transfers),
        Operation("GET", "upstreams", "How upstreams are.", upstreams, Upstreams),
        Operation("GET", "projects", "What projects use of their quotas.", projects, Projects),
        Operation("GET", "repositories", "The busiest repositories since the start.", repositories, Repositories, Few),
        Operation("GET", "denials", "The last requests that a rule refused.", denials, Denials, Few),
        Operation("GET", "images", "Search what is cached.", images, Images, Search),
        Operation(
            "GET", "image", "What is cached of one image.", image, ImageIn, OneImage, {404: "Nothing of it is here."}
        ),
        Operation(
            "POST",
            "purge",
            "Take something out.",
            purge,
            PurgedDocument,
            ToPurge,
            {404: "Nothing here is called that."},
        ),
    ]


async def search(seen: Seen, asked: Search) -> Images:
    """What is cached under names that match."""
    found, more = await seen.catalogue.search(asked.search, project=asked.project, limit=asked.limit)
    return Images(images=[_found(stored) for stored in found], more=more)


async def look_at(seen: Seen, text: str, project: str = "") -> ImageIn:
    """What is cached of one image. Raises UnknownManifest when nothing of it is."""
    reference = reference_or_none(text)
    projects = sorted(seen.projects()) if not project else [project]
    try:
        found = await seen.catalogue.image(reference, projects) if reference is not None else []
    except BadRequest:
        found = []  # what cannot be a project's name has nothing; a name that is configured no more may have
    if not found:
        raise UnknownManifest(f"nothing of {text[:MAX_CHARS]!r} is cached here")
    return ImageIn(reference=str(reference), found=[_image(each, seen.activity) for each in found])


async def take_out(seen: Seen, asked: ToPurge) -> PurgedDocument:
    """Purge. Raises UnknownManifest when nothing is selected, whatever the reason."""
    try:
        purged = await seen.purge.run(asked.what, project=asked.project, dry_run=asked.dry_run)
    except BadRequest as error:
        raise UnknownManifest(f"nothing here is called {asked.what!r}: {error}") from error
    if not purged.found_anything and not purged.n_pinned:
        raise UnknownManifest(f"nothing here is called {asked.what!r}")
    seen.catalogue.forget()
    return _purged(purged)


# -- values become documents -------------------------------------------------------------------------------------------


def _project(use: Usage) -> ProjectUse:
    return ProjectUse(
        project=use.project,
        charged_bytes=use.charged_bytes,
        reserved_bytes=use.reserved_bytes,
        blobs=use.n_blobs,
        quota_bytes=use.quota,
        on_full=use.on_full,
    )


def _repository(use: RepositoryUse) -> Repository:
    return Repository(
        project=use.project,
        upstream=use.upstream,
        repository=use.repository,
        requests=use.n_requests,
        response_bytes=use.n_bytes,
        last_at=use.last_at,
    )


def _denial(refusal: Refusal) -> Denial:
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


def _found(stored: Stored) -> Found:
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


def _image(seen: ImageSeen, activity: Activity) -> Image:
    holding, digest = seen.holding, str(seen.descriptor.digest)
    targets = [digest] if seen.tag is None else [digest, seen.tag.tag]
    pulls = [activity.last_pull(holding.project, holding.host, holding.repository, target) for target in targets]
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


def _purged(purged: Purged) -> PurgedDocument:
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


# -- what freight.py and projects.py serve, as the document shows it ---------------------------------------------------

_ORDER = {
    "type": "object",
    "properties": {
        "references": {"type": "array", "items": {"type": "string"}},
        "platforms": {"type": "string", "default": "all", "examples": ["linux/amd64,linux/arm64"]},
        "referrers": {"type": "boolean", "default": True},
        "project": {"type": ["string", "null"]},
        "pin": {"type": "boolean", "default": False},
    },
}
_LINES = {"application/x-ndjson": {"schema": {"type": "string"}}}


def _freight(name: str, summary: str, body: str, schema: Mapping[str, Any], answers: Mapping[str, Any]) -> Any:
    refusals = {
        "400": "It cannot be understood.",
        "401": "The token is missing or wrong.",
        "403": "The request comes from another site's page.",
        "421": "The Host header names somebody else.",
        "503": "There is no room, or the store cannot be read.",
    }
    return {
        "post": {
            "operationId": f"post_{name}",
            "summary": summary,
            "security": [{"token": []}],
            "requestBody": {"required": True, "content": {body: {"schema": schema}}},
            "responses": {
                "200": {
                    "description": "Done, or being done: what is missing is said in the report.",
                    "content": answers,
                },
                **{
                    status: {"description": meaning, "content": {"application/json": {}}}
                    for status, meaning in refusals.items()
                },
            },
        }
    }


_OBJECT = {"application/json": {"schema": {"type": "object"}}}


def _asked(name: str, summary: str, *parameters: Mapping[str, Any], **also: Any) -> Any:
    answers = {
        "200": "Done.",
        "400": "The request cannot be understood.",
        "421": "The Host header names somebody else.",
    }
    if "security" in also:
        answers |= {"401": "The token is missing or wrong.", "403": "The request comes from another site's page."}
        answers |= {"503": "The store cannot be read."}
    responses = {status: {"description": meaning, "content": _OBJECT} for status, meaning in answers.items()}
    return {"operationId": name, "summary": summary, "parameters": list(parameters), "responses": responses, **also}


def _parameter(name: str, description: str, *, is_required: bool = False) -> Mapping[str, Any]:
    schema = {"type": "string"}
    return {"name": name, "in": "query", "required": is_required, "description": description, "schema": schema}


#: Freight is long work: lines of JSON come meanwhile, each with an `event`: `step`, then one `report` or `error`.
ELSEWHERE: Mapping[str, Any] = {
    "/api/v1/explain": {
        "get": _asked(
            "get_explain",
            "Why a pull is allowed or refused: the route, the readers and every rule tried.",
            _parameter("ref", "As it stands after this registry's address.", is_required=True),
            _parameter("as", "The robot who asks; nobody in particular without."),
        )
    },
    "/api/v1/usage": {"get": _asked("get_usage", "What projects pay for, and what is on disk.")},
    "/api/v1/recount": {
        "post": _asked("post_recount", "Compare every charge with what is stored.", security=[{"token": []}])
    },
    "/api/v1/prefetch": _freight(
        "prefetch", "Fill the store with images; lines of JSON while it goes on.", "application/json", _ORDER, _LINES
    ),
    "/api/v1/export": _freight(
        "export",
        "Pack images into a bundle; the bundle, or a report of what is missing for one.",
        "application/json",
        _ORDER,
        {"application/x-tar": {}, "application/json": {}},
    ),
    "/api/v1/import": _freight(
        "import",
        "Take a bundle in; lines of JSON while it goes on.",
        "application/octet-stream",
        {"type": "string", "format": "binary"},
        _LINES,
    ),
}
