"""What a reload changed of robots and rules, as facts for the audit log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from proxy.engine.pull import Plan
from proxy.events import Changed


def between(old: Plan, new: Plan) -> Iterator[Changed]:
    """One fact for each robot, each project's rules and each project's readers that are not what they were."""
    yield from _differences("robot", old.robots, new.robots)
    yield from _differences("rules", old.rules, new.rules)
    yield from _differences("readers", old.access, new.access)


def _differences(what: str, old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[Changed]:
    for name in sorted({*old, *new}):
        if name not in new:
            yield Changed(what, name, "removed")
        elif name not in old:
            yield Changed(what, name, "added")
        elif old[name] != new[name]:
            yield Changed(what, name, "changed")
