"""WWW-Authenticate -> challenges (RFC 9110 §11.6.1), and the scopes that registries want tokens for.

Registries get this header wrong in every way there is, so nothing here raises: what cannot be read is skipped, and no
usable challenge is an empty tuple. Whether a realm may be visited at all is not decided here (INV-7).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from proxy.oci.names import Repository

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# A quoted string that nobody closed goes to the end. Unquoted values may have what a URL has, though a token may not.
_QUOTED = r'"((?:[^"\\]|\\.)*)(?:"|\\?\Z)'
_SEPARATORS = re.compile(r"[\s,]*")
_PARAM = re.compile(rf'({_TOKEN})[ \t]*=[ \t]*(?:{_QUOTED}|([^\s,"]*))', re.DOTALL)
_SCHEME = re.compile(rf"({_TOKEN})(?:[ \t]+([A-Za-z0-9\-._~+/]+=*)(?=[ \t]*(?:,|\Z)))?(?=[\s,]|\Z)")
_GARBAGE = re.compile(rf'(?:[^,"]|{_QUOTED})+', re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way in: the `scheme` and the names of `params` in lower case, their values unquoted; or a `token68`."""

    scheme: str
    params: Mapping[str, str] = field(default_factory=dict)
    token68: str = ""


def parse(headers: Iterable[str]) -> tuple[Challenge, ...]:
    """The challenges of all WWW-Authenticate lines of a response, in order; a line may hold several. Never raises.

    Of a parameter given twice in one challenge the first counts.
    """
    return tuple(challenge for header in headers for challenge in _challenges(header))


def pull_scope(repository: Repository | str) -> str:
    """The scope of a token that may pull `repository`, for a challenge that names none."""
    return f"repository:{repository}:pull"


def _challenges(header: str) -> Iterator[Challenge]:
    """A parameter belongs to the scheme before it. A word without `=` after it is the next scheme."""
    found: Challenge | None = None
    params: dict[str, str] = {}
    position = _end(_SEPARATORS, header, 0)
    while position < len(header):
        if param := _PARAM.match(header, position):
            name, quoted, plain = param.groups()
            params.setdefault(name.lower(), plain if quoted is None else _ESCAPED.sub(r"\1", quoted))
            position = param.end()
        elif scheme := _SCHEME.match(header, position):
            if found is not None:
                yield found
            params = {}
            found = Challenge(scheme[1].lower(), params, scheme[2] or "")
            position = scheme.end()
        else:
            position = _end(_GARBAGE, header, position)
        position = _end(_SEPARATORS, header, position)
    if found is not None:
        yield found


def _end(pattern: re.Pattern[str], header: str, position: int) -> int:
    match = pattern.match(header, position)
    return position if match is None else match.end()
