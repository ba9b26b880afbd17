"""The dashboard: pages for people who would rather look than read.

Rendered here from templates, whole and without a script; a little one keeps them up to date. They show what the API's
documents say and do what its operations do, so nothing can be seen or done here that a program cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from aiohttp import web
from pydantic import ValidationError

from proxy import __version__, spelled
from proxy.engine.orders import Orders
from proxy.errors import BreakwaterError
from proxy.web.api import status_of
from proxy.web.documents import MAX_CHARS, Few, Search, ToPurge
from proxy.web.guard import Refusal, is_unix
from proxy.web.operations import Seen, look_at, operations, take_out

if TYPE_CHECKING:
    from jinja2 import Environment

#: Rows of a table on the overview.
MOST = 12
_UI = files("proxy.web") / "ui"
_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

#: Nothing from elsewhere and nothing inline: what gets into a page by mistake does nothing.
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "style-src 'self'",
        "script-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)


@dataclass(frozen=True, slots=True)
class _Files:
    """Templates and static files, read once."""

    environment: Environment
    static: Mapping[str, bytes]


class Dashboard:
    """The pages."""

    def __init__(self, seen: Seen, orders: Orders, *, wall: Callable[[], float], token_place: str) -> None:
        """`wall` gives seconds since 1970; `token_place` is where people find the token."""
        self._seen = seen
        self._orders = orders
        self._wall = wall
        self._token_place = token_place
        self._files: _Files | None = None

    def routes(self) -> list[web.RouteDef]:
        """For the admin application."""
        return [
            web.get("/", self._overview),
            web.get("/live", self._live),
            web.get("/images", self._images),
            web.get("/image", self._image),
            web.get("/purge", self._before_purge),
            web.post("/purge", self._purge),
            web.get("/prefetch", self._before_prefetch),
            web.get("/prefetch/orders", self._placed),
            web.post("/prefetch", self._prefetch),
            web.get("/static/{name}", self._static),
        ]

    # -- pages ------------------------------------------------------------------------------------------------------

    async def _overview(self, request: web.Request) -> web.Response:
        return await self._page(request, "overview.html", here="/", **await self._lately())

    async def _live(self, request: web.Request) -> web.Response:
        return await self._page(request, "live.html", **await self._lately())

    async def _lately(self) -> dict[str, Any]:
        """What the overview shows, in the words of the API's documents."""
        ask = self._ask
        few = Few(limit=MOST)
        status = await ask["status"](None)
        requests = status["requests"]
        had = sum(requests.get(outcome, 0) for outcome in ("hit", "coalesced", "stale"))
        return {
            "status": status,
            "ratio": {"had": had, "all": had + requests.get("miss", 0)},
            "projects": (await ask["projects"](None))["projects"],
            "repositories": (await ask["repositories"](few))["repositories"],
            "denials": (await ask["denials"](few))["denials"],
            "most": 3 * MOST,
        }

    @cached_property
    def _ask(self) -> dict[str, Callable[[Any], Awaitable[dict[str, Any]]]]:
        """The API's operations by path, each giving its document as plain values."""

        def plain(work: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[dict[str, Any]]]:
            async def ask(asked: Any) -> dict[str, Any]:
                document: dict[str, Any] = (await work(asked)).model_dump()
                return document

            return ask

        return {each.path: plain(each.work) for each in operations(self._seen)}

    async def _images(self, request: web.Request) -> web.Response:
        words = request.query.get("search", "")[:MAX_CHARS]
        found = await self._ask["images"](Search(search=words))
        return await self._page(request, "images.html", here="/images", search=words, **found)

    async def _image(self, request: web.Request) -> web.Response:
        reference, project = request.query.get("reference", "")[:MAX_CHARS], request.query.get("project", "")
        try:
            found = (await look_at(self._seen, reference, project)).model_dump()
        except BreakwaterError as error:
            return await self._failure(request, "Not cached", str(error), status_of(error), back="/images")
        return await self._page(request, "image.html", here="/images", **found)

    async def _before_purge(self, request: web.Request) -> web.Response:
        return await self._purge_page(request, request.query.get("what", ""), request.query.get("project", ""))

    async def _purge(self, request: web.Request) -> web.Response:
        form = await request.post()
        what, project = str(form.get("what", "")), str(form.get("project", ""))
        return await self._purge_page(request, what, project, dry_run=False)

    async def _purge_page(
        self, request: web.Request, what: str, project: str, *, dry_run: bool = True, refusal: Refusal | None = None
    ) -> web.Response:
        """What would go, or what went."""
        try:
            asked = ToPurge(what=what.strip(), project=project, dry_run=dry_run or refusal is not None)
            purged = (await take_out(self._seen, asked)).model_dump()
        except ValidationError:
            return await self._failure(request, "Nothing to purge", "expected a reference, a pattern or a digest", 400)
        except BreakwaterError as error:
            return await self._failure(request, "Nothing to purge", str(error), status_of(error), back="/images")
        words = {"what": asked.what, "project": project, "purged": purged, "trouble": refusal and refusal.sentence}
        return await self._page(request, "purge.html", refusal.status if refusal else 200, **words)

    async def _before_prefetch(self, request: web.Request) -> web.Response:
        return await self._prefetch_page(request, {name: text[:MAX_CHARS] for name, text in request.query.items()})

    async def _prefetch(self, request: web.Request) -> web.Response:
        asked = {name: text for name, text in (await request.post()).items() if isinstance(text, str)}
        try:
            self._orders.place(
                asked.get("references", ""),
                asked.get("platforms", "all"),
                project=asked.get("project", ""),
                pin=asked.get("pin") == "yes",
            )
        except BreakwaterError as error:
            return await self._prefetch_page(request, asked, str(error), status_of(error))
        return web.Response(status=303, headers={"Location": "/prefetch"})  # reloading it orders nothing again

    async def _prefetch_page(
        self, request: web.Request, asked: Mapping[str, str], trouble: str = "", status: int = 200
    ) -> web.Response:
        fields = {"references": "", "platforms": "all", "project": "", "pin": "", **asked}
        names = sorted(self._seen.projects())
        return await self._page(
            request, "prefetch.html", status, here="/prefetch", asked=fields, trouble=trouble, project_names=names
        )

    async def _placed(self, request: web.Request) -> web.Response:
        return await self._page(request, "orders.html")

    # -- refusals and failures --------------------------------------------------------------------------------------

    async def refused(self, request: web.Request, refusal: Refusal) -> web.Response:
        """The page of a request that the guard refused. For a wrong token, the form again."""
        if refusal.status == 401 and request.path in ("/purge", "/prefetch"):
            form = await request.post()
            asked = {name: text for name, text in form.items() if isinstance(text, str)}
            if request.path == "/prefetch":
                return await self._prefetch_page(request, asked, refusal.sentence, refusal.status)
            return await self._purge_page(request, asked.get("what", ""), asked.get("project", ""), refusal=refusal)
        return await self._failure(request, "Refused", refusal.sentence, refusal.status)

    async def _failure(
        self, request: web.Request, title: str, trouble: str, status: int, back: str = "/"
    ) -> web.Response:
        return await self._page(request, "failure.html", status, title=title, trouble=trouble, back=back)

    # -- rendering --------------------------------------------------------------------------------------------------

    async def _page(self, request: web.Request, template: str, code: int = 200, **words: Any) -> web.Response:
        everywhere = {
            "version": __version__,
            "orders": self._orders.all(),
            "needs_token": not is_unix(request),
            "token_place": self._token_place,
        }
        found = await self._loaded()
        text = found.environment.get_template(template).render(everywhere | words)
        return web.Response(
            status=code, text=text, content_type="text/html", headers={"Content-Security-Policy": _POLICY}
        )

    async def _static(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        body = (await self._loaded()).static.get(name)
        if body is None:
            raise web.HTTPNotFound
        return web.Response(
            body=body,
            content_type=_TYPES[name.rpartition(".")[2]],
            headers={"Cache-Control": "public, max-age=31536000, immutable"},  # its address has its hash
        )

    async def _loaded(self) -> _Files:
        """Read and compiled when somebody first looks, in a thread: most Breakwaters nobody looks at."""
        if self._files is None:
            self._files = await asyncio.to_thread(_load, self._wall)
        return self._files


def _load(wall: Callable[[], float]) -> _Files:
    from jinja2 import DictLoader, Environment, StrictUndefined

    templates = {each.name: each.read_text(encoding="utf-8") for each in (_UI / "templates").iterdir()}
    static = {each.name: each.read_bytes() for each in (_UI / "static").iterdir()}
    marks = {name: sha256(body).hexdigest()[:12] for name, body in static.items()}
    environment = Environment(
        loader=DictLoader(templates), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.globals["static"] = lambda name: f"/static/{name}?v={marks[name]}"
    environment.globals["here"] = ""
    environment.filters |= {
        "size": spelled.size,
        "count": spelled.count,
        "percent": spelled.percent,
        "duration": spelled.duration,
        "short": spelled.short,
        "sentence": spelled.sentence,
        "budget": spelled.budget,
        "ago": lambda at: spelled.ago(at, wall()),
        "dictitems": lambda mapping: list(mapping.items()),
    }
    for name in templates:
        environment.get_template(name)  # a mistake shows now, and nobody waits for the compiler later
    return _Files(environment, static)
