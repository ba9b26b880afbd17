"""Freight over the admin listener: an order in, lines of JSON out while it is worked on.

Each line is one object with an `event`: "step" for progress, then exactly one "report" or "error". Whoever leaves ends
what they ordered; what has come by then stays.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal

from aiohttp import ClientPayloadError, web
from pydantic import BeforeValidator, Field

from proxy.engine.freight import Freight, Order
from proxy.engine.intake import Terms
from proxy.errors import BadArchive, BadRequest, BreakwaterError, UnknownManifest
from proxy.oci.digest import Digest
from proxy.oci.layout import Contents
from proxy.web.api import Document, LongWork
from proxy.web.documents import MAX_CHARS

#: An order of many thousands of references.
MAX_ORDER_BYTES = 16 << 20

#: What the document says of lines.
LINES: Mapping[str, Any] = {
    "application/x-ndjson": {
        "schema": {"type": "string", "description": "Objects with an `event`: `step`, then one `report` or `error`."}
    }
}
_BUNDLE: Mapping[str, Any] = {
    "application/x-tar": {"schema": {"type": "string", "format": "binary"}},
    "application/json": {"schema": {"type": "object", "description": "A report of what is missing for a bundle."}},
}

_PLATFORM = "[A-Za-z0-9_]*[A-Za-z0-9][A-Za-z0-9_]*"
_PLATFORMS = f"^(all|{_PLATFORM}(/{_PLATFORM}){{1,2}}(,{_PLATFORM}(/{_PLATFORM}){{1,2}})*)$"
_DIGEST = "^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$"

DigestText = Annotated[str, Field(pattern=_DIGEST)]
# 1.0 is an integer to JSON Schema.
Size = Annotated[
    int, Field(ge=0, lt=1 << 63), BeforeValidator(lambda n: int(n) if type(n) is float and n.is_integer() else n)
]
# Without the word the document would allow names that are no digests.
Sizes = Annotated[dict[DigestText, Size], Field(json_schema_extra={"additionalProperties": False})]


class ToCarry(Document):
    references: list[Annotated[str, Field(min_length=1, max_length=MAX_CHARS)]] = Field(
        [], description="As docker reads them."
    )
    platforms: Annotated[str, Field(pattern=_PLATFORMS, examples=["linux/amd64,linux/arm64"])] = "all"
    referrers: bool = Field(True, description="Signatures, SBOMs and whatever else refers to it.")
    project: Annotated[str, Field(max_length=255)] | None = Field(None, description="Through this project.")
    pin: bool = Field(False, description="Keep what is listed from eviction.")


class Earlier(Document):
    """What an earlier bundle brought: its breakwater.json."""

    breakwater: Literal[1]
    members: Sizes
    elsewhere: Sizes
    left_out: list[DigestText]
    documents: dict[str, DigestText]
    created_at: Annotated[float, Field(ge=0, le=1e12)]
    images: Size


class ToExport(ToCarry):
    since: list[Earlier] = Field([], description="Leave out what these earlier bundles brought.")


class ToTake(Document):
    contents: DigestText | None = Field(None, description="The digest that breakwater.json must have.")
    signed_by: Annotated[str, Field(max_length=200)] = Field("", description="Who signed that; it is remembered.")
    name: Annotated[str, Field(max_length=MAX_CHARS)] = Field("", description="For an image that has only a tag.")
    project: Annotated[str, Field(max_length=255)] | None = Field(None, description="Into this project.")
    pin: bool = Field(False, description="Keep what comes from eviction.")


def operations(freight: Freight) -> list[LongWork]:
    """The three of them."""
    doors = _Doors(freight)
    unknown = {404: "Something of it can be no reference, or there is no such project."}
    fill, pack, most = "Fill the store with images.", "Pack images into a bundle.", MAX_ORDER_BYTES
    return [
        LongWork("prefetch", fill, doors.prefetch, LINES, ToCarry, "json", unknown, most),
        LongWork("export", pack, doors.export, _BUNDLE, ToExport, "json", unknown, most),
        LongWork("import", "Take a bundle in.", doors.take, LINES, ToTake, "octets"),
    ]


class _Doors:
    def __init__(self, freight: Freight) -> None:
        self._freight = freight

    async def prefetch(self, request: web.Request, asked: ToCarry) -> web.StreamResponse:
        """Lines."""
        order = _order_of(asked)
        return await told(request, lambda tell: self._freight.prefetch(order, tell))

    async def export(self, request: web.Request, asked: ToExport) -> web.StreamResponse:
        """The bundle, or the report of what is missing for one."""
        order = _order_of(asked)
        try:
            since = [Contents.parse(one.model_dump_json().encode()) for one in asked.since]
            plan, report = await self._freight.plan_export(order, since)
        except (BadRequest, BadArchive) as error:
            raise UnknownManifest(str(error)) from error
        if not plan.is_whole:
            return web.json_response(report)
        headers = {"Content-Type": "application/x-tar", "Breakwater-Bytes": str(plan.contents.n_bytes)}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        try:
            async for piece in self._freight.bundle(plan, lambda _: None):
                await response.write(piece)
        except (BreakwaterError, ConnectionError):
            if request.transport is not None:
                request.transport.abort()  # never a clean end of half a bundle
            return response
        await response.write_eof()
        return response

    async def take(self, request: web.Request, asked: ToTake) -> web.StreamResponse:
        """The plain tar of an image layout; lines."""
        contents = Digest.parse(asked.contents) if asked.contents is not None else None
        terms = Terms(contents, asked.signed_by, asked.name, asked.project, asked.pin)
        return await told(request, lambda tell: self._freight.take(_body_of(request), terms, tell))


def _order_of(asked: ToCarry) -> Order:
    """Raises UnknownManifest for what is no reference: nothing that there is can be called so."""
    try:
        return Order.parse(asked.model_dump())
    except BadRequest as error:
        raise UnknownManifest(str(error)) from error


async def _body_of(request: web.Request) -> AsyncIterator[bytes]:
    """The pieces as they come. Raises ConnectionError when the body breaks off: then nobody waits for the answer."""
    try:
        async for piece in request.content.iter_any():
            yield piece
    except ClientPayloadError as error:
        raise ConnectionError(str(error)) from None


async def told(
    request: web.Request, work: Callable[[Callable[[Mapping[str, Any]], None]], Awaitable[Mapping[str, Any]]]
) -> web.StreamResponse:
    """Do `work`, and send what it tells as it comes, its report last."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
    await response.prepare(request)
    lines: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()

    async def working() -> None:
        try:
            lines.put_nowait(await work(lines.put_nowait))
        except BreakwaterError as error:
            lines.put_nowait({"event": "error", "error": str(error), "kind": type(error).__name__})
        except ConnectionError:
            pass  # the body broke off: whoever sent it is gone
        finally:
            lines.put_nowait(None)

    async with asyncio.TaskGroup() as group:
        worker = group.create_task(working())
        try:
            while (line := await lines.get()) is not None:
                await response.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        except ConnectionError:
            worker.cancel()  # nobody waits for it any more
            return response
    try:
        await response.write_eof()
    except ConnectionError:
        pass  # it had read the report, and went
    return response
