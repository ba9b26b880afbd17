"""Logins that upstream judges, rights that come and go there, shared blobs and quotas: no leak, and exact ledgers.

The model knows who may read what upstream, and since when not any more: what is read here is read by somebody who could
read it there within the time that a decision is remembered, and who is refused here could not read it there then.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from math import inf

import pytest

from proxy.engine.admission import REFUSED_FOR_S, RULE
from proxy.engine.origins import PassThrough
from proxy.errors import BreakwaterError, Denied, NotFound, Overloaded, Unauthenticated, Unauthorised
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, ManifestGet, ReferrersList, RepositoryPath, TagsList
from proxy.oci.names import Tag
from proxy.ports import Clock, Upstream
from proxy.rules.gates.access import ANONYMOUS, Caller, Login
from proxy.rules.routes import ProjectRoute
from tests.property.test_projects import ALLOWANCES, REPOSITORIES, Model, audit, fill
from tests.support.engine import HOST, Engine, FakeUpstream, engine, whole

NAMES = ("", "alice", "bob", "carol")
CALLERS = {name: Caller(login=Login(name, name, "secret")) if name else ANONYMOUS for name in NAMES}
#: How long a decision is remembered here, in seconds.
TTL_S = 300.0


@dataclass(slots=True)
class Rights:
    """Who may read what upstream, and when each right, or the lack of it, was last so. Monotonic seconds."""

    clock: Clock
    held: set[tuple[str, str]] = field(default_factory=set)
    held_at: dict[tuple[str, str], float] = field(default_factory=dict)
    lacked_at: dict[tuple[str, str], float] = field(default_factory=dict)

    def turn(self, name: str, repository: str) -> None:
        """Give the right or take it away."""
        (self.held_at if (name, repository) in self.held else self.lacked_at)[name, repository] = self.clock.monotonic()
        self.held ^= {(name, repository)}

    def had(self, name: str, repository: str, within_s: float) -> bool:
        """Whether the right was there at some time within so many seconds."""
        right = (name, repository)
        return right in self.held or self.clock.monotonic() - self.held_at.get(right, -inf) <= within_s

    def lacked(self, name: str, repository: str, within_s: float) -> bool:
        """Whether it was missing at some time within so many seconds."""
        right = (name, repository)
        return right not in self.held or self.clock.monotonic() - self.lacked_at.get(right, -inf) <= within_s

    def judge(self, name: str, repository: str) -> None:
        """What upstream says to this login."""
        if (name, repository) not in self.held:
            raise Unauthorised(f"{repository} is not for {name or 'everybody'}", upstream=HOST)


async def act(chance: random.Random, running: Engine, model: Model, rights: Rights) -> None:
    """One operation by one login, judged at once."""
    project, name = chance.choice([*ALLOWANCES, "free", None]), chance.choice(NAMES)
    repository = chance.choice(REPOSITORIES)
    path, caller = RepositoryPath(project, repository), CALLERS[name]
    kind = chance.randrange(10)
    began_with = rights.had(name, repository, TTL_S)
    try:
        if kind < 4:
            wanted = chance.choice(model.images[repository])
            by_tag = chance.random() < 0.5
            target = Tag(str(model.images[repository].index(wanted))) if by_tag else Digest.parse(wanted.digest)
            got = await running.pull.manifest(ManifestGet(path, target, None), caller)
            assert got.held.body == wanted.body
        elif kind < 8:
            elsewhere = chance.choice(REPOSITORIES) if chance.random() < 0.33 else repository
            digest = chance.choice(sorted(model.blobs[elsewhere]))
            _, opened = await running.pull.blob(BlobGet(path, digest, None), caller)
            body = await whole(opened)
            assert model.blobs[repository].get(digest) == body, "bytes of a repository that does not have them"
        elif kind == 8:
            await running.pull.tags(TagsList(path, None, None, None), caller)
        else:
            digest = Digest.parse(chance.choice(model.images[repository]).digest)
            await running.pull.referrers(ReferrersList(path, digest, "", None), caller)
        assert began_with, "a leak"
    except Unauthenticated:
        assert not name and rights.lacked(name, repository, REFUSED_FOR_S)
    except Denied as error:
        if error.rule == RULE:
            assert name and rights.lacked(name, repository, REFUSED_FOR_S)
        else:
            assert (error.rule, project) == ("quota", "denies")
    except NotFound:
        assert began_with, "absence is told only to those who may read"
    except Overloaded:
        pass  # another login was refused in the middle of a shared fetch: ask again
    except Unauthorised as error:
        raise AssertionError("our own credentials were never shown") from error


async def storm(seed: int, n_operations: int) -> None:
    """So many operations, some dozen beside each other at a time, while rights and blobs come and go."""
    chance = random.Random(seed)
    upstream = FakeUpstream(piece_bytes=2048)
    model = fill(upstream)
    shown: dict[str, Upstream] = {}
    judged: list[Rights] = []

    def as_login(login: Login | None) -> Upstream:
        name = login.username if login is not None else ""
        if name not in shown:
            shown[name] = upstream.judged(lambda repository: judged[0].judge(name, repository))
        return shown[name]

    projects = tuple(ProjectRoute(name) for name in (*ALLOWANCES, "free"))
    logins = {HOST: PassThrough(as_login, TTL_S)}
    async with engine(
        upstream, projects=projects, allowances=ALLOWANCES, capacity=400 * 1024, logins=logins
    ) as running:
        rights = Rights(running.clock)
        judged.append(rights)
        for name in NAMES:
            for repository in REPOSITORIES:
                if chance.random() < 0.5:
                    rights.turn(name, repository)
        n_done = 0
        while n_done < n_operations:
            n = chance.randrange(1, 24)
            if chance.random() < 0.3:
                rights.turn(chance.choice(NAMES), chance.choice(REPOSITORIES))
            stored = [digest for digest, _ in running.ledger if running.capacity.may_go(digest)]
            if stored and chance.random() < 0.3:
                gone = chance.choice(stored)
                running.manifests.forget(gone)
                running.owner.spawn_background(running.capacity.evict([gone]), "evict")
            results = await asyncio.gather(
                *(act(chance, running, model, rights) for _ in range(n)), return_exceptions=True
            )
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, BreakwaterError):
                    raise result
                assert result is None, result
            n_done += n
            await audit(running)
            await running.clock.advance(chance.choice([0.0, 11.0, 61.0, 200.0, 700.0]))


@pytest.mark.parametrize("seed", range(4))
async def test_no_leak_and_exact_ledgers(seed: int) -> None:
    """INV-8, promise 5 and 7: 10,000 random operations in all, by three logins and nobody, in five projects."""
    await storm(seed, 2500)
