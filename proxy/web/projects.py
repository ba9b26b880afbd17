"""Projects over the admin listener: why something is allowed, what is used, and a recount."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from proxy.errors import BreakwaterError
from proxy.web.errors import answer


def routes(
    explain: Callable[[str, str], Awaitable[dict[str, Any]]],
    usage: Callable[[], dict[str, Any]],
    recount: Callable[[], Awaitable[object]],
) -> list[web.RouteDef]:
    """For the admin application."""

    async def explained(request: web.Request) -> web.Response:
        reference = request.query.get("ref", "")
        if not reference:
            return web.json_response({"error": "say what to explain: ?ref=docker.io/library/alpine:3"}, status=400)
        try:
            return web.json_response(await explain(reference, request.query.get("as", "")))
        except BreakwaterError as error:
            return answer(error)

    async def used(_: web.Request) -> web.Response:
        return web.json_response(usage())

    async def recounted(_: web.Request) -> web.Response:
        try:
            await recount()
        except BreakwaterError as error:
            return answer(error)
        return web.json_response(usage())

    return [
        web.get("/api/v1/explain", explained),
        web.get("/api/v1/usage", used),
        web.post("/api/v1/recount", recounted),
    ]
