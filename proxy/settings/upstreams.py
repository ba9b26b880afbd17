"""[upstreams."host"]: registries that images come from, how they are reached and as whom."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, SecretStr

from proxy.settings.fields import (
    CountOrNone,
    Duration,
    DurationOrZero,
    Helper,
    Host,
    Lasting,
    Path,
    Rate,
    Section,
    Some,
    Span,
    Url,
    Zone,
    listed,
    setting,
)


def _addresses_listed(value: Any) -> Any:
    """`url = "…"`, a list of such, or tables: all become tables."""
    if not value and isinstance(value, (list, tuple)):
        raise ValueError("expected at least one URL")
    if isinstance(value, dict):
        raise ValueError("a table stands in a list: url = [{ url = …, credentials = … }]")
    return tuple({"url": entry} if isinstance(entry, str) else entry for entry in listed(value))


def _rates_listed(value: Any) -> Any:
    """`bandwidth = "10MiB/s"`, or a list of tables: all become tables."""
    if isinstance(value, dict):
        raise ValueError('a table stands in a list: bandwidth = [{ rate = "10MiB/s", between = "08:00-18:00" }]')
    return tuple({"rate": entry} if isinstance(entry, str) else entry for entry in listed(value))


class Credentials(Section):
    """How to identify ourselves: `username` with one of `password` and `password_file`; or another source, alone."""

    username: str | None = setting(None, what="User name.", why="Public images need none.")
    password: SecretStr | None = setting(
        None,
        what="Password or token, in the open; never printed.",
        why="A file is better: settings end up in version control.",
    )
    password_file: Path | None = setting(
        None,
        what="File that holds the password or token; a closing newline is dropped.",
        why="Public images need none.",
    )
    docker_config: Path | None = setting(
        None, what="A Docker config.json with an entry for this host.", why="Public images need none."
    )
    helper: Helper | None = setting(
        None,
        what='A cloud\'s logins: "ecr", "ecr-public", "gar" (Google), "acr" (Azure); "github" or "gitlab" for a token in '
        "`password_file`; any other name runs `docker-credential-<name>`.",
        why="Public images need none.",
    )
    region: str | None = setting(
        None, what='With "ecr": the AWS region.', why="ECR's own host names say it, and else AWS_REGION."
    )
    key_file: Path | None = setting(
        None,
        what='With "gar": a service account\'s key in JSON.',
        why="Machines and pods at Google have a metadata server.",
    )
    tenant: str | None = setting(None, what='With "acr": the tenant.', why="A workload identity knows it.")
    client_id: str | None = setting(
        None, what='With "acr": the application\'s (client) id.', why="A workload identity knows it."
    )
    secret_file: Path | None = setting(
        None, what='With "acr": file that holds the client secret.', why="A workload identity needs none."
    )
    endpoint: Url | None = setting(
        None,
        what='With "ecr", "gar" or "acr": where to ask for logins instead of at the cloud itself.',
        why="Only private endpoints and tests need another.",
    )


class TimedRate(Section):
    """A rate, and the hours in which it holds."""

    rate: Rate | None = setting(
        None,
        unit="bytes per second",
        what="Bytes per second for all blobs together.",
        why="Without one they come as fast as they can.",
    )
    between: Span | None = setting(
        None, what='When it holds, every day: "08:00-18:00", or over midnight "22:00-06:00".', why="It always holds."
    )
    zone: Zone = setting(
        "UTC",
        what='The time zone of `between`: "UTC" or a name such as "Europe/Berlin", summer time included.',
        why="The machine's own zone is seldom what somebody thinks, in a container least of all.",
    )


Bandwidth = Annotated[tuple[TimedRate, ...], BeforeValidator(_rates_listed)]


class Endpoint(Section):
    """One of an upstream's addresses, with credentials of its own where they differ."""

    url: Url = setting(
        what='"https://host", "http://host:port" or with a path before /v2/; or behind another Breakwater, with its name '
        'for the registry: "https://mirror.example.com/v2/quay.io".',
        why="There is nothing to guess it from.",
    )
    credentials: Credentials | None = setting(
        None,
        what="Credentials for this address alone.",
        why="The upstream's `credentials` count for all its addresses.",
    )
    token_realms: Some[Host] | None = setting(
        None,
        what="Hosts that may receive this address's credentials for a token.",
        why="The upstream's `token_realms` count for all its addresses.",
    )


class Upstream(Section):
    """A registry that images come from. The table's name is its source host, as clients name it."""

    url: Annotated[tuple[Endpoint, ...], BeforeValidator(_addresses_listed)] = setting(
        what="Its address, or a list tried in order; an entry may be a table `{ url = …, credentials = … }`.",
        why="Nothing a client sends is ever used as an address.",
    )
    credentials: Credentials | None = setting(
        None, what="Credentials for this upstream.", why="Public images need none."
    )
    token_realms: Some[Host] = setting(
        [],
        what="Hosts, besides the upstream's own, that may receive these credentials for a token.",
        why="An upstream that may name any realm may collect passwords (CVE-2026-33540).",
    )
    tag_ttl: Lasting = setting(
        "10m",
        unit="seconds",
        what='A tag asked for again within this is answered without asking upstream; "0s" asks each time.',
        why="A deployment that restarts asks once, and a moved tag is seen within minutes.",
    )
    stale_if_error: Lasting = setting(
        "forever",
        unit="seconds",
        what="How long past `tag_ttl` a tag is served, marked stale, when upstream cannot answer.",
        why="An outage upstream is when a mirror earns its keep.",
    )
    negative_ttl: DurationOrZero = setting(
        "10s",
        unit="seconds",
        what='How long "not found" is remembered; "0s" for not at all.',
        why="It absorbs a rollout of a wrong tag, and an image just pushed is there at the next retry.",
    )
    connect_timeout: Duration = setting(
        "5s",
        unit="seconds",
        what="How long connecting to one address of a host may take.",
        why="A healthy one takes a tenth of a second, and a second address must have its turn before clients give up.",
    )
    pass_through: bool = setting(
        False,
        what="Clients log in here with their accounts there: upstream is asked with each client's own login before it "
        "reads anything of a repository, and `credentials` are for what Breakwater fetches by itself alone.",
        why="What a client shows is nobody else's business. Robots cannot be told from such logins, so it is one or "
        "the other.",
    )
    pass_through_ttl: Duration = setting(
        "5m",
        unit="seconds",
        what="With `pass_through`: how long what upstream decided about a login and a repository is remembered.",
        why="A pull asks once, and whoever loses the right loses it within minutes. Through an outage nothing opens for "
        "longer than this.",
    )
    sealed: bool = setting(False, what="Never contact this upstream.", why="As for `server.sealed`.")
    allow_private: bool = setting(
        False,
        what="Whether names here may resolve to loopback, private or link-local addresses. An address written in `url` "
        "permits itself.",
        why="A registry's redirect must not reach the machine's own network or a cloud's metadata (CVE-2026-2376).",
    )
    min_tls: Literal["1.2", "1.3"] = setting(
        "1.2", what="The oldest TLS spoken with it.", why="Older ones are withdrawn (RFC 8996)."
    )
    ca: Path | None = setting(
        None, what="CAs in PEM to trust besides the system's.", why="Public registries need none."
    )
    client_cert: Path | None = setting(None, what="Certificate to show, in PEM.", why="Public registries ask for none.")
    client_key: Path | None = setting(
        None, what="Private key of `client_cert` in PEM.", why="Public registries ask for none."
    )
    http_proxy: Url | None = setting(
        None, what="HTTP proxy to reach it through.", why="The environment's proxy variables are not read."
    )
    no_proxy: Some[str] = setting(
        [], what="Hosts to reach without `http_proxy`.", why="Without `http_proxy` there is nothing to except."
    )
    rate_limit_floor: CountOrNone = setting(
        10,
        unit="requests",
        what="Once upstream says that so few requests are left, tags are served stale instead of asked about, and what "
        "is left is for images that are not here yet.",
        why="A tenth of what Docker Hub grants to nobody in particular.",
    )
    bandwidth: Bandwidth = setting(
        [],
        what='How fast blobs come from here, all together: "50MiB/s"; or a list by the time of day, of which the first that '
        'holds counts: `[{ rate = "50MiB/s", between = "08:00-18:00", zone = "Europe/Berlin" }, { rate = "200MiB/s" }]`; '
        "hours are UTC without `zone`. A reload changes it for running transfers, too.",
        why="A mirror exists to be filled.",
    )
    foreign_layers: Literal["allow", "refuse"] = setting(
        "allow",
        what='"refuse" images with layers that clients fetch elsewhere (`urls`), when they come from upstream.',
        why="Breakwater never follows them, and old Windows images have them.",
    )
