"""web/admin.py: probes and scrapes, apart from the data port."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from proxy.web.admin import Probes


@asynccontextmanager
async def admin(word: str = "ready", sentence: str = "") -> AsyncIterator[str]:
    """A listener for probes; gives its URL."""
    made = Probes(metrics=lambda: b"breakwater_x 1\n", readiness=lambda: (word, sentence))
    runner = web.AppRunner(made.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def got(url: str, method: str = "GET") -> tuple[int, str, str]:
    async with aiohttp.ClientSession() as session, session.request(method, url) as response:
        return response.status, response.content_type, await response.text()


@pytest.mark.parametrize(
    ("word", "sentence", "status"),
    [
        ("ready", "", 200),
        ("ready", "upstreams failing: docker.io", 200),
        ("degraded", "nothing new is kept: no room", 200),
        ("stopping", "shutting down", 503),
    ],
)
async def test_ready_means_that_anything_can_be_served(word: str, sentence: str, status: int) -> None:
    """A full disk or an upstream that is down must not take a mirror out of service that has what is asked for."""
    async with admin(word, sentence) as url:
        answered = await got(f"{url}/readyz")
        assert answered[:2] == (status, "application/json")
        assert json.loads(answered[2]) == {"status": word} | ({"reason": sentence} if sentence else {})


async def test_alive_means_that_the_loop_answers() -> None:
    """Even while stopping: a liveness probe must not kill what is draining."""
    async with admin("stopping") as url:
        assert (await got(f"{url}/healthz"))[0] == 200


async def test_metrics_are_in_the_text_format_of_scrapes() -> None:
    """Prometheus' own."""
    async with admin() as url:
        assert await got(f"{url}/metrics") == (200, "text/plain", "breakwater_x 1\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("POST", "/readyz", 405), ("GET", "/v2/", 404), ("GET", "/v2/a/manifests/1", 404)],
)
async def test_anything_else_is_refused_as_json(method: str, path: str, status: int) -> None:
    """No registry is served here, and no page of a library's own."""
    async with admin() as url:
        answered = await got(f"{url}{path}", method)
        assert answered[:2] == (status, "application/json")
        assert isinstance(json.loads(answered[2]), dict)
