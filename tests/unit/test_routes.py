"""rules/routes.py: which upstream, repository and project a request means (product.md, Routing)."""

from __future__ import annotations

import pytest

from proxy.errors import InvalidName, UnknownName
from proxy.oci.endpoints import RepositoryPath
from proxy.rules.globs import Glob
from proxy.rules.routes import ProjectRoute, Route, Routes

p = pytest.param

HOSTS = frozenset({"docker.io", "quay.io", "registry.test:5000"})
PLATFORM = ProjectRoute(
    "platform",
    path="platform",
    upstream="quay.io",
    match=(Glob.parse("docker.io/library/**"), Glob.parse("quay.io/prometheus/**")),
)
LATER = ProjectRoute("later", match=(Glob.parse("docker.io/**"),))
HIDDEN = ProjectRoute("hidden")
ROUTES = Routes(HOSTS, "docker.io", (PLATFORM, LATER, HIDDEN))
BARE = Routes(HOSTS, "docker.io")


def routed(routes: Routes, name: str, ns: str | None = None, project: str | None = None) -> tuple[str, str, str]:
    found = routes.route(RepositoryPath(project, name), ns)
    return found.project, found.host, found.repository.value


@pytest.mark.parametrize(
    ("name", "ns", "project", "expected"),
    [
        # 1: the project outright
        p("a/b", None, "hidden", ("hidden", "docker.io", "a/b"), id="project, default upstream"),
        p("a/b", None, "platform", ("platform", "quay.io", "a/b"), id="project, its own upstream"),
        p("a/b", "docker.io", "platform", ("platform", "docker.io", "a/b"), id="project with ns"),
        p("docker.io/a/b", None, "platform", ("platform", "docker.io", "a/b"), id="project, host"),
        p("alpine", "docker.io", "hidden", ("hidden", "docker.io", "library/alpine"), id="project, library"),
        p("a/b", None, "default", ("default", "docker.io", "a/b"), id="the default project by name"),
        # 2: ns
        p("coreos/etcd", "quay.io", None, ("default", "quay.io", "coreos/etcd"), id="ns names the upstream"),
        p("coreos/etcd", "QUAY.io", None, ("default", "quay.io", "coreos/etcd"), id="ns in capitals"),
        p("quay.io/x", "quay.io", None, ("default", "quay.io", "quay.io/x"), id="ns and host"),
        p("platform/x", "quay.io", None, ("default", "quay.io", "platform/x"), id="ns, a project's path"),
        p("a", "registry.test:5000", None, ("default", "registry.test:5000", "a"), id="ns with a port"),
        p("library/alpine", "docker.io", None, ("platform", "docker.io", "library/alpine"), id="ns, matched"),
        # 3: the first element
        p("quay.io/coreos/etcd", None, None, ("default", "quay.io", "coreos/etcd"), id="host in the path"),
        p("quay.io/prometheus/node", None, None, ("platform", "quay.io", "prometheus/node"), id="its project"),
        p("docker.io/alpine", None, None, ("platform", "docker.io", "library/alpine"), id="host path and library"),
        p("platform/a/b", None, None, ("platform", "quay.io", "a/b"), id="a project's path"),
        p("docker.io/platform/a", None, None, ("later", "docker.io", "platform/a"), id="what it shadows"),
        p("platform", None, None, ("platform", "docker.io", "library/platform"), id="a path alone"),
        # 4: the default upstream
        p("alpine", None, None, ("platform", "docker.io", "library/alpine"), id="library"),
        p("grafana/grafana", None, None, ("later", "docker.io", "grafana/grafana"), id="the second match"),
    ],
)  # fmt: skip
def test_a_request_leads_there(name: str, ns: str | None, project: str | None, expected: tuple[str, str, str]) -> None:
    """product.md, Routing: 1 project, 2 ns, 3 first element, 4 default upstream; then the first matching project."""
    assert routed(ROUTES, name, ns, project) == expected


@pytest.mark.parametrize(
    ("routes", "name", "ns", "project"),
    [
        p(ROUTES, "a/b", "evil.test", None, id="unknown ns"),
        p(ROUTES, "a/b", "127.0.0.1:22", None, id="an address for ns"),
        p(ROUTES, "a/b", "", None, id="empty ns"),
        p(ROUTES, "a/b", None, "nobody", id="unknown project"),
        p(ROUTES, "a/b", "evil.test", "platform", id="unknown ns in a project"),
        p(Routes(HOSTS, ""), "a/b", None, None, id="no default upstream"),
        p(Routes(HOSTS, "", (HIDDEN,)), "a/b", None, "hidden", id="no default upstream, in a project"),
    ],
)
def test_what_is_not_configured_is_unknown(routes: Routes, name: str, ns: str | None, project: str | None) -> None:
    """A closed world: nothing that a client sends is ever used as an address to connect to."""
    with pytest.raises(UnknownName):
        routed(routes, name, ns, project)


def test_an_unknown_host_in_the_path_is_a_repository_of_the_default_upstream() -> None:
    """It is not dialled, and Docker Hub will know of no such organisation."""
    assert routed(BARE, "evil.test/a/b") == ("default", "docker.io", "evil.test/a/b")


def test_a_name_too_long_for_a_repository_is_refused() -> None:
    """The grammar holds for what is left after the route is taken off."""
    with pytest.raises(InvalidName):
        routed(BARE, "quay.io/" + "a" * 256)


def test_a_reference_is_what_globs_see() -> None:
    """`<host>/<repository>`, and whether the client named the project is remembered."""
    route = ROUTES.route(RepositoryPath("platform", "a/b"), None)
    assert (route.reference, route.named) == ("quay.io/a/b", True)
    assert not ROUTES.route(RepositoryPath(None, "alpine"), None).named
    assert Route("p", "h", route.repository).reference == "h/a/b"
