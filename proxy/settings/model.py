"""The sections and keys of the settings file, as frozen models; [upstreams] is in `upstreams.py`.

Attributes mirror the TOML names: `settings.server.listen`, `settings.upstreams[SourceHost("docker.io")].tag_ttl`.
Defaults are spelled as one would write them in the file.

Values are ready for use: durations are seconds (float), sizes are bytes (int), rates are bytes per second (int), lists
are tuples, source hosts are `SourceHost`. Nothing is mutable. Checks that need two keys are in `contradictions.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from proxy.oci.names import SourceHost
from proxy.settings import values
from proxy.settings.fields import (
    AdminHost,
    Amount,
    Count,
    Duration,
    DurationOrZero,
    Host,
    Instant,
    ListenAddress,
    Path,
    ProjectName,
    ProjectPath,
    Rate,
    RateOrZero,
    RepositoryGlob,
    Rule,
    SecretHash,
    Section,
    Size,
    Some,
    Table,
    TagGlob,
    Url,
    listed,
    setting,
)
from proxy.settings.upstreams import Bandwidth, Credentials, Upstream

# -- [server] ----------------------------------------------------------------------------------------------------------


class Tls(Section):
    """A certificate to serve HTTPS with."""

    cert: Path = setting(what="Certificate chain in PEM, leaf first.", why="HTTPS cannot be served without one.")
    key: Path = setting(what="Private key of `cert` in PEM.", why="HTTPS cannot be served without one.")
    client_ca: Path | None = setting(
        None,
        what="CAs in PEM; clients must then show a certificate of one of them.",
        why="Most clusters tell nodes apart by network.",
    )


def _some_listed(value: Any) -> Any:
    if not value and isinstance(value, (list, tuple)):
        raise ValueError("expected at least one entry")
    return listed(value)


def _maybe_source_host(value: Any) -> SourceHost | None:
    return None if value in ("", None) else values.source_host_of(value)


class Server(Section):
    """Where clients and operators reach Breakwater."""

    listen: Annotated[tuple[ListenAddress, ...], BeforeValidator(_some_listed)] = setting(
        "localhost:5000",
        what='Where clients pull: "host:port", ":port" (every address), "[::]:port", "unix:/path", or a list of these. '
        "localhost means 127.0.0.1 and, where there is IPv6, ::1.",
        why="Nobody but this machine, until somebody says otherwise; 5000 is the port registries use.",
    )
    admin_listen: ListenAddress = setting(
        "127.0.0.1:5001",
        what="Where /healthz, /readyz, /metrics, /api/v1/… and the dashboard are served; never on a `listen` address.",
        why="What operators see names private repositories, so it stays on this machine.",
    )
    admin_hosts: Some[AdminHost] = setting(
        [],
        what="Names, without a port, under which the admin listener is reached besides its addresses and localhost: "
        "a reverse proxy's, a Kubernetes service's.",
        why="A web page must not reach it by giving a name of its own this machine's address (DNS rebinding). Probes "
        "and metrics answer under every name.",
    )
    admin_token_file: Path | None = setting(
        None,
        instead="`breakwater/admin-token` in the store's directory, made at the first start",
        what="File with the token that changes something through the admin listener (purge, prefetch); not needed on a "
        "Unix socket.",
        why="Whoever can read the store's directory can do anything with it anyway; commands of the same user find it "
        "there.",
    )
    probe_listen: ListenAddress | None = setting(
        None,
        what="A further address where /healthz, /readyz and /metrics are answered and nothing else: the pod's address, "
        "for a kubelet and a Prometheus.",
        why="On one machine `admin_listen` is near enough.",
    )
    default_upstream: Annotated[SourceHost | None, BeforeValidator(_maybe_source_host)] = setting(
        "docker.io",
        what='The upstream of a path that names none, as Docker\'s registry-mirrors sends it; "" for none.',
        why="Docker sends only Docker Hub to a mirror. Where docker.io is not configured the default is none.",
    )
    sealed: bool = setting(
        False, what="Never contact any upstream.", why="A cache that cannot fill itself is of use only in an air gap."
    )
    tls: Tls | None = setting(
        None, what="Serve HTTPS on every TCP `listen` address.", why="On one machine there is nobody to hide from."
    )
    public_url: Url | None = setting(
        None,
        what="Where clients reach this, for the log-in of robots: needed where something in front speaks HTTPS for it.",
        why="Without one, clients are sent back to the name they asked with.",
    )
    shutdown_grace: DurationOrZero = setting(
        "30s",
        unit="seconds",
        what="How long running answers may go on after SIGTERM.",
        why="Kubernetes' own grace period is 30 s; systemd would kill at 90 s.",
    )
    max_connections: Count = setting(
        16384,
        unit="connections",
        what="Client connections open at once; more get 503 with Retry-After and are closed.",
        why="An idle one costs about 5 kB, so this many cost 80 MB. Fewer where the limit of open files is lower.",
    )
    request_log: Literal["all", "errors", "off"] = setting(
        "all",
        what='Which requests are logged: "all", "errors" (status 400 and above) or "off".',
        why="The first question after an incident is who pulled what.",
    )


# -- [store] -----------------------------------------------------------------------------------------------------------


class Store(Section):
    """The one directory on disk."""

    path: Path = setting(
        instead="`$XDG_CACHE_HOME`, else `~/.cache`",
        what="Where the store is: in a folder `breakwater` that it makes here, for itself alone.",
        why="Nothing under it is precious: all of it can be pulled again.",
    )
    capacity: Amount = setting(
        "20GiB",
        unit="bytes",
        what='What the store may hold, transfers in flight included: a size, or a share of the file system ("80%").',
        why="Some hundred images, and small enough for the laptop of somebody who never reads this.",
    )
    min_free: Amount = setting(
        "5%",
        unit="bytes and inodes",
        what="What stays free on the file system, whoever fills it: cold blobs go until it is. A share counts for "
        "inodes, too; beside a size, 5% of the inodes stay free.",
        why="ext4 reserves 5% for the same reason. On a node that shares its disk with the kubelet use 25%: that one "
        "evicts pods when 15% is left.",
    )

    scrub_rate: RateOrZero = setting(
        "4MiB/s",
        unit="bytes per second",
        what="How fast what is stored is hashed again in the background, to find rot; each file counts for 256 KiB besides. "
        '"0" for not at all.',
        why="A terabyte in three days, for a quarter of a percent of a processor.",
    )

    @property
    def min_free_inode_share(self) -> float:
        """The share of the file system's inodes that stays free, between 0 and 1."""
        return self.min_free.share if self.min_free.share is not None else 0.05


# -- [transfers] -------------------------------------------------------------------------------------------------------


class Transfers(Section):
    """How blobs are fetched and handed on."""

    on_last_reader_gone: Literal["finish", "abort", "finish_when_near"] = setting(
        "finish",
        what='What becomes of a transfer that nobody reads any more: "finish", "abort", or "finish_when_near" its end.',
        why="Whoever left mostly comes back, and a kubelet that retries should find the blob there.",
    )
    max_concurrent: Count = setting(
        128,
        unit="transfers",
        what="Transfers running at once; further ones queue.",
        why="Each costs two descriptors and about 2 MiB of buffers, so 256 MiB at the worst.",
    )
    max_per_upstream: Count = setting(
        48,
        unit="transfers",
        what="Transfers running at once from one upstream; further ones queue.",
        why="One slow upstream must leave room for the others, and registries throttle those who open too many.",
    )
    header_deadline: Duration = setting(
        "25s",
        unit="seconds",
        what="Within this a client has its headers, whatever happens.",
        why="containerd gives up on headers after 30 s.",
    )
    queue_deadline: Duration = setting(
        "20s",
        unit="seconds",
        what="How long a request may queue for a transfer; after that it is 503 with Retry-After.",
        why="It leaves 5 s of `header_deadline` for the answer itself.",
    )
    min_rate: Rate = setting(
        "10KiB/s",
        unit="bytes per second",
        what="An upstream body slower than this over `min_rate_window` has stalled, and is resumed or failed.",
        why="At this rate a layer of 100 MiB takes three hours: nobody waits for that.",
    )
    min_rate_window: Duration = setting(
        "30s",
        unit="seconds",
        what="The time over which `min_rate` is measured.",
        why="Longer than the pauses of a busy CDN.",
    )
    reader_min_rate: Rate = setting(
        "10KiB/s",
        unit="bytes per second",
        what="A client that takes less than this over `reader_min_rate_window` is cut off.",
        why="A stalled client holds 4 MB of kernel buffers and a descriptor.",
    )
    reader_min_rate_window: Duration = setting(
        "60s",
        unit="seconds",
        what="The time over which `reader_min_rate` is measured.",
        why="A node that swaps while it unpacks pauses for tens of seconds and deserves its layer.",
    )


# -- [prefetch] --------------------------------------------------------------------------------------------------------


def _platforms_of(value: Any) -> str:
    if not isinstance(value, str) or not _PLATFORMS.fullmatch(value):
        raise ValueError(f'{value!r} is not a list of platforms: expected "linux/amd64,linux/arm64", or "all"')
    return value


_PLATFORMS = re.compile(r"all|[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9]+)?(?:,[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9]+)?)*")


class Prefetch(Section):
    """Images that are to be here at all times."""

    list: Annotated[tuple[Path, ...], BeforeValidator(listed)] = setting(
        [],
        what="Files with image lists or Kubernetes manifests, as `breakwater prefetch -f` takes them; read anew for each "
        "run. What they list is fetched and never evicted.",
        why="Nothing is fetched that nobody asked for.",
    )
    schedule: Duration = setting(
        "24h",
        unit="seconds",
        what="How often the lists are read and what has moved or is missing is fetched; the first time at the start.",
        why="Releases come by the day. A run that left something missing is repeated after a quarter of an hour.",
    )
    platforms: Annotated[str, BeforeValidator(_platforms_of)] = setting(
        "all",
        what='Platforms to fetch: "linux/amd64,linux/arm64", or "all".',
        why="A list says nothing about the nodes that will pull.",
    )


# -- [log] -------------------------------------------------------------------------------------------------------------


class Log(Section):
    """What is written to standard error."""

    format: Literal["auto", "json", "text"] = setting(
        "auto",
        what='"json" lines, "text", or "auto": text on a terminal, else json.',
        why="People read terminals, programs read pipes.",
    )
    level: Literal["debug", "info", "warning", "error"] = setting(
        "info",
        what="The least important line that is written.",
        why="One line for each request and each event worth an operator's eye.",
    )


# -- [projects.name], [policy], [robots.name] --------------------------------------------------------------------------


class Project(Section):
    """A named set of repositories with rules and a quota. `[projects.default]` is what belongs to no other."""

    path: ProjectPath | None = setting(
        None,
        what="Reachable as /v2/<path>/<repository>.",
        why="Without one it is reached as /v2/~<name>/… and by `match`.",
    )
    upstream: Host | None = setting(
        None,
        what="The upstream of requests that come through `path`.",
        why="Without one it is `server.default_upstream`.",
    )
    match: Some[RepositoryGlob] = setting(
        [],
        what="Requests that name no project and belong to this one: globs over source host and repository.",
        why="Nothing belongs to a project unnoticed.",
    )
    credentials: Credentials | None = setting(
        None,
        what="Credentials for `upstream`, of this project alone.",
        why="The upstream's `credentials` count for all.",
    )
    allow: Some[Rule] = setting(
        [],
        what="What may be pulled; empty means everything that belongs here.",
        why="A mirror that refuses by default is turned off.",
    )
    deny: Some[Rule] = setting([], what="What may not be pulled; wins over `allow`.", why="As for `allow`.")
    quota: Size | None = setting(
        None, unit="bytes", what="What this project's links may hold.", why="The store's capacity bounds all."
    )
    on_full: Literal["evict", "bypass", "deny"] = setting(
        "evict",
        what='When the quota is spent: "evict" its coldest blobs, "bypass" (serve, keep nothing), or "deny".',
        why="A cache forgets; it does not refuse.",
    )
    max_transfers: Count | None = setting(
        None,
        unit="transfers",
        what="Transfers that this project has running at once; further ones queue.",
        why="`transfers.max_concurrent` bounds all.",
    )
    bandwidth: Bandwidth = setting(
        [],
        what="What this project's transfers take from upstreams, all together, shared fairly among them; written as an "
        "upstream's. One that several projects read comes at the rate of the most generous of them.",
        why="A mirror fills as fast as it can, until somebody else needs the line.",
    )
    max_blob: Size | None = setting(
        None,
        unit="bytes",
        what="The largest blob that may be pulled; a manifest with a larger one is refused as a whole.",
        why="The quota bounds what is kept.",
    )
    access: Some[str] = setting(
        ["anonymous"],
        what='Who may pull: "anonymous", or names under [robots].',
        why="Nodes have no names of their own.",
    )
    immutable_tags: Some[TagGlob] = setting([], what="Tags that never move here, once seen.", why="Most tags do move.")


class Policy(Section):
    """Rules of every project."""

    deny: Some[Rule] = setting(
        [], what="What may not be pulled through any project.", why="Nothing is bad for everybody by default."
    )
    unmatched: Literal["allow", "deny"] = setting(
        "allow",
        what="What becomes of requests that belong to no project.",
        why="Without projects everything is unmatched.",
    )


class Robot(Section):
    """An account of a program."""

    secret_hash: Some[SecretHash] = setting(
        what="Hash of its secret, as `breakwater robot create` prints it; several while a secret is rotated.",
        why="There is nothing to guess.",
    )
    projects: Some[ProjectName] = setting(
        what="The projects it may pull through, where they are not for anonymous and their `access` names it.",
        why="An account without a purpose is a risk.",
    )
    expires: Instant | None = setting(
        None,
        what='When it stops being known: "2027-01-31" (its first moment, UTC) or "2027-01-31T12:00:00Z".',
        why="Nodes outlive plans; write one where somebody will renew it.",
    )


class Settings(Section):
    """Everything, validated. Make one with `proxy.settings.parse` or `proxy.settings.read`."""

    server: Server = setting({}, what="", why="")
    store: Store = setting(what="", why="")
    transfers: Transfers = setting({}, what="", why="")
    prefetch: Prefetch = setting({}, what="", why="")
    log: Log = setting({}, what="", why="")
    upstreams: Table[Host, Upstream] = setting({}, what="", why="")
    projects: Table[ProjectName, Project] = setting({}, what="", why="")
    policy: Policy = setting({}, what="", why="")
    robots: Table[str, Robot] = setting({}, what="", why="")
