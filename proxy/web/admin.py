"""The admin listener: health, readiness, metrics and status. Never on the data port."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

#: What /readyz says besides its status: a word for people and scripts, then a sentence or "".
Readiness = tuple[str, str]


class Admin:
    """Answers probes, scrapes and `breakwater status`."""

    def __init__(
        self,
        *,
        status: Callable[[], dict[str, Any]],
        metrics: Callable[[], bytes],
        readiness: Callable[[], Readiness],
        also: Iterable[web.RouteDef] = (),
    ) -> None:
        """`also`: routes of other rooms, below /api/v1/."""
        self._status = status
        self._metrics = metrics
        self._readiness = readiness
        self._also = tuple(also)

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(middlewares=[_plain_errors])
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._scrape),
                web.get("/api/v1/status", self._status_json),
                *self._also,
            ]
        )
        return app

    async def _healthz(self, _: web.Request) -> web.Response:
        """Alive: the loop answers."""
        return web.json_response({"status": "alive"})

    async def _readyz(self, _: web.Request) -> web.Response:
        """200 while anything can be served, degraded or not; 503 only when nothing can."""
        word, sentence = self._readiness()
        body = {"status": word} | ({"reason": sentence} if sentence else {})
        return web.json_response(body, status=503 if word == "stopping" else 200)

    async def _scrape(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _status_json(self, _: web.Request) -> web.Response:
        return web.json_response(self._status())


@web.middleware
async def _plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors as JSON, without a word of HTML."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return web.json_response({"error": error.reason}, status=error.status)
