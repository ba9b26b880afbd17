"""Why something may or may not be pulled: the route, gates and rules of a pull, told one by one. Fetches nothing.

The verdict is that of the very checks which a pull passes; the steps are what they tried. What is not known here, as
the layers of an image that was never pulled, cannot be judged yet, and the answer says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from proxy.engine.admission import RULE as PASS_THROUGH
from proxy.engine.charges import Charges
from proxy.engine.links import HoldingIndex, Links
from proxy.engine.manifests import holding_of
from proxy.engine.pull import Plan
from proxy.errors import BadRequest, BreakwaterError, Denied, Unauthenticated
from proxy.oci.digest import Digest
from proxy.oci.endpoints import RepositoryPath
from proxy.oci.mediatypes import is_index
from proxy.oci.names import Tag, TagOrDigest, parse_tag_or_digest
from proxy.ports import LinkRecord, Records
from proxy.rules.gates import access, quota
from proxy.rules.gates.access import ANONYMOUS, Access, Caller
from proxy.rules.gates.allowlist import SIZE_RULE, Rules, Trial
from proxy.rules.routes import DEFAULT_PROJECT, Route


class Explain:
    """Answers `breakwater explain`."""

    def __init__(self, plan: Callable[[], Plan], links: Links, records: Records, charges: Charges) -> None:
        self._plan = plan
        self._links = links
        self._records = records
        self._charges = charges

    async def of(self, reference: str, robot: str) -> dict[str, Any]:
        """The verdict on `reference`, as it stands after this registry's address, for `robot` ("": anybody).

        Raises BadRequest, InvalidName, InvalidTag or InvalidDigest for what cannot be understood.
        """
        plan = self._plan()
        if robot and robot not in plan.robots:
            raise BadRequest(f"no robot is called {robot!r}; `breakwater robot list` lists them")
        path, target = parsed(reference)
        answer: dict[str, Any] = {"reference": reference, "as": robot, "route": None, "steps": [], "sentence": ""}
        answer |= {"verdict": "allow", "rule": "", "project": ""}
        try:
            route = plan.routes.route(path, None)
            answer["route"] = {
                "project": route.project,
                "upstream": route.host,
                "repository": route.repository.value,
                "why": _why(plan, path, route),
            }
            answer["project"] = route.project
            caller = Caller(robot) if robot else ANONYMOUS
            await self._judge(plan, route, caller, target, answer["steps"])
        except BreakwaterError as error:
            answer |= {"verdict": "deny", "sentence": str(error)}
            if isinstance(error, Denied):
                answer["rule"] = error.rule
            elif isinstance(error, Unauthenticated):
                answer["rule"] = access.RULE
        return answer

    async def _judge(
        self, plan: Plan, route: Route, caller: Caller, target: TagOrDigest, steps: list[Mapping[str, str]]
    ) -> None:
        """The steps of engine/pull.py, one by one; raises what they raise."""

        def step(owner: str, rule: str, result: str, why: str = "") -> None:
            steps.append({"owner": owner, "rule": rule, "result": result, "why": why})

        owner = f"project {route.project!r}"
        readers = plan.access.get(route.project, Access(route.project, is_public=not plan.robots))
        named = ", ".join(sorted(readers.robots)) or "nobody"
        says = access.EVERYBODY if readers.is_public else named
        step(f"{owner} access", says, "allows" if readers.allows(caller) else "denies")
        readers.check(caller)
        if plan.origins.of(route).pass_through is not None:
            step(f"upstream {route.host!r}", PASS_THROUGH, "passes", "upstream decides for each login, at the pull")

        rules = plan.rules[route.project]
        index = await self._links.of(holding_of(route))
        tag = target.value if isinstance(target, Tag) else None
        digest = await self._digest(route, target)
        for trial in self._trials(rules, route, tag, target, index):
            step(trial.owner, trial.rule, trial.result, trial.why)
        if isinstance(target, Tag):
            rules.check_tag(route.reference, target)
        else:
            rules.check_digest(route.reference, target, lambda: index.tags_of(target))

        record = index.records.get(digest) if digest is not None else None
        if record is None:
            step("content", "digest, media types, sizes", "passes", "not known here yet; judged at the first pull")
            return
        self._judge_content(rules, route, record, step)
        self._judge_quota(route, record, step)

    async def _digest(self, route: Route, target: TagOrDigest) -> Digest | None:
        """What a tag was last known to mean here."""
        if isinstance(target, Digest):
            return target
        record = await self._records.tag(holding_of(route), target)
        return record.descriptor.digest if record is not None else None

    @staticmethod
    def _trials(
        rules: Rules, route: Route, tag: str | None, target: TagOrDigest, index: HoldingIndex
    ) -> Iterator[Trial]:
        digest = target if isinstance(target, Digest) else None
        for trial in rules.trials(route.reference, tag, digest):
            if trial.why == "speaks about tags" and digest is not None:
                through = sorted({each for each in index.tags_of(digest) if rules.allows_tag(route.reference, each)})
                if through:
                    yield Trial(trial.owner, trial.rule, "allows", f"it is what {through[0]} resolved to here")
                    return
            yield trial

    @staticmethod
    def _judge_content(rules: Rules, route: Route, record: LinkRecord, step: Callable[..., None]) -> None:
        descriptor = record.descriptor
        parts = () if is_index(descriptor.media_type) else record.names
        try:
            rules.check_content(route.reference, descriptor.digest)
            rules.check_types(route.reference, descriptor.digest, (descriptor.media_type, record.artifact_type))
            for part in parts:
                rules.check_part(route.reference, part)
        except Denied as error:
            step("content", error.rule, "denies")
            raise
        said = f"{SIZE_RULE}, " if rules.max_blob is not None else ""
        step("content", f"{said}digest and media types", "allows", f"{descriptor.digest} and {len(parts)} parts of it")

    def _judge_quota(self, route: Route, record: LinkRecord, step: Callable[..., None]) -> None:
        account = self._charges.book.of(route.project)
        if account.allowance.quota is None:
            return
        parts = () if is_index(record.descriptor.media_type) else record.names
        used = f"{account.used} of {account.allowance.quota} bytes used, on_full = {account.allowance.on_full}"
        try:
            quota.check_manifest(account, route.project, route.reference, (record.descriptor, *parts))
        except Denied:
            step(f"project {route.project!r}", quota.RULE, "denies", used)
            raise
        step(f"project {route.project!r}", quota.RULE, "allows", used)


def parsed(reference: str) -> tuple[RepositoryPath, TagOrDigest]:
    """A reference as it stands after a registry's address, `~project/…` among it; without a tag it means latest.

    Raises BadRequest, InvalidTag or InvalidDigest.
    """
    rest, at, digest = reference.partition("@")
    head, slash, last = rest.rpartition("/")
    name, colon, tag = last.partition(":")
    target: TagOrDigest = Digest.parse(digest) if at else Tag.parse(tag) if colon else Tag("latest")
    name = head + slash + name
    project = None
    if name.startswith("~"):
        project, _, name = name[1:].partition("/")
    if not name:
        raise BadRequest(f"{reference[:150]!r} names no repository")
    if isinstance(target, Digest) or not colon:
        return RepositoryPath(project, name), target
    return RepositoryPath(project, name), parse_tag_or_digest(target.value)


def _why(plan: Plan, path: RepositoryPath, route: Route) -> str:
    if path.project is not None:
        return f"named by ~{path.project}"
    if route.named:
        return f"reached by its path, {path.name.partition('/')[0]!r}"
    if route.project == DEFAULT_PROJECT:
        return "no project matches"
    return f"matched by {plan.routes.match_of(route)!r}"
