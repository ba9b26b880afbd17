"""The admin listener: health, readiness, metrics, the API and the dashboard. Never on the data port."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.web.api import PREFIX, LongWork, Operation, failed, openapi
from proxy.web.guard import Guard, Refusal

#: What /readyz says besides its status: a word for people and scripts, then a sentence or "".
Readiness = tuple[str, str]

#: On every answer: what a browser shall not do with it. There is no CORS header, so no other site's page reads any.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # "no-referrer" would make our own forms say `Origin: null`
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Probes:
    """Answers probes and scrapes: to everybody, under every name, on the admin listener and on `probe_listen`."""

    def __init__(self, *, metrics: Callable[[], bytes], readiness: Callable[[], Readiness]) -> None:
        self._metrics = metrics
        self._readiness = readiness

    def app(self) -> web.Application:
        """An application with nothing else."""
        app = web.Application(middlewares=[_plain_errors])
        app.add_routes(self.routes())
        return app

    def routes(self) -> list[web.RouteDef]:
        """The three of them."""
        return [
            web.get("/healthz", self._healthz),
            web.get("/readyz", self._readyz),
            web.get("/metrics", self._scrape),
        ]

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


class Pages(Protocol):
    """The dashboard, as far as the listener knows it."""

    def routes(self) -> list[web.RouteDef]: ...
    def refused(self, request: web.Request, refusal: Refusal) -> Awaitable[web.Response]: ...


class Admin:
    """Puts the admin listener together."""

    def __init__(
        self,
        *,
        probes: Probes,
        guard: Guard,
        operations: Iterable[Operation | LongWork] = (),
        pages: Pages | None = None,
        version: str = "",
    ) -> None:
        """`operations`: all that is below /api/v1/, and so all that the document there describes."""
        self._probes = probes
        self._guard = guard
        self._operations = tuple(operations)
        self._pages = pages
        self._version = version

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(middlewares=[self._guarded, _plain_errors])
        app.add_routes([*self._probes.routes(), *(each.route() for each in self._operations)])
        app.router.add_get(PREFIX + "openapi.json", self._document)
        if self._pages is not None:
            app.add_routes(self._pages.routes())
        return app

    async def _document(self, _: web.Request) -> web.Response:
        """What can be asked here, for programs that make clients of it."""
        return web.json_response(openapi(self._operations, self._version))

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Probes for everybody; all else as the guard says. What is not there is said not to be, without a token."""
        is_there = request.match_info.http_exception is None
        if is_there and request.path not in ("/healthz", "/readyz", "/metrics"):
            refusal = await self._guard.judge(request)
            if refusal is not None:
                return await self._refused(request, refusal)
        response = await handler(request)
        if not response.prepared:
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            response.headers.setdefault("Cache-Control", "no-store")
        return response

    async def _refused(self, request: web.Request, refusal: Refusal) -> web.Response:
        if self._pages is None or request.path.startswith("/api/"):
            return failed(refusal.status, refusal.sentence, refusal.headers)
        return await self._pages.refused(request, refusal)


@web.middleware
async def _plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors as JSON, without a word of HTML."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return failed(error.status, error.reason, headers)
