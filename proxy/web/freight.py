"""Freight over the admin listener: an order in, lines of JSON out while it is worked on.

Each line is one object with an `event`: "step" for progress, then exactly one "report" or "error". Whoever leaves ends
what they ordered; what has come by then stays.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from aiohttp import ClientPayloadError, web

from proxy.engine.freight import Freight, Order
from proxy.engine.intake import Terms
from proxy.errors import BadRequest, BreakwaterError
from proxy.oci.digest import Digest
from proxy.oci.layout import Contents
from proxy.web.errors import answer

#: An order of many thousands of references.
MAX_ORDER_BYTES = 16 << 20


def routes(freight: Freight) -> list[web.RouteDef]:
    """For the admin application."""
    doors = _Doors(freight)
    return [
        web.post("/api/v1/prefetch", doors.prefetch),
        web.post("/api/v1/export", doors.export),
        web.post("/api/v1/import", doors.take),
    ]


class _Doors:
    def __init__(self, freight: Freight) -> None:
        self._freight = freight

    async def prefetch(self, request: web.Request) -> web.StreamResponse:
        """An order in JSON."""
        try:
            order = Order.parse(await _json_of(request))
        except BreakwaterError as error:
            return answer(error)
        return await told(request, lambda tell: self._freight.prefetch(order, tell))

    async def export(self, request: web.Request) -> web.StreamResponse:
        """An order, and `since`, a list of contents. The bundle, or the report of what is missing for one."""
        try:
            asked = await _json_of(request)
            order = Order.parse(asked)
            since = [Contents.parse(json.dumps(one).encode()) for one in asked.get("since", [])]
            plan, report = await self._freight.plan_export(order, since)
        except BreakwaterError as error:
            return answer(error)
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

    async def take(self, request: web.Request) -> web.StreamResponse:
        """The plain tar of an image layout; the terms are in the query."""
        asked = request.query
        try:
            terms = Terms(
                contents=Digest.parse(asked["contents"]) if "contents" in asked else None,
                signed_by=asked.get("signed_by", "")[:200],
                name=asked.get("name", ""),
                project=asked.get("project"),
                pin="pin" in asked,
            )
        except BreakwaterError as error:
            return answer(error)
        return await told(request, lambda tell: self._freight.take(_body_of(request), terms, tell))


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


async def _json_of(request: web.Request) -> Any:
    body = await request.content.read(MAX_ORDER_BYTES)
    while not request.content.at_eof() and len(body) < MAX_ORDER_BYTES:
        body += await request.content.read(MAX_ORDER_BYTES - len(body))
    if not request.content.at_eof():
        raise BadRequest(f"an order of more than {MAX_ORDER_BYTES} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the order is not JSON: {error}") from error
