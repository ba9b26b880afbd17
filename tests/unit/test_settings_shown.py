"""Settings as people and programs read them: effective, with origins, without secrets; and the reference."""

import json
import tomllib
from pathlib import Path

from proxy.settings import built_in_layer, environment_layer, file_layer, parse, read
from proxy.settings.keys import every_key
from proxy.settings.reading import Effective
from proxy.settings.shown import as_json, as_toml, reference

README = Path(__file__).parents[2] / "README.md"

FILE = """
[server]
listen = [":5000", "unix:/run/b.sock"]
tls = { cert = "/c", key = "/k" }
[upstreams."quay.io"]
url = "https://quay.io"
credentials = { username = "u", password = "hunter2" }
[upstreams."x.y"]
url = [{ url = "https://x.y", credentials = { username = "u", password = "hunter2" } }]
[projects.platform]
deny = ["**:latest"]
"""


def effective(text: str = FILE) -> Effective:
    """The file over what is built in, with a password in the environment, too."""
    below = [built_in_layer("/cache"), file_layer(text, "b.toml", folder="/etc")]
    environ = {"BREAKWATER_UPSTREAMS__X_Y__CREDENTIALS__PASSWORD": "hunter2", "BREAKWATER_LOG__LEVEL": "debug"}
    environ["BREAKWATER_UPSTREAMS__X_Y__CREDENTIALS__USERNAME"] = "u"
    return read([*below, environment_layer(environ, below)])


def test_a_secret_is_never_printed() -> None:
    """Neither from a table, nor within a list, nor from the environment; a path to a secret is none."""
    found = effective()
    assert "hunter2" not in as_toml(found) + json.dumps(as_json(found))
    assert as_toml(found).count('password = "…"') == 3


def test_every_value_says_where_it_came_from() -> None:
    """house.md §10.9: the effective value and its origin."""
    lines = [" ".join(line.split()) for line in as_toml(effective()).splitlines()]
    assert 'listen = [":5000", "unix:/run/b.sock"] # b.toml:3' in lines
    assert 'cert = "/c" # b.toml:4' in lines
    assert 'level = "debug" # $BREAKWATER_LOG__LEVEL' in lines
    assert 'capacity = "20GiB" # built-in' in lines
    assert 'deny = ["**:latest"] # b.toml:11' in lines
    assert "[projects.platform]" in lines


def test_what_is_printed_is_a_settings_file_that_means_the_same() -> None:
    """Defaults written out are the defaults; what is not in this version yet is not printed as if it were."""
    found = read([built_in_layer("/cache"), file_layer('[projects.a]\npath = "a"', "b.toml", folder="/")])
    assert parse(tomllib.loads(as_toml(found))) == found.settings


def test_the_default_upstream_that_is_not_configured_is_printed_as_none() -> None:
    """What counts is printed, not what would count elsewhere."""
    found = effective()
    assert 'default_upstream = "" ' in as_toml(found)
    assert {"key": "server.default_upstream", "value": "", "origin": "built-in"} in as_json(found)["settings"]


def test_json_has_the_same_rows() -> None:
    """One list of key, value and origin, in the same order."""
    found = effective()
    keys = [row["key"] for row in as_json(found)["settings"]]
    assert keys[0] == "server.listen"
    assert 'upstreams."quay.io".credentials.username' in keys
    assert len(keys) == as_toml(found).count(" # ")


def test_the_reference_has_every_key() -> None:
    """It is made from the models, so that it cannot lag behind them."""
    text = reference()
    for pattern in every_key():
        if pattern[-1] != "*" and len(pattern) > 1 and "+" not in pattern:
            assert f"{pattern[-1]}` |" in text, ".".join(pattern)
    assert "None" not in text


def test_the_reference_is_a_table_for_each_section() -> None:
    """Every row has four cells, whatever its sentences contain."""
    for line in reference().splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5, line


BEGIN, END = "<!-- settings reference: begin -->", "<!-- settings reference: end -->"


def test_the_readme_holds_the_reference_as_it_is() -> None:
    """Print it with `breakwater settings --reference` and put it between the marks."""
    held = README.read_text().split(BEGIN)[1].split(END)[0]
    assert held.strip() == reference().strip()
