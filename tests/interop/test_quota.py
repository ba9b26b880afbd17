"""A quota holds over pulls by a real client, and what a project pays is known again after kill -9."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from tests.interop.conftest import upstreams_at
from tests.support.clients import TEST_HOST, Skopeo
from tests.support.images import MIB, image
from tests.support.origin import Origin
from tests.support.process import Breakwater, CommandFailed

_SEED = count(9000)


def use_of(breakwater: Breakwater, project: str = "team") -> tuple[int, int]:
    """Bytes and blobs that a project pays for."""
    usage = breakwater.admin("/api/v1/usage")
    (one,) = [each for each in usage["projects"] if each["project"] == project]
    assert one["reserved_bytes"] == 0
    return one["used_bytes"], one["blobs"]


def test_what_a_project_pays_survives_kill_9_to_the_byte(scratch: Path, origin: Origin) -> None:
    """Promise 5 and 8: the journal is written before the blob has its name, and the recount finds no drift."""
    project = {"match": [f"{TEST_HOST}/**"], "quota": "10MiB", "on_full": "evict"}
    settings = upstreams_at(origin.url) | {"projects": {"team": project}}
    with Breakwater(scratch / "bw-kill", settings) as running, Skopeo(scratch / "sk", running.address) as client:
        expected = 0
        for n in range(6):
            wanted = image(next(_SEED), (2 * MIB, 10_000))
            origin.push(f"team/app{n}", "1", wanted)
            assert client.pull(f"team/app{n}", "1") == wanted.digest
            expected += len(wanted.body) + sum(len(blob.content) for blob in wanted.all_blobs())
            used, _ = use_of(running)
            assert used <= 10 * MIB
        assert expected > 10 * MIB, "something had to go"
        before = use_of(running)
        running.kill()
        running.start()
        assert use_of(running) == before
        assert running.admin("/api/v1/usage")["drift"] == []
        running.stop_cleanly()


def test_a_full_project_that_refuses_says_how_much_is_used_of_what(scratch: Path, origin: Origin) -> None:
    """`on_full = "deny"`: a real client prints the sentence, and nothing of the image was fetched but its manifest."""
    project = {"match": [f"{TEST_HOST}/**"], "quota": "3MiB", "on_full": "deny"}
    settings = upstreams_at(origin.url) | {"projects": {"team": project}}
    with Breakwater(scratch / "bw-deny", settings) as running, Skopeo(scratch / "sk-deny", running.address) as client:
        for name in ("first", "second"):
            origin.push(f"deny/{name}", "1", image(next(_SEED), (2 * MIB,)))
        client.pull("deny/first", "1")
        n_before = len(origin.requests())
        with pytest.raises(CommandFailed, match=r"rule 'quota' of project 'team': it needs 2\.0 MiB .* of 3\.0 MiB"):
            client.pull("deny/second", "1")
        assert not [each for each in origin.requests()[n_before:] if "/blobs/" in str(each)]
        running.stop_cleanly()
