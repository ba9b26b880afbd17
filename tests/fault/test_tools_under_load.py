"""The operator's tools beside a running server that clients pull from, more than fits: issue 3, "each safe while it runs"."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tests.support import images
from tests.support.commands import Done, breakwater_command
from tests.support.lives import lives

LAYER = images.image(1, (60_977, 1_500_000)).blobs[-1].digest

#: Each command with the exit codes that it may have: to purge what has just been evicted is said with 1.
TOOLS: tuple[tuple[tuple[str, ...], set[int]], ...] = (
    (("du",), {0}),
    (("ls",), {0}),
    (("verify",), {0}),
    (("verify", "--repair"), {0}),
    (("purge", "docker.io/library/alpine:0", "--dry-run"), {0, 1}),
    (("purge", "docker.io/library/alpine:0"), {0, 1}),
    (("purge", LAYER), {0, 1}),
    (("purge", "docker.io/library/*"), {0, 1}),
    (("purge", "docker.io/library/alpine"), {0, 1}),
    (("du", "--recount"), {0}),
)


async def test_the_operators_tools_are_safe_beside_a_crowd(tmp_path: Path) -> None:
    """du, ls, purge (of a tag, a digest, a pattern, a repository) and verify, plain and as JSON, while four clients pull:
    every body is whole and right, nobody is refused, and afterwards every file hashes to its name and the count equals a
    recount."""
    async with lives(tmp_path, 3) as made:

        async def use_them_all() -> None:
            for words, codes in TOOLS:
                for more in ((), ("--json",)):
                    done = await asyncio.to_thread(breakwater_command, made.process, *words, *more)
                    _check(done, codes, " ".join((*words, *more)), is_json=bool(more))

        await made.live(use_them_all)
        await made.live(_at_once)
        assert made.counts.is_clean, made.counts
        assert made.counts.bodies > 100 and made.counts.verified == 2, made.counts


def _check(done: Done, codes: set[int], said: str, *, is_json: bool) -> None:
    assert done.code in codes, f"{said}: {done}"
    assert "Traceback" not in done.err
    if is_json and done.code == 0:
        json.loads(done.out)
    elif done.code == 0:
        assert done.out.strip(), f"{said} says nothing"
    else:
        assert done.err.strip(), f"{said} ends with {done.code} and says nothing"


async def _at_once() -> None:
    """An end without any load: the life before it is looked at."""
