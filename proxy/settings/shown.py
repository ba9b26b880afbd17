"""Settings for people and programs to read: the effective ones with their origins, and the reference of every key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from proxy.settings.contradictions import effective_default
from proxy.settings.fields import Section
from proxy.settings.keys import Pattern, Place, inner_section, is_secret, quoted, spelled
from proxy.settings.layers import BUILT_IN, Origin
from proxy.settings.model import Settings
from proxy.settings.reading import Effective

#: What stands in place of every secret.
HIDDEN = "…"

#: Beyond this column an origin follows its value at once.
_ORIGIN_COLUMN = 56


# -- effective settings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One key that has a value: as it is written in TOML, secrets hidden, and where that was."""

    place: Place
    value: Any
    origin: Origin


def rows(effective: Effective) -> Iterator[Row]:
    """Every key with a value, section by section, in the order of the reference. Keys without one are left out."""
    for row in _rows_of(Settings, effective.written.values, (), effective):
        if row.place == ("server", "default_upstream") and effective_default(effective.settings) is None:
            yield Row(row.place, "", row.origin)
            continue
        yield row


def _rows_of(section: type[Section], table: Mapping[str, Any], above: Place, effective: Effective) -> Iterator[Row]:
    tables: list[tuple[type[Section], Mapping[str, Any], Place]] = []
    for name, field in section.model_fields.items():
        here = (*above, name)
        inner, is_many = inner_section(field.annotation)
        value = table.get(name)
        if inner is not None and not is_many:
            if isinstance(value, Mapping) or field.get_default() is not None:
                tables.append((inner, value or {}, here))
        elif inner is not None and (isinstance(value, Mapping) or value is None):
            tables += [(inner, one, (*here, key)) for key, one in (value or {}).items()]
        elif name in table:
            yield Row(here, _without_secrets(value, here), effective.written.origin_of(here))
        elif field.get_default() is not None:
            yield Row(here, field.get_default(), BUILT_IN)
    for inner, one, here in tables:
        yield from _rows_of(inner, one, here, effective)


def _without_secrets(value: Any, place: Place) -> Any:
    if is_secret(place):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: _without_secrets(inner, (*place, key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_secrets(inner, (*place, number)) for number, inner in enumerate(value)]
    return value


def as_toml(effective: Effective) -> str:
    """The effective settings as a TOML document, each key with its origin in a comment. Secrets are hidden."""
    lines: list[str] = []
    table: Place | None = None
    for row in rows(effective):
        if row.place[:-1] != table:
            table = row.place[:-1]
            lines += [*([""] if lines else []), f"[{spelled(table)}]"]
        written = f"{spelled(row.place[-1:])} = {_toml(row.value)}"
        lines.append(f"{written:<{_ORIGIN_COLUMN - 1}} # {row.origin}")
    return "\n".join(lines) + "\n"


def as_json(effective: Effective) -> dict[str, Any]:
    """The effective settings for programs: a list of key, value as TOML writes it, and origin. Secrets are hidden."""
    listed = [{"key": spelled(row.place), "value": row.value, "origin": str(row.origin)} for row in rows(effective)]
    return {"settings": listed}


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return quoted(value)
        case list() | tuple():
            return f"[{', '.join(_toml(entry) for entry in value)}]"
        case dict():
            return f"{{ {', '.join(f'{spelled((key,))} = {_toml(entry)}' for key, entry in value.items())} }}"
        case _:
            return str(value)


# -- the reference -----------------------------------------------------------------------------------------------------

_HEADINGS: dict[Pattern, str] = {
    ("upstreams", "*"): '[upstreams."<source host>"]',
    ("projects", "*"): "[projects.<name>]",
    ("robots", "*"): "[robots.<name>]",
}


def reference() -> str:
    """Every key in Markdown, a table for each section, made from the models' own words; it stands in the README."""
    return "\n".join(_reference_of(Settings, ())).lstrip("\n") + "\n"


def _reference_of(section: type[Section], above: Pattern) -> Iterator[str]:
    keys = {name: field for name, field in section.model_fields.items() if not _is_heading((*above, name), field)}
    heading = _HEADINGS.get(above, f"[{'.'.join(above)}]")
    if keys:
        yield from (
            "",
            f"#### `{heading}`",
            "",
            (section.__doc__ or "").strip(),
            "",
        )
        yield from ("| key | default | what it is | why this default |", "|---|---|---|---|")
    for name, field in keys.items():
        yield from _reference_rows(name, (*above, name), field)
    for name, field in section.model_fields.items():
        if name not in keys:
            inner, is_many = inner_section(field.annotation)
            assert inner is not None, "a heading has a section"
            yield from _reference_of(inner, (*above, name, "*") if is_many else (*above, name))


def _is_heading(pattern: Pattern, field: FieldInfo) -> bool:
    """Top-level tables have headings; deeper ones are rows of their section."""
    return len(pattern) == 1 and inner_section(field.annotation)[0] is not None


def _reference_rows(name: str, pattern: Pattern, field: FieldInfo) -> Iterator[str]:
    inner, is_many = inner_section(field.annotation)
    yield f"| `{name}` | {_default(field)} | {_cell(field.description or '')} | {_cell(_word(field, 'why'))} |"
    if inner is None:
        return
    for key, one in inner.model_fields.items():
        if is_many and inner_section(one.annotation)[0] is not None:
            continue  # what an entry of a list shares with its section is told there
        yield from _reference_rows(f"{name}.{key}", (*pattern, key), one)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return _word(field, "instead") or "must be written"
    default = field.get_default()
    if default is None:
        return _word(field, "instead") or "none"
    return f"`{_toml(default)}` {_unit(default, field)}".rstrip()


def _unit(default: Any, field: FieldInfo) -> str:
    """The unit, where the default does not carry it."""
    return _word(field, "unit") if isinstance(default, int) else ""


def _word(field: FieldInfo, name: str) -> str:
    extra = field.json_schema_extra
    return str(extra.get(name, "")) if isinstance(extra, dict) else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
