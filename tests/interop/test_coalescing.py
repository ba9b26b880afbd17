"""However many ask, and however they ask, upstream is asked once (product promise 1; INV-3, INV-4).

The clients are raw sockets that see what a library would hide; the count is the origin's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.interop.conftest import upstreams_at
from tests.support.crowd import Visit, visit_all
from tests.support.images import MIB, digest_of, image
from tests.support.origin import Origin
from tests.support.process import Breakwater, eventually
from tests.support.relay import Relay

_SEED = count(2000)


def _blob(n_bytes: int) -> bytes:
    return random.Random(next(_SEED)).randbytes(n_bytes)


def test_200_cold_clients_of_one_blob_cost_one_upstream_get(origin: Origin, breakwater: Breakwater) -> None:
    """INV-4: the origin's own metrics count one GET of a 50 MiB blob; every one of 200 bodies hashes right."""
    content = _blob(50 * MIB)
    digest = origin.push_blob("library/large", content)
    n_before = origin.n_requests("blob", "get")

    visits = [Visit(f"/v2/library/large/blobs/{digest}") for _ in range(200)]
    visit_all(breakwater.port, visits)

    _assert_all_whole(visits, digest, len(content))
    assert origin.n_requests("blob", "get") - n_before == 1
    breakwater.assert_log_is_clean()


def test_200_clients_have_their_first_byte_before_upstream_has_sent_its_last(origin: Origin, scratch: Path) -> None:
    """INV-3: bytes leave while the transfer runs. The last MiB is held back until all 200 clients have a byte."""
    content = _blob(50 * MIB)
    digest = origin.push_blob("library/large", content)

    with Relay(origin.port, hold_back=MIB, holds=lambda target: digest in target) as relay:
        with Breakwater(scratch / f"held-{next(_SEED)}", upstreams_at(relay.url)) as breakwater:
            visits = [Visit(f"/v2/library/large/blobs/{digest}") for _ in range(200)]

            def release_once_all_have_a_byte() -> None:
                if all(visit.n_bytes for visit in visits):
                    relay.release()

            visit_all(breakwater.port, visits, after_each_round=release_once_all_have_a_byte)
            breakwater.stop_cleanly()

        assert relay.is_holding.is_set(), "nothing was held back: this showed nothing"
        _assert_all_whole(visits, digest, len(content))
        assert len(relay.seen("GET", digest)) == 1


def test_parallel_open_ended_ranges_closed_early_cost_one_upstream_get(origin: Origin, breakwater: Breakwater) -> None:
    """A client like containerd 2 asks for `bytes=N-` many times at once and hangs up after its share."""
    content, share = _blob(20 * MIB), 2 * MIB
    digest = origin.push_blob("library/ranges", content)
    n_before = origin.n_requests("blob", "get")

    offsets = range(0, len(content), share)
    target = f"/v2/library/ranges/blobs/{digest}"
    visits = [Visit(target, {"Range": f"bytes={offset}-"}, leave_after=share) for offset in offsets]
    visit_all(breakwater.port, visits)

    for offset, visit in zip(offsets, visits, strict=True):
        assert visit.status == 206
        assert visit.answered["content-range"] == f"bytes {offset}-{len(content) - 1}/{len(content)}"
        assert visit.expects == len(content) - offset
        assert visit.digest == digest_of(content[offset : offset + share]), f"bytes from {offset} on"
    assert origin.n_requests("blob", "get") - n_before == 1
    breakwater.assert_log_is_clean()


def test_a_transfer_goes_on_when_some_of_its_readers_leave(origin: Origin, breakwater: Breakwater) -> None:
    """INV-4: a leaving reader, the first one included, ends nothing for those who stay."""
    content = _blob(20 * MIB)
    digest = origin.push_blob("library/leaving", content)
    n_before = origin.n_requests("blob", "get")

    target = f"/v2/library/leaving/blobs/{digest}"
    leaving = [Visit(target, leave_after=1) for _ in range(20)]
    staying = [Visit(target) for _ in range(20)]
    visit_all(breakwater.port, [*leaving, *staying])

    assert {visit.end for visit in leaving} == {"left"}
    _assert_all_whole(staying, digest, len(content))
    assert origin.n_requests("blob", "get") - n_before == 1
    breakwater.assert_log_is_clean()


def test_readers_of_every_kind_share_one_transfer(origin: Origin, breakwater: Breakwater) -> None:
    """Product promise 1: whole, ranged, multi-ranged and HEAD-then-GET readers of a cold blob cost one GET."""
    content = _blob(8 * MIB)
    digest = origin.push_blob("library/mixed", content)
    n_before = origin.n_requests("blob", "get")

    target = f"/v2/library/mixed/blobs/{digest}"
    last = len(content) - 1
    kinds: dict[str, tuple[Callable[[], Visit], int, bytes | None]] = {
        "whole": (lambda: Visit(target), 200, content),
        "HEAD": (lambda: Visit(target, method="HEAD"), 200, b""),
        "first bytes": (lambda: Visit(target, {"Range": "bytes=0-99"}), 206, content[:100]),
        "last bytes": (lambda: Visit(target, {"Range": "bytes=-100"}), 206, content[-100:]),
        "from the middle": (lambda: Visit(target, {"Range": f"bytes={4 * MIB}-"}), 206, content[4 * MIB :]),
        "two ranges": (lambda: Visit(target, {"Range": f"bytes=0-9,{last - 9}-{last}"}), 206, None),
    }
    visits = {name: [make() for _ in range(10)] for name, (make, _, _) in kinds.items()}
    visit_all(breakwater.port, [visit for some in visits.values() for visit in some])

    for name, (_, status, expected) in kinds.items():
        for visit in visits[name]:
            assert (visit.status, visit.end) == (status, "whole"), f"{name}: {visit}"
            assert expected is None or visit.digest == digest_of(expected), name
    assert origin.n_requests("blob", "get") - n_before == 1
    breakwater.assert_log_is_clean()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_simultaneous_requests_for_one_cold_tag_are_one_question_upstream(
    origin: Origin, breakwater: Breakwater, method: str
) -> None:
    """100 clients that resolve one tag at once cost one upstream request of a kind, not one each."""
    pushed = origin.push(f"library/tag-{method.lower()}", "1", image(next(_SEED), (1000,)))
    n_before = len(origin.requests())

    visits = [Visit(f"/v2/library/tag-{method.lower()}/manifests/1", method=method) for _ in range(100)]
    visit_all(breakwater.port, visits)

    assert {visit.answered.get("docker-content-digest") for visit in visits} == {pushed.digest}
    if method == "GET":
        _assert_all_whole(visits, pushed.digest, len(pushed.body))
    asked = [str(each) for each in origin.requests()[n_before:]]
    assert len(asked) == len(set(asked)), asked


def test_a_transfer_whose_readers_have_all_left_is_kept_by_default(origin: Origin, scratch: Path) -> None:
    """INV-4: what upstream was asked for is finished and kept, also when nobody waits for it any more."""
    content = _blob(8 * MIB)
    digest = origin.push_blob("library/orphan", content)
    target = f"/v2/library/orphan/blobs/{digest}"

    with Relay(origin.port, hold_back=MIB, holds=lambda seen: digest in seen) as relay:
        with Breakwater(scratch / f"orphan-{next(_SEED)}", upstreams_at(relay.url)) as breakwater:
            visit_all(breakwater.port, [Visit(target, leave_after=1) for _ in range(5)])
            relay.release()
            eventually(lambda: _is_hit(breakwater, target), "the orphaned blob is a hit")
            again = Visit(target)
            visit_all(breakwater.port, [again])
            breakwater.stop_cleanly()

        _assert_all_whole([again], digest, len(content))
        assert len(relay.seen("GET", digest)) == 1


def _is_hit(breakwater: Breakwater, target: str) -> bool:
    head = Visit(target, method="HEAD")
    visit_all(breakwater.port, [head])
    return "hit" in head.answered.get("cache-status", "")


def _assert_all_whole(visits: list[Visit], digest: str, size: int) -> None:
    wrong = [visit for visit in visits if (visit.status, visit.end, visit.n_bytes) != (200, "whole", size)]
    assert not wrong, f"{len(wrong)} of {len(visits)}, the first: {wrong[0]}"
    assert {visit.digest for visit in visits} == {digest}
