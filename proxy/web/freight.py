"""Freight over the admin listener: an order in, lines of JSON out while it is worked on.

Each line is one object with an `event`: "step" for progress, then exactly one "report" or "error". Whoever leaves ends
what they ordered; what has come by then stays.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from proxy.engine.freight import Freight, Order
from proxy.errors import BadRequest, BreakwaterError
from proxy.web.errors import answer

#: An order of many thousands of references.
MAX_ORDER_BYTES = 16 << 20


def routes(freight: Freight) -> list[web.RouteDef]:
    """For the admin application."""
    return [web.post("/api/v1/prefetch", lambda request: _worked_on(request, freight.prefetch))]


async def _worked_on(
    request: web.Request,
    work: Callable[[Order, Callable[[Mapping[str, Any]], None]], Awaitable[Mapping[str, Any]]],
) -> web.StreamResponse:
    try:
        order = Order.parse(await _json_of(request))
    except BreakwaterError as error:
        return answer(error)
    return await told(request, lambda tell: work(order, tell))


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
    await response.write_eof()
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
