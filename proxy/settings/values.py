"""The values that settings are written in: sizes, durations, rates, addresses, URLs and the shapes of rules.

Each `…_of` takes what TOML gave (a string, a number, a list) and returns the value, or raises ValueError with the end
of a sentence that begins with the key's place: what is expected, and with what unit. Nothing here knows any key.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import SecretStr

from proxy.errors import InvalidDigest, InvalidName
from proxy.oci.digest import Digest
from proxy.oci.names import Repository, SourceHost

#: "forever", as a duration in seconds. `age > FOREVER` is never true, which is all that readers of it need.
FOREVER = math.inf

# -- sizes and rates ---------------------------------------------------------------------------------------------------

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")
_SIZE_UNITS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
#: Where an int64 ends; no file system is larger.
_MOST_BYTES = 2**63 - 1


def size_of(value: Any) -> int:
    """Bytes, greater than zero, from an integer or from text with a unit: `200GiB`, `10MB`. Raises ValueError.

    `GB` is 10^9 and `GiB` is 2^30; a bare `G` is refused, for people disagree about which of the two it means.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return _in_range(value)
    if not isinstance(value, str):
        raise ValueError('expected a size such as "200GiB" or "10MB", or a number of bytes')
    found = _SIZE.fullmatch(value.strip())
    unit = _SIZE_UNITS.get((found[2] or "b").lower()) if found else None
    if found is None or unit is None:
        raise ValueError(
            f'{value!r} is not a size: expected a number and B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, as in "200GiB"'
        )
    return _in_range(round(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit)


def _in_range(n_bytes: int) -> int:
    if n_bytes <= 0:
        raise ValueError("a size must be greater than zero")
    if n_bytes > _MOST_BYTES:
        raise ValueError("a size must be below 8 EiB")
    return n_bytes


def rate_of(value: Any) -> int:
    """Bytes per second, from text such as `10KiB/s`. Raises ValueError."""
    if not isinstance(value, str) or not value.strip().endswith("/s"):
        raise ValueError('expected a rate such as "10KiB/s"')
    try:
        return size_of(value.strip().removesuffix("/s"))
    except ValueError as error:
        raise ValueError(f'{value!r} is not a rate: expected a size per second, as in "10KiB/s"') from error


def rate_or_zero_of(value: Any) -> int:
    """The same, or 0 for "0": not at all. Raises ValueError."""
    return 0 if isinstance(value, str) and value.strip() in ("0", "0B/s") else rate_of(value)


@dataclass(frozen=True, slots=True)
class Amount:
    """So many bytes, or a share of the file system; exactly one of the two is set."""

    n_bytes: int | None = None
    share: float | None = None

    def of(self, total_bytes: int) -> int:
        """Bytes, on a file system of `total_bytes`."""
        return self.n_bytes if self.n_bytes is not None else int(total_bytes * (self.share or 0.0))


_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%")


def amount_of(value: Any) -> Amount:
    """A size, or a percentage of the file system above 0 and up to 100. Raises ValueError."""
    if isinstance(value, str) and value.strip().endswith("%"):
        found = _SHARE.fullmatch(value.strip())
        if found is None or not 0 < float(found[1]) <= 100:
            raise ValueError(
                f'{value!r} is not a share of the file system: expected more than 0% and at most 100%, as in "80%"'
            )
        return Amount(share=float(found[1]) / 100)
    try:
        return Amount(n_bytes=size_of(value))
    except ValueError as error:
        raise ValueError(f'{error}; a share of the file system is written "80%"') from error


# -- durations ---------------------------------------------------------------------------------------------------------

_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ms|s|m|h|d))+")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration_or_zero_of(value: Any) -> float:
    """Seconds, zero or more, from text such as `10m` or `1h30m`. A bare number is refused: it has no unit."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError(f'a duration needs a unit: "{value}s", "{value}m", …')
    if not isinstance(value, str):
        raise ValueError('expected a duration such as "10m"')
    text = value.strip()
    if text.startswith("-") and _DURATION.fullmatch(text[1:]):
        raise ValueError("a duration cannot be negative")
    if not _DURATION.fullmatch(text):
        raise ValueError(f'{value!r} is not a duration: expected numbers with ms, s, m, h or d, as in "10m" or "1h30m"')
    return sum(float(number) * _DURATION_UNITS[unit] for number, unit in _DURATION_PART.findall(text))


def duration_of(value: Any) -> float:
    """Seconds, greater than zero. Raises ValueError."""
    seconds = duration_or_zero_of(value)
    if seconds <= 0:
        raise ValueError("a duration must be greater than zero here")
    return seconds


def lasting_of(value: Any) -> float:
    """Seconds, zero or more, or FOREVER for `forever`. Raises ValueError."""
    if value == "forever":
        return FOREVER
    try:
        return duration_or_zero_of(value)
    except ValueError as error:
        raise ValueError(f'{error}; or "forever"') from error


# -- hours of the day --------------------------------------------------------------------------------------------------

_SPAN = re.compile(r"([0-9]{2}):([0-9]{2}) ?- ?([0-9]{2}):([0-9]{2})")


@dataclass(frozen=True, slots=True)
class Span:
    """From one minute of the day to another; over midnight where the end is not after the start."""

    start_min: int
    end_min: int


def span_of(value: Any) -> Span:
    """Hours of a day: `08:00-18:00`, or over midnight `22:00-06:00`. Raises ValueError."""
    if isinstance(value, Span):
        return value
    found = _SPAN.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f'{value!r} is not a time of day: expected "08:00-18:00"')
    minutes = [int(found[i]) * 60 + int(found[i + 1]) for i in (1, 3)]
    if any(int(found[i]) > 59 for i in (2, 4)) or minutes[0] >= 1440 or minutes[1] > 1440:
        raise ValueError(f"{value!r}: a day is from 00:00 to 24:00")
    if minutes[0] == minutes[1]:
        raise ValueError(f"{value!r} is no time at all; leave it out for the whole day")
    return Span(*minutes)


def zone_of(value: Any) -> tzinfo:
    """A time zone: "UTC", or a name such as "Europe/Berlin" that the system's time zone files have. Raises ValueError."""
    if isinstance(value, tzinfo):
        return value
    if value == "UTC":
        return UTC  # also where there are no such files
    try:
        if not isinstance(value, str):
            raise ValueError("not text")
        return ZoneInfo(value)
    except (ValueError, OSError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        raise ValueError(
            f'{value!r} is no time zone that this system knows: expected "UTC" or "Europe/Berlin"'
        ) from None


# -- addresses to listen on --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """`host:port` to listen on. `host` is as written; "" means every address of the machine; port 0, any free port."""

    host: str
    port: int

    @property
    def hosts(self) -> tuple[str, ...]:
        """The addresses that it stands for; the second may be missing where the machine has no IPv6.

        `localhost` and "" mean both families, so that neither `127.0.0.1` nor `[::1]` surprises a client.
        """
        return {"localhost": ("127.0.0.1", "::1"), "": ("0.0.0.0", "::")}.get(self.host, (self.host,))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix socket to listen on, by its absolute path."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress

_LISTEN = re.compile(r"(\[[0-9a-fA-F:.]+(?:%[\w.-]+)?\]|[A-Za-z0-9.-]*):([0-9]{1,5})")
#: sun_path of Linux holds 108 bytes with the closing zero.
_MOST_UNIX_PATH = 107


def address_of(value: Any) -> Address:
    """An address to listen on: `host:port`, `:port`, `[::]:port` or `unix:/path`. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(
            'expected an address such as "127.0.0.1:5000", ":5000", "[::]:5000" or "unix:/run/breakwater.sock"'
        )
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        if not path.startswith("/") or len(path.encode()) > _MOST_UNIX_PATH:
            raise ValueError(
                f'a Unix socket needs an absolute path of at most {_MOST_UNIX_PATH} bytes: "unix:/run/breakwater.sock"'
            )
        return UnixAddress(path)
    found = _LISTEN.fullmatch(value)
    if found is None or int(found[2]) > 65535:
        raise ValueError(
            f'{value!r} is not an address to listen on: expected "host:port", ":port", "[::]:port" or "unix:/path"'
        )
    return TcpAddress(found[1].strip("[]"), int(found[2]))


# -- URLs and names ----------------------------------------------------------------------------------------------------


def url_of(value: Any) -> str:
    """An http or https URL of a registry, without a closing slash. Raises ValueError.

    Userinfo is refused: a URL is printed in logs and errors, and credentials must not be. So are queries and fragments.
    """
    if not isinstance(value, str):
        raise ValueError('expected a URL such as "https://registry-1.docker.io"')
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"the URL cannot be read: {error}") from error
    if "@" in parts.netloc:
        raise ValueError("a URL must not carry a user name or password; write them under credentials")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or re.search(r"[\s\x00-\x1f\\]", value):
        raise ValueError(f'{value!r} is not a URL of a registry: expected "https://host" or "http://host:port"')
    if parts.query or parts.fragment or value.endswith(("?", "#")):
        raise ValueError("a URL of a registry has no query and no fragment")
    path = parts.path.rstrip("/")
    if path.endswith("/v2"):
        raise ValueError("leave out /v2: it is added to every request")
    return f"{parts.scheme}://{parts.netloc}{path}"


def source_host_of(value: Any) -> SourceHost:
    """A source host, as clients name it: `docker.io`, `registry.test:5000`. Raises ValueError."""
    if isinstance(value, SourceHost):
        return value
    if not isinstance(value, str):
        raise ValueError('expected a source host such as "docker.io"')
    try:
        return SourceHost.parse(value)
    except InvalidName as error:
        raise ValueError(
            f'{error}: expected a name as clients write it, such as "docker.io" or "registry.test:5000"'
        ) from error


def host_name_of(value: Any) -> str:
    """A host's name without a port, in lower case: `breakwater.example.com`. Raises ValueError."""
    name = source_host_of(value).value
    if ":" in name:
        raise ValueError(f"{value!r} has a port or is an address: expected a host's name alone")
    return name


def project_name_of(value: Any) -> str:
    """A project's name: one element of a repository name, so that `/v2/~name/` works. Raises ValueError."""
    if not isinstance(value, str) or "/" in value or not _is_repository(value):
        raise ValueError(f"{value!r} is not a name: expected lower-case letters and digits, with . _ or - between them")
    return value


def project_path_of(value: Any) -> str:
    """A project's path: one element of a repository name that nobody takes for a source host. Raises ValueError."""
    if not isinstance(value, str) or "/" in value or not _is_repository(value):
        raise ValueError(
            f"{value!r} is not one element of a repository name: expected lower-case letters and digits, "
            "with _ or - between them"
        )
    if value == "library":
        raise ValueError("library is where Docker Hub keeps its official images; a project there would hide them all")
    if value == "localhost" or "." in value:
        raise ValueError(f"{value!r} reads as a source host, and /v2/<source host>/… names an upstream")
    return value


def _is_repository(text: str) -> bool:
    try:
        Repository.parse(text)
    except InvalidName:
        return False
    return True


def path_of(value: Any) -> str:
    """A path in the file system. Raises ValueError."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("expected a path")
    if value.startswith("~"):
        raise ValueError("~ is not expanded; write the folder out")
    return value


_SECRET_HASH = re.compile(r"\$scrypt\$ln=\d{1,2},r=\d{1,2},p=\d{1,2}\$[A-Za-z0-9+/]{16,88}\$[A-Za-z0-9+/]{22,88}")


def secret_hash_of(value: SecretStr) -> SecretStr:
    """A hash as `breakwater robot create` prints it. Raises ValueError, without repeating it."""
    if not _SECRET_HASH.fullmatch(value.get_secret_value()):
        raise ValueError("this is not a hash of a secret: `breakwater robot create NAME` prints one, $scrypt$ln=…")
    return value


def instant_of(value: Any) -> float:
    """A day or a moment as RFC 3339 writes it, in seconds since 1970; UTC where it has no offset. Raises ValueError."""
    if isinstance(value, float):
        return value
    try:
        if not isinstance(value, str):
            raise ValueError("not text")
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError('expected a day or a moment, in quotes: "2027-01-31" or "2027-01-31T12:00:00Z"') from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


# -- rules -------------------------------------------------------------------------------------------------------------

_HOST_GLOB = re.compile(r"[a-z0-9.*-]*(?::[0-9*]+)?|\[[0-9a-f:.]+\](?::[0-9*]+)?")
_ELEMENT_GLOB = re.compile(r"[a-z0-9._*-]+")
_MEDIA_TYPE = "media-type:"
_TYPE_GLOB = re.compile(r"[a-z0-9!#$&^_.+*-]+(?:/[a-z0-9!#$&^_.+*-]+)+|\*\*")
_TAG_GLOB = re.compile(r"[A-Za-z0-9_.*-]{1,128}")


def tag_glob_of(value: Any) -> str:
    """A glob over tags: `v*`, `3.*`. Raises ValueError."""
    if not isinstance(value, str) or not _TAG_GLOB.fullmatch(value):
        raise ValueError(
            f'{value!r} is not a pattern for tags: expected a tag, with * for any of its signs, as in "v*"'
        )
    return value


def repository_glob_of(value: Any) -> str:
    """A glob over source host and repository, without a tag: `docker.io/library/**`. Raises ValueError."""
    rule = rule_of(value)
    if is_digest_rule(rule) or is_type_rule(rule) or split_tag(rule)[1]:
        raise ValueError(
            f"{value!r} names a tag or digest, and what belongs to a project cannot depend on it: "
            'expected "docker.io/library/**" (tags and digests go under allow and deny)'
        )
    return rule


def rule_of(value: Any) -> str:
    """A rule: `host/repository`, with or without `:tag`, where * stays within an element and ** does not; or a digest.

    What could never match is refused, too: it would be a rule that somebody relies on. Raises ValueError.
    """
    if not isinstance(value, str):
        raise ValueError('expected a rule such as "docker.io/library/**", "**:latest" or "sha256:…"')
    if is_digest_rule(value):
        try:
            Digest.parse(value)
        except InvalidDigest as error:
            raise ValueError(str(error)) from error
        return value
    if is_type_rule(value):
        if not _TYPE_GLOB.fullmatch(value.removeprefix(_MEDIA_TYPE)):
            raise ValueError(
                f'{value!r} is not a pattern for media types: expected "{_MEDIA_TYPE}application/vnd.cncf.helm.*"'
            )
        return value
    repository, tag = split_tag(value)
    elements = repository.split("/")
    if not _HOST_GLOB.fullmatch(elements[0]) or not all(_ELEMENT_GLOB.fullmatch(element) for element in elements[1:]):
        raise ValueError(
            f'{value!r} is not a rule: expected "host/repository" in lower case, with * and ** in it, '
            'with or without ":tag", or a digest'
        )
    if not elements[0]:
        raise ValueError(f"{value!r} is not a rule: it begins with no source host")
    if len(elements) == 1 and "**" not in repository:
        raise ValueError(f'{value!r} would match nothing: expected "{repository}/**" for a host or "**/{repository}"')
    if elements[0] == "docker.io" and len(elements) == 2 and "**" not in elements[1]:
        raise ValueError(f'{value!r} would match nothing: on Docker Hub that is "docker.io/library/{elements[1]}"')
    if repository != value:
        tag_glob_of(tag)
    return value


def is_digest_rule(rule: str) -> bool:
    """Whether the rule names a digest rather than a repository."""
    return "/" not in rule and rule.startswith(("sha256:", "sha512:"))


def is_type_rule(rule: str) -> bool:
    """Whether the rule speaks about media types rather than names."""
    return rule.startswith(_MEDIA_TYPE)


def split_tag(rule: str) -> tuple[str, str]:
    """The rule's repository part and its tag part, "" when it has none. A port's colon is followed by a slash."""
    head, colon, tag = rule.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (rule, "")
