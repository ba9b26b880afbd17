"""rules/gates/access.py: who may read."""

from __future__ import annotations

import pytest

from proxy.errors import Denied, Unauthenticated
from proxy.rules.gates.access import ANONYMOUS, OPERATOR, Access, Caller, Robot

ROBOTS = {
    "ci": Robot("ci", (), frozenset({"team"})),
    "dev": Robot("dev", (), frozenset({"other"})),
    "old": Robot("old", (), frozenset({"team"}), expires_at=100.0),
}


@pytest.mark.parametrize(
    ("named", "caller", "allowed"),
    [
        pytest.param(("anonymous",), ANONYMOUS, True, id="everybody reads what is for everybody"),
        pytest.param(("anonymous",), Caller("dev"), True, id="a robot is somebody, too"),
        pytest.param(("ci",), Caller("ci"), True, id="both sides name each other"),
        pytest.param(("ci",), ANONYMOUS, False, id="nobody reads what is for robots"),
        pytest.param(("ci",), Caller("dev"), False, id="another robot does not"),
        pytest.param(("ci", "dev"), Caller("dev"), False, id="named by the project, but it names another"),
        pytest.param((), Caller("ci"), False, id="it names the project, which does not name it"),
        pytest.param((), OPERATOR, True, id="what the operator began reads everything"),
    ],
)
def test_readers(named: tuple[str, ...], caller: Caller, allowed: bool) -> None:
    """A robot reads what names it and what it names."""
    access = Access.of("team", named, ROBOTS)
    assert access.allows(caller) is allowed
    if allowed:
        access.check(caller)
    else:
        with pytest.raises(Denied if caller.robot else Unauthenticated):
            access.check(caller)


def test_a_refusal_names_rule_and_project() -> None:
    """The words that logs, metrics and the error body share."""
    with pytest.raises(Denied, match="rule 'access' of project 'team'") as caught:
        Access.of("team", ("ci",), ROBOTS).check(Caller("dev"))
    assert (caught.value.rule, caught.value.project) == ("access", "team")


def test_a_robot_whose_time_is_over_is_nobody() -> None:
    """From its very moment on."""
    assert not ROBOTS["old"].is_expired(99.9) and ROBOTS["old"].is_expired(100.0)
    assert not ROBOTS["ci"].is_expired(1e12)
