"""Asking a source of logins over HTTP: a cloud's token endpoint or metadata server, as the settings name it.

The one place from which INV-7's judging of addresses is absent, because the address is ours or the operator's own: a
metadata server is link-local by design. Nothing an upstream says leads here. No redirect is followed, no proxy or
netrc of the environment is used, answers are bounded, and no sentence quotes what was sent or received.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from proxy.errors import Misbehaved, Unauthorised, Unreachable
from proxy.upstream import failures

#: One answer of a source may take so long, in seconds; a token's asker waits for less than it (policy.Deadlines).
ANSWER_S = 8.0
MAX_ANSWER_BYTES = 64 * 1024


async def asked(
    method: str,
    url: str,
    *,
    upstream: str,
    headers: Mapping[str, str] | None = None,
    form: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> str:
    """The text of an answer. Raises Unauthorised (400, 401, 403, 404), Unreachable, Timeout or Misbehaved.

    A connection of its own each time: this happens a few times a day.
    """
    place = url.partition("?")[0]
    try:
        async with aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(), trust_env=False, timeout=aiohttp.ClientTimeout(total=ANSWER_S)
        ) as session:
            async with session.request(
                method, url, headers=headers, data=form if body is None else body, allow_redirects=False
            ) as response:
                text = await response.content.read(MAX_ANSWER_BYTES + 1)
                while not response.content.at_eof() and len(text) <= MAX_ANSWER_BYTES:
                    text += await response.content.read(MAX_ANSWER_BYTES + 1)
                status = response.status
    except failures.FOREIGN as error:
        failure = failures.of_exception(error, upstream=upstream, place=place)
        raise type(failure)(f"no login: {failure}", upstream=upstream) from None
    if status in (400, 401, 403, 404):
        raise Unauthorised(f"upstream {upstream}: no login, {place} refuses us ({status})", upstream=upstream)
    if status == 429 or status >= 500:
        raise Unreachable(f"upstream {upstream}: no login, {place} cannot answer ({status})", upstream=upstream)
    if status != 200 or len(text) > MAX_ANSWER_BYTES:
        raise Misbehaved(f"upstream {upstream}: no login, {place} answers {status} with nonsense", upstream=upstream)
    return text.decode("utf-8", "replace")


async def asked_json(method: str, url: str, *, upstream: str, **more: Any) -> dict[str, Any]:
    """The JSON object that `asked` brings. Raises Misbehaved for anything else, and like `asked`."""
    text = await asked(method, url, upstream=upstream, **more)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        place = url.partition("?")[0]
        raise Misbehaved(f"upstream {upstream}: no login, {place} answers without JSON", upstream=upstream)
    return document


def word(document: Mapping[str, Any], key: str, *, upstream: str, source: str) -> str:
    """A string of an answer that must have it. Raises Misbehaved."""
    found = document.get(key)
    if not isinstance(found, str) or not found:
        raise Misbehaved(f"upstream {upstream}: no login, {source} answers without {key}", upstream=upstream)
    return found
