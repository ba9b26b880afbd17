"""The finder of lines against tomllib: the same places for any document, each on the line that spells its name."""

import tomllib
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.settings.keys import quoted, spelled
from proxy.settings.lines import lines_of

names = st.one_of(
    st.sampled_from(["a", "b-c", "docker.io", "x = 1", "[t]", "#", '"', "é", ""]), st.text("ab.'\"#=[] ", max_size=4)
)
texts = st.one_of(
    st.text(max_size=8), st.sampled_from(["[store]\nx = 1", '"""', "'''", "a = [", "# no", "}\n]", '\\"'])
)
scalars = st.one_of(st.integers(-9, 9), st.booleans(), texts)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)
documents = st.dictionaries(names, trees, max_size=5)


def _inline(value: Any, style: int) -> str:
    """A value as TOML, in one of several ways to write it."""
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case str():
            return _string(value, style)
        case list():
            separator, end = (",\n  # a ] in a comment\n  ", ",\n") if style % 2 and value else (", ", "")
            return f"[{separator.join(_inline(entry, style) for entry in value)}{end}]"
        case dict():
            pairs = (f"{spelled((key,)) or quoted(key)} = {_inline(inner, style)}" for key, inner in value.items())
            return f"{{ {', '.join(pairs)} }}"
    raise AssertionError(value)


def _string(text: str, style: int) -> str:
    can_be_raw = "\r" not in text and all(sign == "\n" or sign == "\t" or sign.isprintable() for sign in text)
    if style % 3 == 1 and can_be_raw and "'''" not in text and not text.endswith("'"):
        return f"'''\n{text}'''"
    if style % 3 == 2:
        return '"""\n' + quoted(text)[1:-1].replace("\\n", "\n") + '"""'
    return quoted(text)


def _written(document: dict[str, Any], style: int, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Lines of a document; tables become headers or stay inline, by the style."""
    headed = {key: value for key, value in document.items() if isinstance(value, dict) and (style + len(key)) % 2}
    for key, value in document.items():
        if key not in headed:
            yield f"{spelled((key,)) or quoted(key)} = {_inline(value, style)} # [no] = 1"
    for key, value in headed.items():
        yield f"[{'.'.join(spelled((part,)) or quoted(part) for part in (*above, key))}]"
        yield from _written(value, style, (*above, key))


def _places(value: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield (*above, key)
        yield from _places(entry, (*above, key))


@given(documents, st.integers(0, 5))
def test_the_finder_sees_exactly_the_places_that_tomllib_sees(document: dict[str, Any], style: int) -> None:
    """Neither a key too many, out of a string or comment, nor one too few; each on the line where its name stands."""
    text = "\n".join(_written(document, style)) + "\n"
    parsed = tomllib.loads(text)
    found = lines_of(text)
    assert set(found) == set(_places(parsed))
    lines = text.split("\n")
    for place, line in found.items():
        if isinstance(name := place[-1], str):
            assert (spelled((name,)) or quoted(name)) in lines[line - 1]
