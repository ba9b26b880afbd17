"""Who may read what a project has: everybody, or robots that both sides name.

Judged on every request, before anything is looked up: to those who may not read, cached and uncached answers are the
same in status, body, headers and in the work they cause upstream (INV-8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from proxy.errors import Denied, Unauthenticated
from proxy.rules.secret_hash import SecretHash

#: The word that a denial, the log and `explain` use for it.
RULE = "access"
#: What a project's `access` says for "no name needed".
EVERYBODY = "anonymous"


@dataclass(frozen=True, slots=True)
class Login:
    """A name and secret that a client showed for an upstream that judges them itself (`pass_through`).

    `mark` stands for the two in tables and logs: a keyed hash, of no use to anybody else.
    """

    mark: str
    username: str = field(repr=False)
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `robot` is "" for anybody; `is_operator` for work that an operator of this very process began.

    `login` is what the client showed where logins are passed through, None for nothing.
    """

    robot: str = ""
    is_operator: bool = False
    login: Login | None = None

    @property
    def name(self) -> str:
        """The word for the log, which never tells a name or secret that is not ours: "" for anybody."""
        return self.robot or (f"login:{self.login.mark[:12]}" if self.login is not None else "")


ANONYMOUS = Caller()
OPERATOR = Caller(is_operator=True)


@dataclass(frozen=True, slots=True)
class Robot:
    """An account of a program. Several hashes stand while a secret is rotated; `expires_at` is wall-clock seconds."""

    name: str
    hashes: tuple[SecretHash, ...]
    projects: frozenset[str]
    expires_at: float | None = None

    def is_expired(self, now: float) -> bool:
        """Whether its time is over at wall-clock `now`: it is then nobody."""
        return self.expires_at is not None and now >= self.expires_at


@dataclass(frozen=True, slots=True)
class Access:
    """The readers of one project."""

    project: str
    is_public: bool = True
    robots: frozenset[str] = frozenset()

    @classmethod
    def of(cls, project: str, named: tuple[str, ...], robots: Mapping[str, Robot]) -> Access:
        """The readers that the project's `access` names and that name the project themselves."""
        may = frozenset(name for name in named if name in robots and project in robots[name].projects)
        return cls(project, EVERYBODY in named, may)

    def allows(self, caller: Caller) -> bool:
        """Whether this caller may read."""
        return self.is_public or caller.is_operator or caller.robot in self.robots

    def check(self, caller: Caller) -> None:
        """Raises Unauthenticated for somebody without a name, Denied for one whose name is not among the readers."""
        if self.allows(caller):
            return
        if not caller.robot:
            raise Unauthenticated(
                f"project {self.project!r} is for robots that it names; log in with the name and secret of one",
                challenge="",
                rule=RULE,
                project=self.project,
            )
        raise Denied(
            f"robot {caller.robot!r} is refused by rule {RULE!r} of project {self.project!r}: it is no reader of it",
            rule=RULE,
            project=self.project,
        )
