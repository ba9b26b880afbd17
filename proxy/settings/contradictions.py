"""What no key is wrong in by itself: keys that contradict each other."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.oci.names import SourceHost
from proxy.settings import overlaps, values
from proxy.settings.keys import Place, spelled
from proxy.settings.model import Project, Settings
from proxy.settings.upstreams import Credentials, TimedRate

#: The distribution-spec's limit of a manifest, which everyone keeps: 4 MiB.
LARGEST_MANIFEST_BYTES = 4 * 2**20

#: Where a token stands in for a password, the user name that goes with it: any does for GitHub, GitLab asks for this.
TOKEN_USERNAMES = {"github": "x-access-token", "gitlab": "oauth2"}
#: Keys of credentials that only these helpers read.
BELONGS_TO = {
    "region": ("ecr", "ecr-public"),
    "key_file": ("gar",),
    "tenant": ("acr",),
    "client_id": ("acr",),
    "secret_file": ("acr",),
    "endpoint": ("ecr", "ecr-public", "gar", "acr"),
}


@dataclass(frozen=True, slots=True)
class Clash:
    """Places that contradict each other, the one to report first, and the sentence that follows it."""

    places: tuple[Place, ...]
    sentence: str


def contradictions(settings: Settings, written: Mapping[str, Any]) -> Iterator[Clash]:
    """Every contradiction in settings that are right key by key. `written` knows the names there are, as spelled."""
    yield from _of_addresses(settings)
    yield from _of_upstreams(settings, written)
    yield from _of_store(settings)
    yield from _of_deadlines(settings)
    yield from _of_projects(settings, written)
    yield from _of_robots(settings)
    yield from _of_hidden_rules(settings)


def _names(written: Mapping[str, Any], table: str) -> dict[str, str]:
    """The names under a table, in lower case -> as written, whether or not what stands beneath them is right."""
    named = written.get(table)
    return {name.lower(): name for name in named} if isinstance(named, Mapping) else {}


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def _nearest(name: str, names: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"configured are {', '.join(sorted(names))}" if names else "none is configured"


# -- [server] and [store] ----------------------------------------------------------------------------------------------


def _of_addresses(settings: Settings) -> Iterator[Clash]:
    server = settings.server
    taken: list[values.Address] = []
    for number, address in enumerate(server.listen):
        if any(_overlap(address, other) for other in taken):
            yield Clash((("server", "listen", number),), f"{address} is listened on twice")
        taken.append(address)
    if any(_overlap(server.admin_listen, other) for other in taken):
        yield Clash(
            (("server", "admin_listen"), ("server", "listen")),
            f"{server.admin_listen} is a listen address, too; what operators see is never on the data port",
        )
    if server.probe_listen is not None and any(
        _overlap(server.probe_listen, other) for other in (*taken, server.admin_listen)
    ):
        yield Clash(
            (("server", "probe_listen"), ("server", "listen"), ("server", "admin_listen")),
            f"{server.probe_listen} is listened on already; on admin_listen the probes answer anyway",
        )


def _overlap(one: values.Address, other: values.Address) -> bool:
    """Whether binding both must fail. Port 0 is any free port, and never taken."""
    if isinstance(one, values.UnixAddress) or isinstance(other, values.UnixAddress):
        return one == other
    if one.port != other.port or one.port == 0:
        return False
    return bool(set(one.hosts) & set(other.hosts)) or _is_all(one, other) or _is_all(other, one)


def _is_all(one: values.TcpAddress, other: values.TcpAddress) -> bool:
    """Whether `one` is every address of one family, and `other` has one of that family."""
    families = {"0.0.0.0": False, "::": True}
    return any(families[host] in {":" in theirs for theirs in other.hosts} for host in one.hosts if host in families)


def _of_store(settings: Settings) -> Iterator[Clash]:
    capacity = settings.store.capacity.n_bytes
    if capacity is not None and capacity < LARGEST_MANIFEST_BYTES:
        yield Clash((("store", "capacity"),), "is smaller than one manifest may be (4 MiB), so nothing could be kept")
    share, min_free = settings.store.capacity.share, settings.store.min_free.share
    if min_free == 1.0:
        yield Clash((("store", "min_free"),), "leaves nothing to store in")
    elif share is not None and min_free is not None and share + min_free > 1.0 + 1e-9:
        yield Clash(
            (("store", "capacity"), ("store", "min_free")),
            f"with min_free ({min_free:.0%}) it is more than the whole file system",
        )


def _of_deadlines(settings: Settings) -> Iterator[Clash]:
    transfers = settings.transfers
    if transfers.queue_deadline >= transfers.header_deadline:
        yield Clash(
            (("transfers", "queue_deadline"), ("transfers", "header_deadline")),
            "must be shorter than header_deadline, or nobody who queued has an answer in time",
        )
    if transfers.max_per_upstream > transfers.max_concurrent:
        yield Clash(
            (("transfers", "max_per_upstream"), ("transfers", "max_concurrent")),
            f"is more than max_concurrent ({transfers.max_concurrent}) allows in all",
        )


# -- [upstreams] -------------------------------------------------------------------------------------------------------


def _of_upstreams(settings: Settings, written: Mapping[str, Any]) -> Iterator[Clash]:
    names = _names(written, "upstreams")
    as_written = written.get("upstreams")
    for name in as_written if isinstance(as_written, Mapping) else ():
        if names[name.lower()] != name:
            yield Clash(
                (("upstreams", name),),
                f"is written twice: source hosts know no capitals, see {spelled(('upstreams', names[name.lower()]))}",
            )
    default = settings.server.default_upstream
    if default is not None and default.value not in names and "default_upstream" in _names(written, "server"):
        yield Clash(
            (("server", "default_upstream"),),
            f"{default} is not configured under [upstreams]; {_nearest(default.value, names)}",
        )
    for host, upstream in settings.upstreams.items():
        here: Place = ("upstreams", names.get(host.value, host.value))
        yield from _of_credentials(upstream.credentials, (*here, "credentials"))
        for number, endpoint in enumerate(upstream.url):
            yield from _of_credentials(endpoint.credentials, (*here, "url", number, "credentials"))
            if endpoint.url in [earlier.url for earlier in upstream.url[:number]]:
                yield Clash(((*here, "url", number),), f"{endpoint.url} is listed twice")
        yield from _of_bandwidth(upstream.bandwidth, (*here, "bandwidth"))
        if upstream.pass_through:
            yield from _of_pass_through((*here, "pass_through"), host, settings)
        if upstream.client_key is not None and upstream.client_cert is None:
            yield Clash(((*here, "client_key"), (*here, "client_cert")), "is of no use without client_cert")
        if upstream.client_cert is not None and upstream.client_key is None:
            yield Clash(((*here, "client_cert"), (*here, "client_key")), "is of no use without client_key")


def _of_bandwidth(entries: tuple[TimedRate, ...], place: Place) -> Iterator[Clash]:
    for number, entry in enumerate(entries):
        if entry.between is not None:
            continue
        if entry.rate is None:
            yield Clash(((*place, number),), "says neither how fast nor when")
        elif "zone" in entry.model_fields_set:
            yield Clash(((*place, number, "zone"),), "is of no use without between")
        if number + 1 < len(entries):
            yield Clash(((*place, number + 1), (*place, number)), "is never reached: the entry before it always holds")
            return


def _of_pass_through(place: Place, host: SourceHost, settings: Settings) -> Iterator[Clash]:
    for name in settings.robots:
        yield Clash(
            (place, ("robots", name)),
            f"and {spelled(('robots', name))} exclude each other: a login is for us to judge or for {host}, not for both",
        )
        break
    if settings.upstreams[host].sealed or settings.server.sealed:
        sealed: Place = ("server", "sealed") if settings.server.sealed else (*place[:-1], "sealed")
        yield Clash((place, sealed), f"opens nothing while {spelled(sealed)} lets nobody ask {host} about a login")
    for name, project in settings.projects.items():
        if project.credentials is not None and project.upstream == host:
            yield Clash(
                (("projects", name, "credentials"), place),
                f"would be shown to {host} in the place of the client's own login, which {spelled(place)} asks for",
            )


def _of_credentials(credentials: Credentials | None, place: Place) -> Iterator[Clash]:
    if credentials is None:
        return
    sources = [
        name
        for name in ("password", "password_file", "docker_config", "helper")
        if getattr(credentials, name) is not None
    ]
    if not sources:
        yield Clash((place,), "has no source: write username and password_file")
    if credentials.helper in TOKEN_USERNAMES and set(sources) <= {"helper", "password", "password_file"}:
        # The token is a password like any other; what it is for gives the user name.
        if len(sources) == 1:
            yield Clash(((*place, "helper"),), f"{credentials.helper} needs a token: write password_file")
        if {"password", "password_file"} <= set(sources):
            yield Clash(((*place, "password_file"), (*place, "password")), "and password are both written")
        return
    if len(sources) > 1:
        yield Clash(
            ((*place, sources[1]), (*place, sources[0])), f"and {sources[0]} are both written; which one counts?"
        )
    for key, helper in BELONGS_TO.items():
        if getattr(credentials, key) is not None and credentials.helper not in helper:
            yield Clash(((*place, key),), f'is of no use without helper = "{helper[0]}"')
    has_password = bool({"password", "password_file"} & set(sources))
    if has_password and credentials.username is None:
        yield Clash(((*place, sources[0]), (*place, "username")), "is of no use without username")
    if credentials.username is not None and sources and not has_password:
        yield Clash(((*place, "username"), (*place, sources[0])), f"does not go with {sources[0]}")


# -- [projects], [policy], [robots] ------------------------------------------------------------------------------------


def _of_projects(settings: Settings, written: Mapping[str, Any]) -> Iterator[Clash]:
    hosts = _names(written, "upstreams")
    paths: dict[str, str] = {}
    for name, project in settings.projects.items():
        here: Place = ("projects", name)
        yield from _of_project(here, project, settings, hosts)
        if project.path is None:
            continue
        if project.path in hosts:
            yield Clash(
                ((*here, "path"),),
                f"{project.path} is the source host of an upstream, and /v2/{project.path}/… names that",
            )
        if project.path in paths:
            yield Clash(
                ((*here, "path"), ("projects", paths[project.path], "path")),
                f"is also the path of {spelled(('projects', paths[project.path]))}",
            )
        paths.setdefault(project.path, name)
    yield from _of_default_project(settings)


def _of_project(here: Place, project: Project, settings: Settings, hosts: Mapping[str, str]) -> Iterator[Clash]:
    if project.upstream is not None and project.upstream.value not in hosts:
        yield Clash(
            ((*here, "upstream"),),
            f"{project.upstream} is not configured under [upstreams]; {_nearest(project.upstream.value, hosts)}",
        )
    if project.path is not None and project.upstream is None and effective_default(settings) is None:
        yield Clash(
            ((*here, "path"), (*here, "upstream"), ("server", "default_upstream"), ("upstreams",)),
            "needs an upstream: write one, or server.default_upstream",
        )
    yield from _of_bandwidth(project.bandwidth, (*here, "bandwidth"))
    if project.credentials is not None:
        yield from _of_credentials(project.credentials, (*here, "credentials"))
        if project.upstream is None:
            yield Clash(
                ((*here, "credentials"), (*here, "upstream")), "go to no upstream: write the project's upstream"
            )
    capacity = settings.store.capacity.n_bytes
    if project.quota is not None and capacity is not None and project.quota > capacity:
        yield Clash(((*here, "quota"), ("store", "capacity")), "is larger than store.capacity, so it would never bind")
    for number, robot in enumerate(project.access):
        if robot != "anonymous" and robot not in settings.robots:
            yield Clash(
                ((*here, "access", number), ("robots", robot)),
                f"{robot} is not defined under [robots]; {_nearest(robot, _same(settings.robots))}",
            )
    for key, globs in (("match", project.match), ("allow", project.allow)):
        for number, glob in enumerate(globs):
            if (host := _literal_host(glob)) is not None and host not in hosts:
                yield Clash(
                    ((*here, key, number),),
                    f"{glob} matches nothing, for {host} is not an upstream; {_nearest(host, hosts)}",
                )


def _literal_host(rule: str) -> str | None:
    """The source host that a rule begins with, when it begins with one and not with a pattern."""
    if values.is_digest_rule(rule) or values.is_type_rule(rule):
        return None
    first = rule.split("/", 1)[0]
    return None if any(sign in first for sign in "*?[") else first


def _of_default_project(settings: Settings) -> Iterator[Clash]:
    default = settings.projects.get("default")
    if default is None:
        return
    if default.path is not None:
        yield Clash(
            (("projects", "default", "path"),), "the default project is what names no project, so it has no path"
        )
    if default.match:
        yield Clash(
            (("projects", "default", "match"),),
            "the default project is what no other project matches, so it has no match",
        )
    if settings.policy.unmatched == "deny":
        yield Clash(
            (("policy", "unmatched"), ("projects", "default")),
            '"deny" refuses all that belongs to no project, so [projects.default] would never be asked',
        )


def _of_hidden_rules(settings: Settings) -> Iterator[Clash]:
    for name, number, why in overlaps.hidden_matches(settings.projects):
        yield Clash((("projects", name, "match", number),), why)
    policy = settings.policy.deny
    for number, rule in enumerate(policy):
        if rule in policy[:number]:
            yield Clash((("policy", "deny", number),), f"{rule} is written twice")
    for name, project in settings.projects.items():
        for key, number, why in overlaps.hidden_rules(project.allow, project.deny, policy):
            yield Clash((("projects", name, key, number),), why)


def _of_robots(settings: Settings) -> Iterator[Clash]:
    for name, robot in settings.robots.items():
        for number, project in enumerate(robot.projects):
            if project not in settings.projects and project != "default":
                yield Clash(
                    (("robots", name, "projects", number), ("projects", project)),
                    f"{project} is not defined under [projects]; {_nearest(project, _same(settings.projects))}",
                )


def effective_default(settings: Settings) -> SourceHost | None:
    """The upstream of paths that name none; None, too, where the built-in docker.io is not configured."""
    default = settings.server.default_upstream
    return default if default in settings.upstreams else None
