"""Every key there is, found by walking the models, so that no second list of them can disagree.

A place is where a value is written: `("upstreams", "docker.io", "tag_ttl")`, list entries by their number from 0. A
pattern is a place with "*" for what the operator names and for list entries: `("upstreams", "*", "tag_ttl")`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from proxy.settings.fields import IsPath, Section
from proxy.settings.model import Settings

Place = tuple[str | int, ...]
Pattern = tuple[str, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def quoted(text: str) -> str:
    """`text` as a basic string of TOML."""
    escaped = text.translate(_ESCAPES)
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'


def spelled(place: Place) -> str:
    """The place as TOML writes it: `upstreams."docker.io".tag_ttl`; an entry of a list is named in words."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f" (entry {part + 1})"
        else:
            text += ("." if text else "") + (part if _BARE.fullmatch(part) else quoted(part))
    return text


@cache
def every_key() -> Mapping[Pattern, FieldInfo]:
    """Pattern -> field, for tables and keys alike, in the order in which the models write them."""
    return MappingProxyType(dict(_walk(Settings, ())))


def _walk(section: type[Section], above: Pattern) -> Iterator[tuple[Pattern, FieldInfo]]:
    for name, field in section.model_fields.items():
        here = (*above, name)
        yield here, field
        inner, is_many = inner_section(field.annotation)
        if inner is not None:
            yield from _walk(inner, (*here, "*") if is_many else here)


def inner_section(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section beneath a field of this annotation, if any, and whether there are many of it."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType, Annotated):
        found = [inner_section(argument) for argument in arguments]
        return next((pair for pair in found if pair[0] is not None), (None, False))
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Mapping)):
        section, _ = inner_section(arguments[0 if origin is tuple else 1])
        return section, True
    return None, False


def pattern_of(place: Place) -> Pattern:
    """The pattern that the place belongs to, whether there is such a key or not."""
    pattern: Pattern = ()
    for part in place:
        named = (*pattern, str(part))
        pattern = named if isinstance(part, str) and named in every_key() else (*pattern, "*")
        if pattern[-1] == "*" and not _has_names(pattern[:-1]):
            pattern = (*pattern[:-1], str(part))
    return pattern


def _has_names(pattern: Pattern) -> bool:
    """Whether what is beneath the pattern is named by the operator, or numbered."""
    field = every_key().get(pattern)
    if field is None:
        return False
    origin = get_origin(field.annotation)
    return inner_section(field.annotation)[1] or origin is tuple


def siblings(place: Place) -> list[str]:
    """The keys that could stand where `place` stands."""
    above = pattern_of(place)[:-1]
    return [pattern[-1] for pattern in every_key() if pattern[:-1] == above]


def is_secret(place: Place) -> bool:
    """Whether what stands there must never be printed."""
    field = every_key().get(pattern_of(place))
    return field is not None and SecretStr in _leaves(field.annotation)


def _leaves(annotation: Any) -> Iterator[Any]:
    """The plain types in an annotation: of an Annotated its type, of a tuple or a union each of its own."""
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from _leaves(arguments[0])
    else:
        for argument in arguments:
            yield from _leaves(argument)


def is_text(place: Place) -> bool:
    """Whether the key takes any text, so that what looks like a number is text, too."""
    field = every_key().get(pattern_of(place))
    return field is not None and bool({str, SecretStr} & {field.annotation, *_bare_arguments(field.annotation)})


def is_path(place: Place) -> bool:
    """Whether the key holds a path in the file system."""
    field = every_key().get(pattern_of(place))
    return field is not None and any(isinstance(mark, IsPath) for mark in _marks(field))


def _marks(field: FieldInfo) -> Iterator[Any]:
    yield from field.metadata
    for argument in get_args(field.annotation):
        yield from getattr(argument, "__metadata__", ())


def _bare_arguments(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) not in (Union, UnionType):
        return
    for argument in get_args(annotation):
        yield get_args(argument)[0] if get_origin(argument) is Annotated else argument
