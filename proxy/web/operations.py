"""What can be asked below /api/v1/ of what is cached and of what goes on: the operations.

Other rooms bring theirs: what is done over the admin listener besides is in a module each (`Appliance._admin`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from proxy.engine.catalogue import Catalogue, reference_or_none
from proxy.engine.charges import Usage
from proxy.engine.purge import Purge
from proxy.errors import BadRequest, UnknownManifest
from proxy.events import Refusal, RepositoryUse
from proxy.web.api import Operation
from proxy.web.documents import (
    MAX_CHARS,
    Denials,
    Few,
    ImageIn,
    Images,
    OneImage,
    Projects,
    PurgedDocument,
    Repositories,
    Search,
    Status,
    ToPurge,
    Transfers,
    Upstreams,
    denial_of,
    found_of,
    image_of,
    project_use_of,
    purged_of,
    repository_of,
)


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
        return Projects(projects=[project_use_of(use) for use in seen.usage()])

    async def repositories(asked: Few) -> Repositories:
        return Repositories(repositories=[repository_of(use) for use in seen.activity.busiest(asked.limit)])

    async def denials(asked: Few) -> Denials:
        return Denials(denials=[denial_of(refusal) for refusal in seen.activity.refusals(asked.limit)])

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
    return Images(images=[found_of(stored) for stored in found], more=more)


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
    return ImageIn(reference=str(reference), found=[image_of(each, seen.activity.last_pull) for each in found])


async def take_out(seen: Seen, asked: ToPurge) -> PurgedDocument:
    """Purge. Raises UnknownManifest when nothing is selected, whatever the reason."""
    try:
        purged = await seen.purge.run(asked.what, project=asked.project, dry_run=asked.dry_run)
    except BadRequest as error:
        raise UnknownManifest(f"nothing here is called {asked.what!r}: {error}") from error
    if not purged.found_anything and not purged.n_pinned:
        raise UnknownManifest(f"nothing here is called {asked.what!r}")
    seen.catalogue.forget()
    return purged_of(purged)
