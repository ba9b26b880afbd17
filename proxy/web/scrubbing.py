"""`breakwater verify` over the admin listener: lines of JSON while the store is hashed, the report last."""

from __future__ import annotations

from aiohttp import web

from proxy.engine.scrub import Scrub
from proxy.web.freight import told


def routes(scrub: Scrub) -> list[web.RouteDef]:
    """For the admin application."""

    async def verify(request: web.Request) -> web.StreamResponse:
        repair = request.query.get("repair") == "true"
        return await told(request, lambda tell: scrub.verify(tell, repair=repair))

    return [web.post("/api/v1/verify", verify)]
