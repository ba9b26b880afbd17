"""What a client's own files must say to pull through here: containerd, CRI-O and podman, Docker (peers.md §5).

Without `--enforce` a client that gets no answer here goes to the registry itself; with it, there is no other host.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from proxy.errors import BreakwaterError, InvalidSettings
from proxy.oci.names import SourceHost
from proxy.settings import Project, Settings, TcpAddress, effective_default
from proxy.settings.keys import quoted
from proxy.settings.values import url_of


class CannotBeWritten(BreakwaterError):
    """This client has no way to say it; the sentence says what it would need."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where clients reach Breakwater (`url`, without a closing slash), and as what."""

    url: str
    hosts: tuple[SourceHost, ...]
    default_upstream: SourceHost | None
    project: str | None
    settings_of_project: Project | None
    is_enforced: bool
    #: Whether clients must show a certificate (`server.tls.client_ca`).
    asks_who: bool = False

    @classmethod
    def of(cls, settings: Settings, *, url: str | None, project: str | None, is_enforced: bool) -> Self:
        """The mirror of these settings. Raises InvalidSettings for a project or url that cannot be."""
        if project is not None and project != "default" and project not in settings.projects:
            known = ", ".join(settings.projects) or "none"
            raise InvalidSettings([f"--project: {project} is not under [projects]; configured are: {known}"])
        return cls(
            url=_url(settings, url),
            hosts=tuple(settings.upstreams),
            default_upstream=effective_default(settings),
            project=project,
            settings_of_project=settings.projects.get(project) if project is not None else None,
            is_enforced=is_enforced,
            asks_who=settings.server.tls is not None and settings.server.tls.client_ca is not None,
        )

    @property
    def is_plain(self) -> bool:
        """Whether it is reached over plain HTTP."""
        return self.url.startswith("http://")

    @property
    def location(self) -> str:
        """Host, port and path, without the scheme, as registries.conf wants it."""
        return self.url.partition("://")[2]


def _url(settings: Settings, url: str | None) -> str:
    if url is not None:
        try:
            given = url_of(url)
        except ValueError as error:
            raise InvalidSettings([f"--url: {error}"]) from error
        if urlsplit(given).path:
            raise InvalidSettings(["--url: expected no path, only a scheme, a host and a port"])
        return given
    address = next((one for one in settings.server.listen if isinstance(one, TcpAddress) and one.port), None)
    if address is None:
        raise InvalidSettings(["server.listen names no TCP port that clients could be given; write --url"])
    host = {"": "127.0.0.1", "localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(
        address.host, address.host
    )
    return f"{'http' if settings.server.tls is None else 'https'}://{TcpAddress(host, address.port)}"


def text_for(client: str, mirror: Mirror, names: Sequence[str]) -> str:
    """The text of `client`'s files for these upstreams, or all. Raises InvalidSettings or CannotBeWritten."""
    hosts = _chosen(mirror, names)
    if client == "docker":
        return _daemon_json(mirror)
    if client == "containerd":
        return "\n".join("\n".join(_hosts_toml(mirror, host)) + "\n" for host in hosts)
    return "\n".join(_registries_conf(mirror, hosts, is_named=bool(names))) + "\n"


def _chosen(mirror: Mirror, names: Sequence[str]) -> list[SourceHost]:
    by_name = {host.value: host for host in mirror.hosts}
    if wrong := [name for name in names if name.lower() not in by_name]:
        known = ", ".join(by_name) or "none"
        raise InvalidSettings([f"{name} is not under [upstreams]; configured are: {known}" for name in wrong])
    return [by_name[name.lower()] for name in names] or list(mirror.hosts)


# -- containerd --------------------------------------------------------------------------------------------------------


def _hosts_toml(mirror: Mirror, host: SourceHost) -> Iterator[str]:
    """containerd's hosts.toml. What stands at the root is the last host tried; without `server` it is the registry."""
    url = mirror.url if mirror.project is None else f"{mirror.url}/v2/~{mirror.project}"
    yield f"# /etc/containerd/certs.d/{host}/hosts.toml"
    if mirror.is_enforced:
        # Both are needed: containerd 1.6 ignores a file with a `server` and no [host], and goes to the registry.
        yield f"server = {quoted(url)}"
        yield from _properties(mirror, "")
        yield ""
    else:
        yield "# No `server`: when this mirror has no answer, containerd goes to the registry itself."
    yield f"[host.{quoted(url)}]"
    yield from _properties(mirror, "  ")


def _properties(mirror: Mirror, indent: str) -> Iterator[str]:
    """What holds for a host, and at the root for `server`."""
    yield f'{indent}capabilities = ["pull", "resolve"]'
    if mirror.project is not None:
        yield f"{indent}override_path = true"
    if not mirror.is_plain:
        yield f'{indent}# ca = "/path/to/ca.pem"  # unless the node trusts who signed the certificate'
    if mirror.asks_who:
        yield f'{indent}# client = [["/path/to/client.pem", "/path/to/client.key"]]  # this mirror asks for a certificate'


# -- CRI-O and podman --------------------------------------------------------------------------------------------------


def _registries_conf(mirror: Mirror, hosts: Sequence[SourceHost], *, is_named: bool) -> Iterator[str]:
    """containers-registries.conf(5). These clients send no `ns`: the path begins with a source host or a project."""
    yield "# /etc/containers/registries.conf.d/50-breakwater.conf"
    if mirror.asks_who:
        folder = mirror.location.partition("/")[0]
        yield f"# This mirror asks for a certificate: /etc/containers/certs.d/{folder}/client.cert and client.key"
    for host in hosts:
        yield ""
        try:
            location = f"{mirror.location}/{_path(mirror, host)}"
        except CannotBeWritten as error:
            # Asked for by name it is an error; among all the others it must not keep them from being printed.
            if is_named:
                raise
            yield f"# {error}"
            continue
        yield "[[registry]]"
        yield f"prefix = {quoted(host.value)}"
        if not mirror.is_enforced:
            yield f"location = {quoted(host.value)}"
            yield "[[registry.mirror]]"
        yield f"location = {quoted(location)}"
        if mirror.is_plain:
            yield "insecure = true  # plain HTTP"


def _path(mirror: Mirror, host: SourceHost) -> str:
    if mirror.project is None:
        if ":" in host.value:
            raise CannotBeWritten(
                f"{host}: these clients allow no colon in a path, so a project with a path must lead there"
            )
        return host.value
    project = mirror.settings_of_project
    if project is None or project.path is None:
        raise CannotBeWritten(
            f"{host}: these clients allow no ~ in a path; give project {mirror.project} a path of its own"
        )
    upstream = project.upstream or mirror.default_upstream
    if upstream != host:
        raise CannotBeWritten(f"{host}: /v2/{project.path}/… leads to {upstream} and nowhere else")
    return project.path


# -- Docker ------------------------------------------------------------------------------------------------------------


def _daemon_json(mirror: Mirror) -> str:
    """dockerd's daemon.json. It mirrors Docker Hub and nothing else, at the root, and always falls back to it."""
    if mirror.default_upstream is None or mirror.default_upstream.value != "docker.io":
        raise CannotBeWritten(
            'Docker mirrors Docker Hub alone, at the root: server.default_upstream must be "docker.io"'
        )
    if mirror.project is not None:
        raise CannotBeWritten(
            "Docker allows a mirror no path, and so no project; let the project match docker.io/** instead"
        )
    if mirror.is_enforced:
        raise CannotBeWritten("Docker always falls back to Docker Hub; only a firewall keeps it from there")
    return json.dumps({"registry-mirrors": [mirror.url]}, indent=2) + "\n"
