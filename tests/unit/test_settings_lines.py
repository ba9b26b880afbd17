"""Lines of keys, in documents made to be misread."""

import pytest

from proxy.settings.lines import lines_of

DOCUMENT = '''# a comment with [server] and listen = 1
[server] # another
listen = [
  "a", # "not the end ]"
  "b",
]
"quoted key" = "with # no comment, and [no table]"
tls.cert = 'C:\\no\\escape'
tls = { key = "k", nested = { deep = [ { a = 1 },
  { b = 2 } ] } }
text = """
[store]
path = "no key"  \\"""  ""
"""
after = 1
raw = \'\'\'
capacity = "\'\' no key"
\'\'\'\'\'
end = 1979-05-27T07:32:00Z
[upstreams."docker.io"]
url = "x"
[[list]]
a = 1
[[list]]
a = 2
[list.inner]
b = 3
[ spaced . "out" ]
c = 1
'''.replace("tls = { key", "other = { key")


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (("server",), 2),
        (("server", "listen"), 3),
        (("server", "listen", 0), 4),
        (("server", "listen", 1), 5),
        (("server", "quoted key"), 7),
        (("server", "tls", "cert"), 8),
        (("server", "other", "nested", "deep", 1, "b"), 10),
        (("server", "text"), 11),
        (("server", "after"), 15),
        (("server", "raw"), 16),
        (("server", "end"), 19),
        (("upstreams", "docker.io", "url"), 21),
        (("list", 0, "a"), 23),
        (("list", 1, "a"), 25),
        (("list", 1, "inner", "b"), 27),
        (("spaced", "out", "c"), 29),
    ],
    ids=str,
)
def test_a_key_is_found_on_its_line(place: tuple[str | int, ...], line: int) -> None:
    """Strings, comments and multi-line values are passed over; headers and inline tables are entered."""
    assert lines_of(DOCUMENT)[place] == line


def test_what_stands_in_a_string_is_no_key() -> None:
    """The document's strings speak of tables and keys that are not there."""
    found = lines_of(DOCUMENT)
    assert ("store",) not in found
    assert ("server", "path") not in found
    assert ("server", "capacity") not in found


def test_windows_line_ends_count_once() -> None:
    """A file from another system has the same line numbers."""
    assert lines_of("a = 1\r\n\r\nb = 2\r\n") == {("a",): 1, ("b",): 3}


def test_an_empty_document_has_no_lines() -> None:
    """Nothing, and nothing but a comment."""
    assert lines_of("") == {}
    assert lines_of("# only this") == {}
