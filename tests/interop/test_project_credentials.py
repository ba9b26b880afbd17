"""A project with credentials of its own: they open upstream for this project alone, and what they brought stays its own."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

from tests.support.clients import TEST_HOST
from tests.support.images import image
from tests.support.process import Breakwater, fetched
from tests.support.registry import Guard, ScriptedRegistry


async def test_a_projects_credentials_are_its_own(scratch: Path) -> None:
    """INV-7, promise 7: the others meet upstream without them, before and after; a digest from there opens nothing."""
    wanted = image(31, (40_000,))
    layer = wanted.blobs[1].digest
    async with ScriptedRegistry(
        guard=Guard(scheme="basic", login=("team", "pass"), challenges=['Basic realm="x"'])
    ) as up:
        up.put("private/app", wanted, "1")
        own = {"username": "team", "password": "pass"}
        settings = {
            "upstreams": {TEST_HOST: {"url": up.url}},
            "projects": {"team": {"upstream": TEST_HOST, "path": "team", "credentials": own}},
        }
        breakwater = Breakwater(scratch / "own", settings)
        await asyncio.to_thread(breakwater.start)
        try:

            async def asked(path: str) -> tuple[int, bytes]:
                return await asyncio.to_thread(fetched, breakwater.port, path)

            async def strangers() -> list[int]:
                rest = (f"manifests/{wanted.digest}", "manifests/1", f"blobs/{layer}")
                return [(await asked(f"/v2/{TEST_HOST}/private/app/{each}"))[0] for each in rest]

            before = await strangers()
            assert not set(before) & {200}
            assert await asked("/v2/team/private/app/manifests/1") == (200, wanted.body)
            assert await asked(f"/v2/team/private/app/blobs/{layer}") == (200, wanted.blobs[1].content)
            assert await strangers() == before, "cached by team, and looks to others as it did"
            shown = base64.b64encode(b"team:pass").decode()
            with_login = [one for one in up.requests if shown in one.header("authorization")]
            assert with_login
        finally:
            await asyncio.to_thread(breakwater.close)
