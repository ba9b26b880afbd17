"""On which line of a TOML text each key stands.

`tomllib` keeps no positions, so this reads the text a second time, for names and nothing else. It is only given texts
that `tomllib` has accepted, and relies on that: it checks nothing, and knows just enough of TOML 1.0 (comments, four
kinds of strings, dotted and quoted keys, arrays, inline tables, both kinds of headers) not to take a string's content
for a key.
A property test holds it against `tomllib`: the same places, for any document.
"""

from __future__ import annotations

import re
import tomllib

Place = tuple[str | int, ...]

_SKIP = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]+")
#: Longest first: three quotes begin a multi-line string, which may end with up to two quotes of its own.
_STRING = re.compile(
    r'"""(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}'
    r"|'''(?:[^']|'{1,2}(?!'))*'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)


def lines_of(text: str) -> dict[Place, int]:
    """Place -> line, from 1, for every table, key and list entry of a valid TOML text; tables where they begin."""
    reader = _Reader(text)
    reader.read()
    return reader.lines


class _Reader:
    def __init__(self, text: str) -> None:
        # tomllib reads \r\n as \n; the number of lines is the same.
        self.text = text.replace("\r\n", "\n")
        self.at = 0
        self.lines: dict[Place, int] = {}
        self._n_entries: dict[Place, int] = {}
        self._counted_to = 0
        self._line = 1

    def read(self) -> None:
        table: Place = ()
        while not self._is_at_end():
            if self._take("[["):
                table = self._entered(self._key(), is_array=True)
                self._skip_to("]]")
            elif self._take("["):
                table = self._entered(self._key(), is_array=False)
                self._skip_to("]")
            else:
                self._pair(table)

    def _is_at_end(self) -> bool:
        self._skip()
        return self.at >= len(self.text)

    def _entered(self, names: list[str], *, is_array: bool) -> Place:
        """The place of a header; on its way, an array of tables means its latest entry."""
        here: Place = ()
        for name in names[:-1]:
            here = self._latest(self._note((*here, name)))
        here = self._note((*here, names[-1]))
        if not is_array:
            return self._latest(here)
        number = self._n_entries.get(here, 0)
        self._n_entries[here] = number + 1
        return self._note((*here, number))

    def _latest(self, place: Place) -> Place:
        n_entries = self._n_entries.get(place, 0)
        return (*place, n_entries - 1) if n_entries else place

    def _pair(self, table: Place) -> None:
        here = table
        for name in self._key():
            here = self._note((*here, name))
        self._skip_to("=")
        self._value(here)

    def _value(self, place: Place) -> None:
        self._skip()
        if self._take("["):
            self._list(place)
        elif self._take("{"):
            self._inline_table(place)
        elif string := _STRING.match(self.text, self.at):
            self.at = string.end()
        elif scalar := _SCALAR.match(self.text, self.at):
            self.at = scalar.end()

    def _list(self, place: Place) -> None:
        number = 0
        while True:
            self._skip()
            if self._take("]"):
                return
            self._value(self._note((*place, number)))
            number += 1
            self._skip()
            self._take(",")

    def _inline_table(self, place: Place) -> None:
        while True:
            self._skip()
            if self._take("}"):
                return
            self._pair(place)
            self._skip()
            self._take(",")

    def _key(self) -> list[str]:
        names = []
        while True:
            self._skip_space()
            if string := _STRING.match(self.text, self.at):
                names.append(str(tomllib.loads(f"name = {string[0]}")["name"]))
                self.at = string.end()
            elif bare := _BARE.match(self.text, self.at):
                names.append(bare[0])
                self.at = bare.end()
            self._skip_space()
            if not self._take("."):
                return names

    def _note(self, place: Place) -> Place:
        self._line += self.text.count("\n", self._counted_to, self.at)
        self._counted_to = self.at
        self.lines.setdefault(place, self._line)
        return place

    def _take(self, sign: str) -> bool:
        if not self.text.startswith(sign, self.at):
            return False
        self.at += len(sign)
        return True

    def _skip_to(self, sign: str) -> None:
        self._skip_space()
        self._take(sign)

    def _skip(self) -> None:
        found = _SKIP.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def _skip_space(self) -> None:
        found = _SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at
