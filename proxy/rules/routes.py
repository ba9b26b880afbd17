"""Which upstream and repository a request means, and which project it belongs to (product.md, Routing).

A closed world: a name that is not configured is unknown. Nothing a client sends is ever used as an address.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proxy.errors import UnknownName
from proxy.oci.endpoints import RepositoryPath
from proxy.oci.names import Repository
from proxy.rules.globs import Glob

#: The project of requests that belong to none.
DEFAULT_PROJECT = "default"


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request leads. `host` is the upstream's source host. `named`: the client named the project itself."""

    project: str
    host: str
    repository: Repository
    named: bool = False

    @property
    def place(self) -> tuple[str, str, str]:
        """Project, source host and repository, as words for logs and metrics."""
        return self.project, self.host, self.repository.value

    @property
    def reference(self) -> str:
        """`<host>/<repository>`, as globs see it."""
        return f"{self.host}/{self.repository.value}"


@dataclass(frozen=True, slots=True)
class ProjectRoute:
    """How requests come to a project. `path` and `upstream` may be "" (none)."""

    name: str
    path: str = ""
    upstream: str = ""
    match: tuple[Glob, ...] = ()


class Routes:
    """The routing table: frozen once made; a reload makes another."""

    def __init__(self, hosts: frozenset[str], default_upstream: str, projects: tuple[ProjectRoute, ...] = ()) -> None:
        self._hosts = hosts
        self._default = default_upstream
        self._projects: Mapping[str, ProjectRoute] = {p.name: p for p in projects}
        self._paths: Mapping[str, ProjectRoute] = {p.path: p for p in projects if p.path}
        self._matching = tuple(p for p in projects if p.match)

    def route(self, path: RepositoryPath, ns: str | None) -> Route:
        """The route of a request's path and `ns`. Raises UnknownName or InvalidName."""
        if path.project is not None:
            return self._in_project(path.project, path.name, ns)
        if ns is not None:
            return self._matched(self._host(ns), path.name)
        first, _, rest = path.name.partition("/")
        if rest:
            if first in self._hosts:
                return self._matched(first, rest)
            if (project := self._paths.get(first)) is not None:
                host = project.upstream or self._default
                return Route(project.name, self._host(host), self._repository(host, rest), named=True)
        if not self._default:
            raise UnknownName(
                f"{path.name!r} names no configured upstream and there is no default_upstream; "
                "start the path with a source host, or send ns="
            )
        return self._matched(self._default, path.name)

    def match_of(self, route: Route) -> str:
        """The glob by which a route's project matched it, as written; "" where none did."""
        project = self._projects.get(route.project)
        globs = project.match if project is not None else ()
        return next((glob.text for glob in globs if glob.covers(route.reference)), "")

    def _in_project(self, name: str, rest: str, ns: str | None) -> Route:
        project = self._projects.get(name)
        if project is None and name != DEFAULT_PROJECT:
            raise UnknownName(f"no project is called {name!r} here")
        if ns is not None:
            host = self._host(ns)
        else:
            first, _, tail = rest.partition("/")
            if tail and first in self._hosts:
                host, rest = first, tail
            else:
                host = self._host((project.upstream if project else "") or self._default)
        return Route(name, host, self._repository(host, rest), named=True)

    def _matched(self, host: str, name: str) -> Route:
        repository = self._repository(host, name)
        reference = f"{host}/{repository.value}"
        for project in self._matching:
            if any(glob.covers(reference) for glob in project.match):
                return Route(project.name, host, repository)
        return Route(DEFAULT_PROJECT, host, repository)

    def _host(self, text: str) -> str:
        host = text.lower()
        if host not in self._hosts:
            raise UnknownName(f"no upstream is configured for {text[:150]!r}")
        return host

    @staticmethod
    def _repository(host: str, name: str) -> Repository:
        if host == "docker.io" and "/" not in name:
            name = f"library/{name}"
        return Repository.parse(name)
