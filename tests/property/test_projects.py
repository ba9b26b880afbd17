"""Several identities, shared blobs, rules that come and go, blobs that vanish: no leak, and the ledgers are exact.

Random operations run beside each other against a model that knows only who may read what; after every handful, when all
is quiet, each account must agree with what is stored, to the byte.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace

import pytest

from proxy.errors import BreakwaterError, Denied, NotFound, Unauthenticated
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, ManifestGet, ReferrersList, RepositoryPath, TagsList
from proxy.oci.names import Repository, Tag
from proxy.rules.gates.access import ANONYMOUS, Access, Caller, Robot
from proxy.rules.gates.allowlist import Rules
from proxy.rules.globs import Glob
from proxy.rules.ledger import on_disk
from proxy.rules.quota import Allowance
from proxy.rules.routes import DEFAULT_PROJECT, ProjectRoute
from tests.contract.suites.charges import charges_in
from tests.support.engine import Engine, FakeUpstream, engine, whole
from tests.support.images import Image, image, manifest

KIB = 1024
ROBOTS = {
    "one": Robot("one", (), frozenset({"evicts", "denies"})),
    "two": Robot("two", (), frozenset({"bypasses"})),
}
READERS = {"evicts": ("one",), "bypasses": ("two", "one"), "denies": ("one",), "free": ("anonymous",)}
ALLOWANCES = {
    "evicts": Allowance(60 * KIB, "evict"),
    "bypasses": Allowance(50 * KIB, "bypass"),
    "denies": Allowance(70 * KIB, "deny"),
}
CALLERS = (ANONYMOUS, Caller("one"), Caller("two"))
REPOSITORIES = ("library/open", "library/other", "library/shared")


@dataclass(slots=True)
class Model:
    """What upstream has, and which digests are blocked for everybody."""

    images: dict[str, list[Image]] = field(default_factory=dict)
    blobs: dict[str, dict[Digest, bytes]] = field(default_factory=dict)
    blocked: set[Digest] = field(default_factory=set)

    def may(self, project: str, caller: Caller) -> bool:
        """Who may read: written down a second time, from the words of product.md."""
        named = READERS.get(project, ("anonymous",))
        return "anonymous" in named or (caller.robot in named and project in ROBOTS[caller.robot].projects)


def fill(upstream: FakeUpstream) -> Model:
    """Images with layers of their own and layers they share, in several repositories."""
    model = Model()
    common = image(99, (8 * KIB,)).blobs[1]
    for number, repository in enumerate(REPOSITORIES):
        images = []
        for seed in range(4):
            own = image(10 * number + seed, (6 * KIB + 900 * seed, 300))
            wanted = manifest(own.blobs[0], [*own.blobs[1:], common]) if seed % 2 else own
            upstream.put(wanted, str(seed), repository=Repository(repository))
            images.append(wanted)
        model.images[repository] = images
        model.blobs[repository] = {
            Digest.parse(blob.digest): blob.content for each in images for blob in each.all_blobs()
        }
    return model


def plan(running: Engine, model: Model) -> None:
    """The rules in effect, as a reload swaps them in."""
    blocked = tuple(Glob.parse(str(digest)) for digest in sorted(model.blocked))
    names = [DEFAULT_PROJECT, *READERS]
    access = {name: Access.of(name, READERS.get(name, ("anonymous",)), ROBOTS) for name in names}
    rules = {name: Rules(name, policy_deny=blocked) for name in names}
    running.pull.plan = replace(running.pull.plan, access=access, robots=ROBOTS, rules=rules)


async def act(chance: random.Random, running: Engine, model: Model) -> None:
    """One operation by one identity, judged at once."""
    project = chance.choice([*READERS, DEFAULT_PROJECT])
    caller = chance.choice(CALLERS)
    repository = chance.choice(REPOSITORIES)
    path = RepositoryPath(project, repository)
    kind = chance.randrange(10)
    try:
        if kind < 4:
            wanted = chance.choice(model.images[repository])
            by_tag = chance.random() < 0.5
            target = Tag(str(model.images[repository].index(wanted))) if by_tag else Digest.parse(wanted.digest)
            got = await running.pull.manifest(ManifestGet(path, target, None), caller)
            assert got.held.body == wanted.body
            assert model.may(project, caller), "a leak"
        elif kind < 8:
            # One in three digests is another repository's: it must open nothing here.
            elsewhere = chance.choice(REPOSITORIES) if chance.random() < 0.33 else repository
            digest = chance.choice(sorted(model.blobs[elsewhere]))
            _, opened = await running.pull.blob(BlobGet(path, digest, None), caller)
            body = await whole(opened)
            assert model.may(project, caller), "a leak"
            assert model.blobs[repository].get(digest) == body, "bytes of a repository that does not have them"
        elif kind == 8:
            await running.pull.tags(TagsList(path, None, None, None), caller)
            assert model.may(project, caller), "a leak"
        else:
            digest = Digest.parse(chance.choice(model.images[repository]).digest)
            await running.pull.referrers(ReferrersList(path, digest, "", None), caller)
            assert model.may(project, caller), "a leak"
    except Unauthenticated:
        assert not model.may(project, caller) and not caller.robot
    except Denied as error:
        if error.rule == "access":
            assert not model.may(project, caller)
        else:
            assert (error.rule == "quota" and project == "denies") or error.rule.startswith("sha256:")
    except NotFound:
        assert model.may(project, caller), "absence is told only to those who may read"


def shake(chance: random.Random, running: Engine, model: Model) -> None:
    """What operators and disks do: block or unblock a digest, or lose a blob."""
    kind = chance.randrange(4)
    if kind == 0:
        model.blocked ^= {chance.choice(sorted(model.blobs[chance.choice(REPOSITORIES)]))}
        while len(model.blocked) > 3:
            model.blocked.discard(min(model.blocked))
        plan(running, model)
    elif kind == 1:
        stored = [digest for digest, _ in running.ledger if running.capacity.may_go(digest)]
        if stored:
            gone = chance.choice(stored)
            running.manifests.forget(gone)
            running.owner.spawn_background(running.capacity.evict([gone]), "evict")


async def audit(running: Engine) -> None:
    """All is quiet: accounts, ledger and store agree, to the byte."""
    await running.idle()
    await running.charges.sweep()
    await running.idle()
    book = running.charges.book
    stored: dict[Digest, int] = {}
    async for batch in running.store.blobs.scan():
        stored |= {blob.digest: blob.size for blob in batch}
    assert dict(running.ledger) == stored
    assert running.ledger.committed == sum(map(on_disk, stored.values()))
    assert running.ledger.reserved == 0
    paid: set[Digest] = set()
    for project, account in book:
        assert account.reserved == 0, project
        assert account.charged == sum(size for _, size in account)
        assert account.allowance.quota is None or account.charged <= account.allowance.quota, project
        assert {digest: stored.get(digest) for digest, _ in account} == dict(account), project
        paid |= {digest for digest, _ in account}
    assert paid == set(stored), "every stored blob is paid for by somebody"
    await running.charges.write()
    journal = await charges_in(running.store.charges)
    assert {project: charges for project, charges in journal.items() if charges} == {
        project: dict(account) for project, account in book if len(account)
    }, "the journal says what the book says"


async def storm(seed: int, n_operations: int) -> None:
    """So many operations, some dozen beside each other at a time."""
    chance = random.Random(seed)
    upstream = FakeUpstream(piece_bytes=2 * KIB)
    model = fill(upstream)
    projects = tuple(ProjectRoute(name) for name in READERS)
    async with engine(upstream, projects=projects, allowances=ALLOWANCES, capacity=400 * KIB) as running:
        plan(running, model)
        n_done = 0
        while n_done < n_operations:
            n = chance.randrange(1, 24)
            shake(chance, running, model)
            results = await asyncio.gather(*(act(chance, running, model) for _ in range(n)), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, BreakwaterError):
                    raise result
                assert result is None, result
            n_done += n
            await audit(running)
            await running.clock.advance(chance.choice([0.0, 11.0, 700.0]))


@pytest.mark.parametrize("seed", range(4))
async def test_no_leak_and_exact_ledgers(seed: int) -> None:
    """Promise 5 and 7, for 10,000 random operations in all by three identities in five projects."""
    await storm(seed, 2500)


@pytest.mark.soak
async def test_no_leak_and_exact_ledgers_for_long() -> None:
    """The same, a hundred thousand times."""
    await storm(1000, 100_000)
