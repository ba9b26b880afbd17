"""Settings become the values that the running parts work with: routes, rules, limits, orders. At the start and again on
every reload, so that a mistake is found before anything has changed.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from proxy import image_lists
from proxy.engine.freight import Order
from proxy.engine.limits import Limit
from proxy.engine.origins import Origin, Origins, PassThrough, SealedUpstream
from proxy.engine.pull import Plan
from proxy.engine.walk import Scope
from proxy.errors import BadRequest, InvalidSettings
from proxy.fitting import bandwidth_of, key_of
from proxy.ports import Upstream
from proxy.rules.closure import Platforms
from proxy.rules.freshness import TagPolicy
from proxy.rules.gates.access import EVERYBODY, Access, Robot
from proxy.rules.gates.allowlist import Rules
from proxy.rules.gates.immutability import Immutable
from proxy.rules.globs import Glob
from proxy.rules.lists import merged
from proxy.rules.quota import Allowance
from proxy.rules.routes import DEFAULT_PROJECT, ProjectRoute, Routes
from proxy.rules.secret_hash import SecretHash
from proxy.settings import Settings, effective_default


def plan_of(settings: Settings, clients: Mapping[str, Upstream], logins: Mapping[str, PassThrough]) -> Plan:
    """Routing, rules and upstreams as one immutable value. `logins`: the upstreams that judge clients' own."""
    default = effective_default(settings)
    projects = tuple(
        ProjectRoute(
            name=str(name),
            path=str(project.path or ""),
            upstream=str(project.upstream or ""),
            match=tuple(Glob.parse(str(text)) for text in project.match),
        )
        for name, project in settings.projects.items()
    )
    policy_deny = tuple(Glob.parse(str(text)) for text in settings.policy.deny)
    rules = {
        DEFAULT_PROJECT: Rules(DEFAULT_PROJECT, policy_deny=policy_deny, closed=settings.policy.unmatched == "deny")
    }
    for name, project in settings.projects.items():
        rules[str(name)] = Rules(
            str(name),
            allow=tuple(Glob.parse(str(text)) for text in project.allow),
            deny=tuple(Glob.parse(str(text)) for text in project.deny),
            policy_deny=policy_deny,
            closed=str(name) == DEFAULT_PROJECT and settings.policy.unmatched == "deny",
            max_blob=project.max_blob,
        )
    origins = {}
    for host, upstream in settings.upstreams.items():
        sealed = settings.server.sealed or upstream.sealed
        port: Upstream = SealedUpstream(str(host)) if sealed else clients[str(host)]
        origins[str(host)] = Origin(
            str(host),
            port,
            TagPolicy(upstream.tag_ttl, upstream.stale_if_error, sealed),
            upstream.negative_ttl,
            logins.get(str(host)),
        )
    of_project = {}
    for name in settings.projects:
        for origin in origins.values():
            if (own := clients.get(key_of(str(name), origin.host))) is not None:
                of_project[str(name), origin.host] = replace(origin, upstream=own)
    hosts = frozenset(str(host) for host in settings.upstreams)
    robots = robots_of(settings)
    named = {str(name): tuple(project.access) for name, project in settings.projects.items()}
    named.setdefault(DEFAULT_PROJECT, (EVERYBODY,))
    immutable = {str(name): Immutable.of(tuple(project.immutable_tags)) for name, project in settings.projects.items()}
    access = {name: Access.of(name, readers, robots) for name, readers in named.items()}
    return Plan(
        Routes(hosts, str(default or ""), projects),
        rules,
        Origins(origins, of_project),
        access,
        robots,
        immutable,
        takes_logins=bool(logins),
    )


def robots_of(settings: Settings) -> dict[str, Robot]:
    """The accounts. Raises InvalidSettings for a hash that cannot be used."""
    robots = {}
    for name, robot in settings.robots.items():
        try:
            hashes = tuple(SecretHash.parse(one.get_secret_value()) for one in robot.secret_hash)
        except ValueError as error:
            raise InvalidSettings([f"robots.{name}.secret_hash: {error}"]) from error
        robots[name] = Robot(name, hashes, frozenset(robot.projects), robot.expires)
    return robots


def limits_of(settings: Settings) -> dict[str, Limit]:
    """What each project may take of the fetching."""
    return {
        str(name): Limit(project.max_transfers, bandwidth_of(project.bandwidth))
        for name, project in settings.projects.items()
    }


def allowances_of(settings: Settings) -> dict[str, Allowance]:
    """What each project may hold."""
    return {str(name): Allowance(project.quota, project.on_full) for name, project in settings.projects.items()}


def sealed_hosts(settings: Settings) -> frozenset[str]:
    """The upstreams that are sealed by themselves."""
    return frozenset(str(host) for host, upstream in settings.upstreams.items() if upstream.sealed)


def standing_order(settings: Settings) -> Order:
    """What the lists of `[prefetch]` say now. Reads files. Raises BadRequest for one that cannot be read, or understood
    as a whole: half a list would look like all of it."""
    lists = []
    for path in settings.prefetch.list:
        try:
            lists.append(image_lists.read(Path(path).read_text(encoding="utf-8-sig"), path))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise BadRequest(f"cannot read {path}: {reason}") from error
    asked = merged(lists)
    if asked.problems:
        raise BadRequest("; ".join(asked.problems[:5]))
    return Order(asked.references, Scope(Platforms.parse(settings.prefetch.platforms)), pin=True, is_list=True)


def server_tls(settings: Settings) -> ssl.SSLContext | None:
    """The certificate to serve with, and the CAs whose certificates clients must show, if any.

    Reads files. Raises InvalidSettings when they cannot be used.
    """
    tls = settings.server.tls
    if tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSettings([f"[server] tls: cannot use {tls.cert} with {tls.key}: {error}"]) from error
    if tls.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(tls.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise InvalidSettings([f"[server] tls: cannot use client_ca {tls.client_ca}: {error}"]) from error
    return context
