"""From layers to Settings, or to every problem at once."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from proxy.errors import InvalidSettings
from proxy.settings.contradictions import contradictions
from proxy.settings.keys import Pattern, Place, every_key, pattern_of, siblings, spelled
from proxy.settings.layers import BUILT_IN, Layer, Origin, Written, laid
from proxy.settings.model import Settings

#: Taking out what is wrong and looking again ends, for the tree only shrinks; this many rounds are never needed.
_MOST_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Effective:
    """Valid settings, with what was written and where: `breakwater settings` shows that."""

    settings: Settings
    written: Written


def parse(mapping: Mapping[str, Any], *, origin: Origin = BUILT_IN) -> Settings:
    """The settings in a mapping as TOML gives it, `store.path` included. Raises InvalidSettings with every problem."""
    return read([Layer(mapping, origin)]).settings


def read(layers: Iterable[Layer]) -> Effective:
    """The settings that the layers say, bottom first. Raises InvalidSettings with every problem of all of them.

    Each problem is one sentence that begins with its place: the file and line (or variable, or option), then the key.
    """
    layers = list(layers)
    written = laid(layers)
    settings, found, taken_out = _validated(written.values)
    if settings is not None:
        found += [
            (clash.places[0], clash.sentence)
            for clash in contradictions(settings, written.values)
            if not any(_touches(place, out) for place in clash.places for out in taken_out)
        ]
    problems = [problem for layer in layers for problem in layer.problems]
    found.sort(key=lambda pair: _in_order(written.origin_of(pair[0])))
    problems += [_sentence(written.origin_of(place), place, sentence) for place, sentence in found]
    if problems or settings is None:
        raise InvalidSettings(list(dict.fromkeys(problems)))
    return Effective(settings, written)


def _sentence(origin: Origin, place: Place, sentence: str) -> str:
    whence = "" if origin.kind == "built-in" else f"{origin}: "
    return f"{whence}{spelled(place)}: {sentence}"


def _in_order(origin: Origin) -> tuple[int, str, int]:
    kinds = ("built-in", "file", "environment", "command line")
    return kinds.index(origin.kind), origin.name, origin.line or 0


def _touches(place: Place, other: Place) -> bool:
    """Whether one of the places is, or contains, the other."""
    shorter = min(len(place), len(other))
    return place[:shorter] == other[:shorter]


# -- types, names and ranges: one key at a time ------------------------------------------------------------------------


def _validated(values: dict[str, Any]) -> tuple[Settings | None, list[tuple[Place, str]], list[Place]]:
    """The settings, the problems, and the places that had to be left out for the settings to exist at all."""
    values = copy.deepcopy(values)
    problems: list[tuple[Place, str]] = []
    taken_out: list[Place] = []
    for round_number in range(_MOST_ROUNDS):
        try:
            return Settings.model_validate(values), problems, taken_out
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                place = _place_in(values, detail)
                if round_number == 0:
                    problems.append((place, _explained(place, detail)))
                out = place[:-1] if detail["type"] == "missing" else place
                taken_out.append(out)
            if not all(_take_out(values, out) for out in taken_out[-error.error_count() :]):
                break
    return None, problems, taken_out


def _place_in(values: Any, detail: ErrorDetails) -> Place:
    """The error's location as far as it was written; what our readers add to it (one value as a list) is dropped."""
    is_missing = detail["type"] == "missing"
    location = detail["loc"][:-1] if is_missing else detail["loc"]
    place: Place = ()
    for part in location:
        if not (isinstance(values, dict) and part in values) and not (
            isinstance(values, list) and isinstance(part, int)
        ):
            break
        place = (*place, part)
        values = values[part]  # type: ignore[index]  # a dict's key or a list's index, as was just asked
    return (*place, detail["loc"][-1]) if is_missing else place


def _take_out(values: Any, place: Place) -> bool:
    """Remove what stands there; from a list, the whole list. False when there is nothing left to remove."""
    if not place:
        return False
    for part in place[:-1]:
        if not isinstance(values.get(part), dict):
            values.pop(part, None)
            return True
        values = values[part]
    values.pop(place[-1], None)
    return True


_EXPECTED = {
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "string_type": "expected text in quotes",
    "model_type": "expected a table",
    "dict_type": "expected a table",
    "mapping_type": "expected a table",
    "tuple_type": "expected a list",
}


def _explained(place: Place, detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(place)
    if kind == "missing":
        field = every_key().get(pattern_of(place))
        what = field.description if field is not None and field.description else ""
        return f"is missing. {what}".rstrip(" .")
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"expected {context['expected']}".replace("'", '"')
    if kind == "greater_than_equal":
        return f"must be at least {context['ge']}"
    return _EXPECTED.get(kind, detail["msg"])


def _unknown(place: Place) -> str:
    """An unknown key, and the nearest known one: in its own table first, else by its last name anywhere."""
    name, here = str(place[-1]), siblings(place)
    if near := difflib.get_close_matches(name.lower(), here, n=1):
        return f"unknown key; did you mean {near[0]}?"
    anywhere: dict[str, Pattern] = {pattern[-1]: pattern for pattern in every_key() if pattern[-1] != "*"}
    if near := difflib.get_close_matches(name.lower(), anywhere, n=1, cutoff=0.75):
        return f"unknown key here; did you mean {'.'.join(anywhere[near[0]])}?"
    return f"unknown key; expected one of {', '.join(here)}"
