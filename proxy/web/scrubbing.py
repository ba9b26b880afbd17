"""`breakwater verify` over the admin listener: lines of JSON while the store is hashed, the report last."""

from __future__ import annotations

from aiohttp import web
from pydantic import Field

from proxy.engine.scrub import Scrub
from proxy.web.api import Document, LongWork
from proxy.web.freight import LINES, told


class ToVerify(Document):
    repair: bool = Field(False, description="Fetch what is rotten again from upstream.")


def operations(scrub: Scrub) -> list[LongWork]:
    """The one there is."""

    async def verify(request: web.Request, asked: ToVerify) -> web.StreamResponse:
        return await told(request, lambda tell: scrub.verify(tell, repair=asked.repair))

    summary = "Hash everything that is stored, and compare the count with what is on disk."
    return [LongWork("verify", summary, verify, LINES, ToVerify, "nothing")]
