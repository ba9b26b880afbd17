"""What lets an answer be kept ready (Pull.vouch), and what takes that back: no shortcut may change an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from proxy.engine.manifests import holding_of
from proxy.engine.purge import Purge
from proxy.errors import Denied
from proxy.oci.digest import Digest
from proxy.oci.endpoints import ManifestGet, RepositoryPath
from proxy.ports import TagRecord
from proxy.rules.quota import Allowance
from proxy.rules.routes import DEFAULT_PROJECT
from tests.support import images
from tests.support.engine import ALPINE, Engine, FakeUpstream, engine, route, tag

IMAGE, OTHER = images.image(71, (100,)), images.image(72, (100,))
BY_TAG = ManifestGet(RepositoryPath(None, ALPINE.value), tag("1"), None)
BY_DIGEST = ManifestGet(RepositoryPath(None, ALPINE.value), Digest.parse(IMAGE.digest), None)
BOTH = pytest.mark.parametrize("asked", [BY_TAG, BY_DIGEST], ids=["by tag", "by digest"])


def upstream() -> FakeUpstream:
    one = FakeUpstream()
    one.put(IMAGE, "1")
    one.put(OTHER, "2")
    return one


async def vouched(running: Engine, asked: ManifestGet):  # type: ignore[no-untyped-def]
    """Ask until it is a hit, and what vouches for that one."""
    await running.pull.manifest(BY_TAG)
    await running.idle()
    pulled = await running.pull.manifest(asked)
    assert pulled.outcome == "hit"
    again = running.pull.vouch(asked, pulled)
    assert again is not None and (vouched := again()) is not None and vouched.holds()
    return again


async def _purge(running: Engine) -> None:
    purge = Purge(running.store.records, running.links, running.tags, running.manifests, running.capacity)
    await purge.run(f"docker.io/{ALPINE.value}:1")


async def _import_another(running: Engine) -> None:
    moved = (await running.pull.manifest(replace(BY_TAG, target=tag("2")))).held.descriptor
    await running.tags.learn(holding_of(route()), TagRecord("1", moved, running.clock.wall()))


async def _change_the_plan(running: Engine) -> None:
    running.pull.plan = replace(running.pull.plan)


async def _drop_the_link(running: Engine) -> None:
    await running.links.drop(holding_of(route()), Digest.parse(IMAGE.digest))


async def _forget_the_tag(running: Engine) -> None:
    await running.tags.forget(holding_of(route()), [tag("1")])


async def _evict(running: Engine) -> None:
    await running.capacity.evict([Digest.parse(IMAGE.digest)])


async def _let_memory_go(running: Engine) -> None:
    running.manifests.forget(Digest.parse(IMAGE.digest))


async def _stop_paying(running: Engine) -> None:
    running.charges.book.drop(DEFAULT_PROJECT, Digest.parse(IMAGE.digest))
    running.charges.charge(DEFAULT_PROJECT, Digest.of(b"another's"), len(IMAGE.body))  # as much as before


async def _pay_for_more(running: Engine) -> None:
    await running.pull.manifest(replace(BY_TAG, target=tag("2")))
    await running.idle()


async def _promise_more(running: Engine) -> None:
    assert running.charges.reserve(DEFAULT_PROJECT, 1)


#: What may change an answer, and what of it is found to stand when it is then asked about in full.
CHANGES = {
    "a purge": (_purge, False),
    "another plan": (_change_the_plan, False),
    "a link that is dropped": (_drop_the_link, False),
    "an eviction": (_evict, False),
    "a table that is full": (_let_memory_go, False),
    "a charge that is dropped": (_stop_paying, True),
    "a charge more": (_pay_for_more, True),
    "a promise more": (_promise_more, True),
}


@BOTH
@pytest.mark.parametrize(("change", "stands"), CHANGES.values(), ids=CHANGES.keys())
async def test_whatever_may_change_an_answer_has_it_judged_anew(
    asked: ManifestGet, change: Callable[[Engine], Awaitable[None]], stands: bool
) -> None:
    """performance.md 5: verdicts are dropped when rules, links, tags or charges change; what was taken out is not served
    from a table either."""
    async with engine(upstream(), allowances={DEFAULT_PROJECT: Allowance(quota=1 << 20)}) as running:
        again = await vouched(running, asked)
        before = again()
        assert before is not None and before.holds()
        await change(running)
        assert not before.holds()
        after = again()
        assert (after is not None and after.holds()) == stands
        running.charges.book.of(DEFAULT_PROJECT).reserved = 0


@pytest.mark.parametrize("change", [_import_another, _forget_the_tag], ids=["an import", "a tag that is forgotten"])
async def test_a_tag_that_no_longer_means_it_is_not_vouched_for(change: Callable[[Engine], Awaitable[None]]) -> None:
    """An import says what a tag means from now on, well within the old answer's time."""
    async with engine(upstream()) as running:
        again = await vouched(running, BY_TAG)
        before = again()
        assert before is not None and before.holds()
        await change(running)
        assert not before.holds() and again() is None


@BOTH
@pytest.mark.parametrize("change", [_purge, _change_the_plan, _drop_the_link], ids=["a purge", "a plan", "a link"])
async def test_what_has_changed_since_an_answer_was_judged_is_not_vouched_for(
    asked: ManifestGet, change: Callable[[Engine], Awaitable[None]]
) -> None:
    """INV-8: an answer may wait for the disk between its judgement and the moment in which it is kept. Rules that came
    meanwhile never saw it."""
    async with engine(upstream()) as running:
        await running.pull.manifest(BY_TAG)
        await running.idle()
        pulled = await running.pull.manifest(asked)
        await change(running)
        running.manifests._ready[pulled.held.descriptor.digest] = pulled.held  # the disk was slower than the change
        again = running.pull.vouch(asked, pulled)
        assert again is None or again() is None


@pytest.mark.parametrize("change", [_import_another, _forget_the_tag], ids=["an import", "a tag that is forgotten"])
async def test_a_tag_that_has_moved_since_it_was_read_is_not_vouched_for(
    change: Callable[[Engine], Awaitable[None]],
) -> None:
    """Its manifest may have waited for the disk while the tag came to mean another."""
    async with engine(upstream()) as running:
        await running.pull.manifest(BY_TAG)
        await running.idle()
        pulled = await running.pull.manifest(BY_TAG)
        await change(running)
        again = running.pull.vouch(BY_TAG, pulled)
        assert again is None or again() is None


@BOTH
async def test_a_project_that_has_become_full_is_refused_as_on_the_long_way(asked: ManifestGet) -> None:
    """`on_full = "deny"` is decided at the manifest, every time: what was let through while there was room is not, once
    others have taken it and its layers could not be kept."""
    allowance = Allowance(quota=1 << 20, on_full="deny")
    async with engine(upstream(), allowances={DEFAULT_PROJECT: allowance}) as running:
        again = await vouched(running, asked)
        before = again()
        used = running.charges.book.of(DEFAULT_PROJECT).used
        running.charges.charge(DEFAULT_PROJECT, Digest.of(b"another's layer"), (1 << 20) - used)
        with pytest.raises(Denied):
            await running.pull.manifest(asked)
        assert before is not None and not before.holds() and again() is None


async def test_a_tag_is_vouched_for_until_its_time_is_up() -> None:
    """INV-6: then upstream is asked, and the long way does that. A digest has no time."""
    async with engine(upstream()) as running:
        by_tag, by_digest = await vouched(running, BY_TAG), await vouched(running, BY_DIGEST)
        await running.clock.advance(599)
        held = by_tag()
        assert (held.age_s, held.fresh_for_s) == (599, 1)
        await running.clock.advance(2)
        assert by_tag() is None
        assert by_digest() is not None


async def test_a_project_that_cannot_pay_takes_the_long_way() -> None:
    """The refusal is said by the long way; the short one never raises into the connection."""
    async with engine(upstream(), allowances={DEFAULT_PROJECT: Allowance(quota=1 << 20, on_full="deny")}) as running:
        again = await vouched(running, BY_DIGEST)

        def refuses(project: str, digest: Digest) -> None:
            raise Denied("full", rule="quota", project=project)

        running.charges.use = refuses  # type: ignore[method-assign]
        assert again() is None
