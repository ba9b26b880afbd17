"""Where settings come from: layers, each with the origin of every value in it, and how they lie on each other.

From the bottom: what is built in, the settings file, the environment, the command line. A later layer's value replaces
an earlier one's key by key; tables are joined, lists are replaced whole. One exception, made on purpose: a file that
writes any `[upstreams]` replaces the built-in ones as a whole, for what is not written is not dialled.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from proxy.errors import InvalidSettings
from proxy.settings.keys import Place, is_path, is_text
from proxy.settings.lines import lines_of

#: Variables that begin so are settings, except the one that names the file.
PREFIX = "BREAKWATER_"
FILE_VARIABLE = "BREAKWATER_CONFIG"
#: What Kubernetes sets in every pod beside a Service named `breakwater…`; a typo never looks like it.
_SERVICE_LINK = re.compile(
    r"BREAKWATER_(?:[A-Z0-9]+_)*(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_[A-Z]+)?)?)"
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written. `name` is the file, variable or option; `line` counts from 1, where it is known."""

    kind: Literal["built-in", "file", "environment", "command line"]
    name: str = ""
    line: int | None = None

    def __str__(self) -> str:
        match self.kind:
            case "built-in":
                return "built-in"
            case "environment":
                return f"${self.name}"
            case _:
                return f"{self.name}:{self.line}" if self.line is not None else self.name


BUILT_IN = Origin("built-in")


@dataclass(frozen=True, slots=True)
class Layer:
    """Values of one source. `origins` says where single places were written, `origin` where all others were.

    `problems` is what was wrong with the source itself; `proxy.settings.read` reports it with everything else.
    """

    values: Mapping[str, Any]
    origin: Origin
    origins: Mapping[Place, Origin] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def origin_of(self, place: Place) -> Origin:
        """Where the place was written: its own origin, or that of the nearest table around it."""
        for end in range(len(place), 0, -1):
            if (found := self.origins.get(place[:end])) is not None:
                return found
        return self.origin


def built_in_layer(store_path: str) -> Layer:
    """What runs without a file: well-known public registries, and a store at `store_path`, the user's cache folder."""
    return Layer({"store": {"path": store_path}, "upstreams": WELL_KNOWN}, BUILT_IN)


def file_layer(text: str, name: str, *, folder: str) -> Layer:
    """A settings file's text; relative paths in it are taken from `folder`. Raises InvalidSettings if not TOML."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSettings([f"{name}: not TOML: {error}"]) from error
    origins = {place: Origin("file", name, line) for place, line in lines_of(text).items()}
    return Layer(_with_paths_from(values, folder, ()), Origin("file", name), origins)


def _with_paths_from(value: Any, folder: str, place: Place) -> Any:
    if isinstance(value, dict):
        return {key: _with_paths_from(inner, folder, (*place, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_paths_from(inner, folder, (*place, number)) for number, inner in enumerate(value)]
    if isinstance(value, str) and value and not value.startswith(("/", "~")) and is_path(place):
        return f"{folder.rstrip('/')}/{value.removeprefix('./')}"
    return value


def environment_layer(environ: Mapping[str, str], below: Iterable[Layer]) -> Layer:
    """The variables that begin with BREAKWATER_: `BREAKWATER_SERVER__LISTEN` is `server.listen`.

    A double underscore divides. Names of upstreams and projects are matched against those that the layers `below`
    define, with every sign but letters and digits read as an underscore (`BREAKWATER_UPSTREAMS__DOCKER_IO__URL`),
    because shells cannot export a dot; written exactly (`…__NEW.TEST__URL`), a name may also be new. A value is read as
    TOML where it is any and its key takes more than text; else it is text.
    """
    configured = laid(below).values
    values: dict[str, Any] = {}
    origins: dict[Place, Origin] = {}
    problems: list[str] = []
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable == FILE_VARIABLE or _SERVICE_LINK.fullmatch(variable):
            continue
        parts = [part.lower() for part in variable.removeprefix(PREFIX).split("__")]
        if "" in parts:
            problems.append(f"${variable}: expected BREAKWATER_<SECTION>__<KEY>")
            continue
        try:
            place = _place_of(parts, configured)
        except ValueError as error:
            problems.append(f"${variable}: {error}")
            continue
        if not put(values, place, _value_of(environ[variable], place)):
            problems.append(
                f"${variable}: contradicts another variable, which sets a part of it or what it is a part of"
            )
            continue
        origins[place] = Origin("environment", variable)
    return Layer(values, Origin("environment", f"{PREFIX}…"), origins, tuple(problems))


def _place_of(parts: list[str], configured: Mapping[str, Any]) -> Place:
    if parts[0] not in ("upstreams", "projects", "robots") or len(parts) < 2:
        return tuple(parts)
    names = list(_table(configured, parts[0]))
    named = parts[1]
    alike = sorted(name for name in names if name.lower() == named) or sorted(
        name for name in names if _as_variable(name) == _as_variable(named)
    )
    if len(alike) > 1:
        raise ValueError(f"could mean {' or '.join(alike)}; set it in the file")
    if alike:
        return (parts[0], alike[0], *parts[2:])
    if parts[0] == "upstreams" and not any(sign in named for sign in ".:") and named != "localhost":
        known = ", ".join(sorted(_as_variable(name).upper() for name in names))
        raise ValueError(f"names no configured upstream; the configured ones are {known or 'none'}")
    return tuple(parts)


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = values.get(name)
    return table if isinstance(table, Mapping) else {}


def _as_variable(name: str) -> str:
    return "".join(sign if sign.isalnum() else "_" for sign in name.lower())


def _value_of(text: str, place: Place) -> Any:
    if is_text(place):
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def command_line_layer(options: Iterable[tuple[str, Place, Any]], below: Iterable[Layer]) -> Layer:
    """Options of the command line: (`--listen`, its place, its value). A name finds the upstream written in `below`."""
    names = {name.lower(): name for name in _table(laid(below).values, "upstreams")}
    values: dict[str, Any] = {}
    origins: dict[Place, Origin] = {}
    for option, place, value in options:
        if place[0] == "upstreams":
            place = ("upstreams", names.get(str(place[1]).lower(), place[1]), *place[2:])
        put(values, place, value)
        origins[place] = Origin("command line", option)
    return Layer(values, Origin("command line", "the command line"), origins)


def put(values: dict[str, Any], place: Place, value: Any) -> bool:
    """Set the value at the place, making tables on the way. False, and nothing done, where one stands in the way."""
    *tables, last = place
    for name in tables:
        inner = values.setdefault(str(name), {})
        if not isinstance(inner, dict):
            return False
        values = inner
    if str(last) in values:
        return False
    values[str(last)] = value
    return True


# -- laying them on each other -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Written:
    """All layers as one: the values as they were written, and the origin of each."""

    values: dict[str, Any]
    origins: Mapping[Place, Origin]

    def origin_of(self, place: Place) -> Origin:
        """Where the place was written, or the nearest table around it; built in, if nowhere."""
        for end in range(len(place), 0, -1):
            if (found := self.origins.get(place[:end])) is not None:
                return found
        return BUILT_IN


def laid(layers: Iterable[Layer]) -> Written:
    """The layers, bottom first, as one. See the module's text for the rule."""
    layers = list(layers)
    has_own_upstreams = any(layer.origin.kind == "file" and "upstreams" in layer.values for layer in layers)
    values: dict[str, Any] = {}
    origins: dict[Place, Origin] = {}
    for layer in layers:
        top = dict(layer.values)
        if layer.origin.kind == "built-in" and has_own_upstreams:
            top.pop("upstreams", None)
        _lay(values, origins, top, layer, ())
    return Written(values, origins)


def _lay(
    onto: dict[str, Any], origins: dict[Place, Origin], table: Mapping[str, Any], layer: Layer, above: Place
) -> None:
    for name, value in table.items():
        here = (*above, name)
        if isinstance(value, Mapping):
            if not isinstance(onto.get(name), dict):
                _forget(origins, here)
                onto[name] = {}
            origins[here] = layer.origin_of(here)
            _lay(onto[name], origins, value, layer, here)
            continue
        _forget(origins, here)
        onto[name] = value
        origins[here] = layer.origin_of(here)
        origins.update(_origins_within(value, layer, here))


def _forget(origins: dict[Place, Origin], place: Place) -> None:
    for old in [old for old in origins if old[: len(place)] == place]:
        del origins[old]


def _origins_within(value: Any, layer: Layer, place: Place) -> Iterator[tuple[Place, Origin]]:
    """The origins of a list's entries: several lines of one file."""
    if isinstance(value, list):
        inner: Iterable[tuple[str | int, Any]] = enumerate(value)
    elif isinstance(value, Mapping):
        inner = value.items()
    else:
        return
    for name, entry in inner:
        here = (*place, name)
        yield here, layer.origin_of(here)
        yield from _origins_within(entry, layer, here)


#: Upstreams that are there without a file: source host -> table. Token realms are those of the registries' own
#: challenges; each may receive the credentials that somebody configures for that registry, and nobody else may.
WELL_KNOWN: Mapping[str, Any] = {
    "docker.io": {"url": "https://registry-1.docker.io", "token_realms": ["auth.docker.io"]},
    "quay.io": {"url": "https://quay.io"},
    "ghcr.io": {"url": "https://ghcr.io"},
    # Its blobs and manifests come by redirect from *.pkg.dev and object stores, which are given no credentials.
    "registry.k8s.io": {"url": "https://registry.k8s.io"},
    "gcr.io": {"url": "https://gcr.io"},
    "mcr.microsoft.com": {"url": "https://mcr.microsoft.com"},
    "public.ecr.aws": {"url": "https://public.ecr.aws"},
}
