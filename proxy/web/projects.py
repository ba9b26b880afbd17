"""Projects over the admin listener: why something is allowed, what is used, and a recount."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from proxy.errors import BadRequest, UnknownManifest
from proxy.web.api import Document, Nothing, Operation
from proxy.web.documents import MAX_CHARS


class ToExplain(Document):
    ref: Annotated[
        str,
        Field(min_length=1, max_length=MAX_CHARS, description="As it stands after this registry's address."),
    ]
    # The name of a parameter of HTTP, and a keyword of Python's.
    as_: Annotated[
        str, Field(alias="as", max_length=255, description="The robot who asks; nobody in particular without.")
    ] = ""


class RouteTaken(Document):
    project: str
    upstream: str
    repository: str
    why: str


class Step(Document):
    owner: str = Field(description="Whose rule it is.")
    rule: str
    result: str = Field(description='"allows", "denies", "passes", or what else became of it.')
    why: str


class Explained(Document):
    reference: str
    as_: str = Field(serialization_alias="as", validation_alias="as")
    route: RouteTaken | None = Field(description="null where no upstream is meant.")
    project: str
    steps: list[Step] = Field(description="Every rule tried, in order.")
    verdict: Literal["allow", "deny"]
    rule: str = Field(description='The rule that denies, or "".')
    sentence: str = Field(description="What a client would be told.")


class ProjectUsage(Document):
    project: str
    used_bytes: int
    reserved_bytes: int
    blobs: int
    quota_bytes: int | None
    on_full: str


class StoreUsage(Document):
    logical_bytes: int = Field(description="What projects pay for, all together.")
    physical_bytes: int = Field(description="What is on disk.")
    capacity_bytes: int
    blobs: int


class DriftSeen(Document):
    project: str
    gone: int
    resized: int
    bytes: int


class UsageDocument(Document):
    projects: list[ProjectUsage]
    store: StoreUsage
    drift: list[DriftSeen] = Field(description="What the last recount repaired.")


def operations(
    explain: Callable[[str, str], Awaitable[dict[str, Any]]],
    usage: Callable[[], dict[str, Any]],
    recount: Callable[[], Awaitable[object]],
) -> list[Operation]:
    """The three of them."""

    async def explained(asked: ToExplain) -> Explained:
        try:
            return Explained.model_validate(await explain(asked.ref, asked.as_))
        except BadRequest as error:
            raise UnknownManifest(str(error)) from error  # there is no such robot, or nothing is called so

    async def used(_: Nothing) -> UsageDocument:
        return UsageDocument.model_validate(usage())

    async def recounted(_: Nothing) -> UsageDocument:
        await recount()
        return UsageDocument.model_validate(usage())

    why = "Why a pull is allowed or refused: the route, the readers and every rule tried."
    nobody = {404: "Nothing can be called that, or there is no such robot."}
    return [
        Operation("GET", "explain", why, explained, Explained, ToExplain, nobody),
        Operation("GET", "usage", "What projects pay for, and what is on disk.", used, UsageDocument),
        Operation("POST", "recount", "Compare every charge with what is stored.", recounted, UsageDocument),
    ]
