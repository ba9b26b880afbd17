"""The cheap question about an answer that is kept ready, beside the full one, whatever happens in between."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from proxy.engine.manifests import holding_of
from proxy.engine.pull import Vouched
from proxy.errors import BreakwaterError, Unreachable
from proxy.oci.digest import Digest
from proxy.oci.endpoints import ManifestGet, RepositoryPath
from proxy.ports import TagRecord
from proxy.rules.freshness import TagPolicy
from proxy.rules.quota import Allowance
from proxy.rules.routes import DEFAULT_PROJECT
from tests.support import images
from tests.support.engine import ALPINE, HOST, Engine, FakeUpstream, engine, route, tag

IMAGES = [images.image(seed, (10,)) for seed in range(2)]
DIGESTS = [Digest.parse(image.digest) for image in IMAGES]

which = st.integers(0, len(IMAGES) - 1)
events = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["ask for the tag", "ask for the digest"]), which),
        st.tuples(st.just("wait"), st.integers(1, 500)),
        st.tuples(st.sampled_from(["move", "import", "evict", "drop the link", "forget the tag"]), which),
        st.tuples(st.sampled_from(["down", "up", "another plan", "another quota"]), st.just(0)),
    ),
    min_size=5,
    max_size=30,
)


def asked(what: str, n: int) -> ManifestGet:
    return ManifestGet(RepositoryPath(None, ALPINE.value), tag("1") if what == "tag" else DIGESTS[n], None)


@given(events=events, on_full=st.sampled_from(["evict", "deny", "bypass"]))
def test_what_holds_by_the_cheap_question_stands_by_the_full_one(events: list[tuple[str, int]], on_full: str) -> None:
    """performance.md 5: while nothing counts as changed and its time is not up, an answer would be given again."""
    asyncio.run(_live(events, on_full))


async def _live(events: list[tuple[str, int]], on_full: str) -> None:
    upstream = FakeUpstream()
    for n, image in enumerate(IMAGES):
        upstream.put(image, f"only-{n}")
    upstream.put(IMAGES[0], "1")
    # Room for all of them but the last: a project goes over, and stops paying for what it used longest ago.
    quota = sum(len(image.body) for image in IMAGES) - 10
    allowances = {DEFAULT_PROJECT: Allowance(quota=quota, on_full=on_full)}  # type: ignore[arg-type]
    async with engine(upstream, tag_policy=TagPolicy(600.0, inf), allowances=allowances) as running:
        kept: list[tuple[float, Vouched, str]] = []
        for what, n in events:
            if what.startswith("ask"):
                kept += await _asked(running, asked(what.split()[-1], n))
            elif what == "wait":
                await running.clock.advance(n)
            else:
                await _happens(running, upstream, what, n)
            for judged_at, vouched, question in kept:
                is_in_time = running.clock.monotonic() < judged_at + vouched.fresh_for_s
                if is_in_time and vouched.holds():
                    # Asked of what stands now: the same answer, from memory, without a question to anybody.
                    found = await running.pull.manifest(asked(*_words(question)))
                    assert (found.outcome, str(found.held.descriptor.digest)) == ("hit", question.split()[-1]), what
        await running.idle()


def _words(question: str) -> tuple[str, int]:
    what, digest = question.split()
    return what, [str(each) for each in DIGESTS].index(digest)


async def _asked(running: Engine, question: ManifestGet) -> list[tuple[float, Vouched, str]]:
    try:
        pulled = await running.pull.manifest(question)
    except BreakwaterError:
        return []
    again = running.pull.vouch(question, pulled)
    vouched = again() if again is not None else None
    if vouched is None:
        return []
    what = "digest" if isinstance(question.target, Digest) else "tag"
    return [(running.clock.monotonic(), vouched, f"{what} {pulled.held.descriptor.digest}")]


async def _happens(running: Engine, upstream: FakeUpstream, what: str, n: int) -> None:
    holding = holding_of(route())
    if what == "move":
        upstream.put(IMAGES[n], "1")
    elif what == "import":
        descriptor = (await running.links.of(holding)).descriptor(DIGESTS[n])
        if descriptor is not None:
            await running.tags.learn(holding, TagRecord("1", descriptor, running.clock.wall(), HOST))
    elif what == "evict":
        await running.capacity.evict([DIGESTS[n]])
    elif what == "drop the link":
        await running.links.drop(holding, DIGESTS[n])
    elif what == "forget the tag":
        await running.tags.forget(holding, [tag("1")])
    elif what == "another plan":
        running.pull.plan = replace(running.pull.plan)
    elif what == "another quota":
        running.pull.plan = replace(running.pull.plan)  # a reload changes both
        running.charges.allow({DEFAULT_PROJECT: Allowance(quota=len(IMAGES[0].body) + 5, on_full="evict")})
    else:
        upstream.failure = Unreachable("down", upstream=HOST) if what == "down" else None
