"""Reading the settings again, over the admin listener: what SIGHUP does, with an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from pydantic import Field

from proxy.errors import BadRequest, InvalidSettings
from proxy.web.api import Document, Nothing, Operation


class Reloaded(Document):
    waiting: list[str] = Field(description="Keys that changed and are taken up by the next start only.")


def operation(reload: Callable[[], Awaitable[Sequence[str]]]) -> Operation:
    """`reload` takes up what the settings file says now and returns the keys that wait; it raises InvalidSettings when
    there is a mistake, and has changed nothing then."""

    async def reloaded(_: Nothing) -> Reloaded:
        try:
            return Reloaded(waiting=list(await reload()))
        except InvalidSettings as error:
            raise BadRequest(f"nothing was changed: {'; '.join(error.problems)}") from error

    summary = "Read the settings again, with the files that they name, and take them up: all of them, or none."
    return Operation(
        "POST",
        "reload",
        summary,
        reloaded,
        Reloaded,
        fails={400: "The request cannot be understood, or the settings have a mistake; nothing was changed."},
    )
