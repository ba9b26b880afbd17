"""Every kind of node pulls real images from a real registry through a real Breakwater.

Cold means that neither the client nor Breakwater has a byte of it; warm, that the client has forgotten it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests.interop.conftest import upstreams_at
from tests.support.clients import EVERY_CLIENT, Client
from tests.support.images import MIB, Image, image, multi_arch
from tests.support.origin import Origin
from tests.support.process import Breakwater

_SEED = count(1000)

#: What is pulled: name of the case -> image with content that no other case has.
KINDS: dict[str, Callable[[], Image]] = {
    "multi-layer": lambda: image(next(_SEED), (300_000, 5 * MIB, 17, 40_000)),
    "multi-arch": lambda: multi_arch(next(_SEED)),
    "multi-layer, Docker's media types": lambda: image(next(_SEED), (300_000, 2 * MIB), docker=True),
    "multi-arch, Docker's media types": lambda: multi_arch(next(_SEED), docker=True),
}


@pytest.fixture(scope="module", params=EVERY_CLIENT, ids=lambda client: client.name)
def client(request: pytest.FixtureRequest, scratch: Path, breakwater: Breakwater) -> Iterator[Client]:
    """Each of the four, pointed at the module's Breakwater and with nowhere else to go."""
    with request.param(scratch / request.param.name, breakwater.address) as running:
        yield running


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_pulls_cold_and_then_costs_the_origin_nothing(
    client: Client, kind: str, origin: Origin, breakwater: Breakwater
) -> None:
    """INV-4, INV-9: cold, each digest is fetched once; warm, the origin is asked for no digest at all."""
    repository = f"library/cold-{next(_SEED)}"
    pushed = origin.push(repository, "1", KINDS[kind]())
    n_before = len(origin.requests())

    assert client.pull(repository, "1") == pushed.digest
    fetched = Counter(each.target for each in origin.requests()[n_before:] if each.names_a_digest)
    assert fetched, "nothing reached the origin: this pull was not cold"
    assert set(fetched.values()) == {1}, fetched

    client.reset()
    n_before = len(origin.requests())
    assert client.pull(repository, "1") == pushed.digest
    asked_again = [str(each) for each in origin.requests()[n_before:] if each.names_a_digest]
    assert asked_again == []
    breakwater.assert_log_is_clean()


@pytest.mark.parametrize("tag_ttl", ["10m", "0s"], ids=["tags are fresh", "tags have expired"])
def test_every_client_pulls_what_was_pulled_before_when_the_origin_is_gone(scratch: Path, tag_ttl: str) -> None:
    """Product promise 3: what is cached is answered whatever the upstream does, tags included."""
    with ExitStack() as stack:
        here = scratch / f"gone-{next(_SEED)}"
        origin = stack.enter_context(Origin(here / "origin"))
        breakwater = stack.enter_context(Breakwater(here / "breakwater", upstreams_at(origin.url, tag_ttl=tag_ttl)))
        clients = [stack.enter_context(each(here / each.name, breakwater.address)) for each in EVERY_CLIENT]
        pushed = {
            "library/small": origin.push("library/small", "1", KINDS["multi-layer"]()),
            "team/multi": origin.push("team/multi", "1", KINDS["multi-arch"]()),
        }

        def everything_is_pulled() -> None:
            for client in clients:
                for repository, wanted in pushed.items():
                    assert client.pull(repository, "1") == wanted.digest, f"{client.name} {repository}"
                client.reset()

        everything_is_pulled()
        origin.stop()
        everything_is_pulled()

        # A node that lost its power comes back with what it had (promise 8), and hashes it before it trusts it again.
        breakwater.kill()
        breakwater.start()
        everything_is_pulled()
        breakwater.stop_cleanly()
