"""Layers: which value wins, and where it came from."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from proxy import settings_file
from proxy.errors import InvalidSettings
from proxy.oci.names import SourceHost
from proxy.settings import TcpAddress, built_in_layer, environment_layer, file_layer, read
from proxy.settings.layers import Layer, command_line_layer
from proxy.settings.reading import Effective

FILE = """
[server]
listen = ":5000"
shutdown_grace = "1s"
[upstreams."Quay.io"]
url = "https://quay.io"
[projects.my-team]
deny = ["**:latest"]
"""


def effective(environ: Mapping[str, str], text: str | None = FILE) -> Effective:
    """What holds with these variables over this file."""
    below = [built_in_layer("/cache")]
    if text is not None:
        below.append(file_layer(text, "b.toml", folder="/etc/breakwater"))
    return read([*below, environment_layer(environ, below)])


def problems(environ: Mapping[str, str]) -> list[str]:
    """What is wrong with these variables over FILE."""
    with pytest.raises(InvalidSettings) as caught:
        effective(environ)
    return caught.value.problems


def origin(found: Effective, *place: str | int) -> str:
    """Where the place was written, as people read it."""
    return str(found.written.origin_of(place))


# -- what is built in --------------------------------------------------------------------------------------------------


def test_without_a_file_well_known_registries_are_there() -> None:
    """product.md: with no file the built-in defaults run."""
    settings = effective({}, None).settings
    hosts = "docker.io quay.io ghcr.io registry.k8s.io gcr.io mcr.microsoft.com public.ecr.aws"
    assert list(map(str, settings.upstreams)) == hosts.split()
    assert settings.upstreams[SourceHost("docker.io")].token_realms == (SourceHost("auth.docker.io"),)
    assert settings.server.listen == (TcpAddress("localhost", 5000),)
    assert settings.store.path == "/cache"


def test_a_file_that_writes_upstreams_replaces_the_built_in_ones() -> None:
    """A closed world: what is not written is not dialled."""
    assert list(map(str, effective({}).settings.upstreams)) == ["quay.io"]


def test_a_file_without_upstreams_keeps_the_built_in_ones() -> None:
    """Whoever sets a port did not choose registries."""
    assert len(effective({}, '[server]\nlisten = ":1"').settings.upstreams) == 7


def test_a_relative_path_is_taken_from_the_folder_of_its_file() -> None:
    """The same file means the same store from whatever folder the service is started."""
    text = """
    server.tls = { cert = "./tls/cert.pem", key = "/abs/key.pem" }
    store.path = "store"
    [upstreams."x.y"]
    url = "https://x.y"
    credentials = { username = "u", password_file = "secrets/x" }
    [projects.a]
    path = "a"
    upstream = "x.y"
    """
    settings = effective({}, text).settings
    assert settings.store.path == "/etc/breakwater/store"
    assert settings.server.tls is not None
    assert (settings.server.tls.cert, settings.server.tls.key) == ("/etc/breakwater/tls/cert.pem", "/abs/key.pem")
    upstream = settings.upstreams[SourceHost("x.y")]
    assert upstream.credentials is not None
    assert upstream.credentials.password_file == "/etc/breakwater/secrets/x"
    assert settings.projects["a"].path == "a"


# -- the environment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text", "place", "value"),
    [
        ("SERVER__LISTEN", "10.0.0.1:80", ("server", "listen"), (TcpAddress("10.0.0.1", 80),)),
        ("SERVER__LISTEN", '[":1", ":2"]', ("server", "listen"), (TcpAddress("", 1), TcpAddress("", 2))),
        ("SERVER__SEALED", "true", ("server", "sealed"), True),
        ("SERVER__MAX_CONNECTIONS", "12", ("server", "max_connections"), 12),
        ("STORE__PATH", "/srv", ("store", "path"), "/srv"),
        ("STORE__PATH", "12", ("store", "path"), "12"),
        ("STORE__PATH", '"quoted"', ("store", "path"), '"quoted"'),
        ("TRANSFERS__HEADER_DEADLINE", "21s", ("transfers", "header_deadline"), 21.0),
        ("server__sealed", "true", ("server", "sealed"), True),
    ],
)
def test_a_variable_sets_the_key_that_it_spells(
    variable: str, text: str, place: tuple[str, str], value: object
) -> None:
    """Read as TOML where it is any, else as text; a key that takes any text takes it as it stands."""
    found = effective({f"BREAKWATER_{variable}": text})
    section = getattr(found.settings, place[0])
    assert getattr(section, place[1]) == value
    assert origin(found, *place) == f"$BREAKWATER_{variable}"


def test_a_variable_names_an_upstream_in_letters_and_underscores() -> None:
    """Shells cannot export a dot; QUAY_IO is the configured Quay.io, and TEAM's hyphen is an underscore, too."""
    found = effective(
        {
            "BREAKWATER_UPSTREAMS__QUAY_IO__TAG_TTL": "1h",
            "BREAKWATER_UPSTREAMS__QUAY_IO__CREDENTIALS__USERNAME": "12345",
            "BREAKWATER_UPSTREAMS__QUAY_IO__CREDENTIALS__PASSWORD": '["no toml"]',
            "BREAKWATER_PROJECTS__MY_TEAM__DENY": '["**:dev"]',
        }
    )
    quay = found.settings.upstreams[SourceHost("quay.io")]
    assert quay.tag_ttl == 3600
    assert quay.credentials is not None
    assert quay.credentials.username == "12345"
    assert quay.credentials.password is not None
    assert quay.credentials.password.get_secret_value() == '["no toml"]'
    assert found.settings.projects["my-team"].deny == ("**:dev",)
    assert origin(found, "upstreams", "Quay.io", "url") == "b.toml:6"


def test_a_variable_with_a_dot_may_name_a_new_upstream() -> None:
    """Containers' environments can hold one, and then nothing has to be guessed."""
    found = effective({"BREAKWATER_UPSTREAMS__NEW.TEST:5000__URL": "https://new.test:5000"})
    assert SourceHost("new.test:5000") in found.settings.upstreams


def test_a_variable_that_names_nothing_is_reported_with_what_there_is() -> None:
    """An override that silently does nothing is worse than a refusal to start."""
    assert problems(
        {
            "BREAKWATER_UPSTREAMS__QUAI_IO__TAG_TTL": "1h",
            "BREAKWATER_SERVER__LISTN": ":1",
            "BREAKWATER_SERVER": "1",
            "BREAKWATER_": "x",
            "BREAKWATER_STORE__MIN_FREE": "much",
        }
    ) == [
        "$BREAKWATER_: expected BREAKWATER_<SECTION>__<KEY>",
        "$BREAKWATER_SERVER__LISTN: contradicts another variable, which sets a part of it or what it is a part of",
        "$BREAKWATER_UPSTREAMS__QUAI_IO__TAG_TTL: names no configured upstream; the configured ones are QUAY_IO",
        "$BREAKWATER_SERVER: server: expected a table",
        "$BREAKWATER_STORE__MIN_FREE: store.min_free: 'much' is not a size: expected a number and B, kB, MB, GB, TB, "
        'KiB, MiB, GiB or TiB, as in "200GiB"; a share of the file system is written "80%"',
    ]


def test_two_upstreams_that_a_shell_cannot_tell_apart_are_set_in_the_file() -> None:
    """Guessing one of two would send credentials to the other."""
    text = '[upstreams."a.b"]\nurl = "https://a.b"\n[upstreams."a-b"]\nurl = "https://a-b"\n'
    with pytest.raises(InvalidSettings, match=r"could mean a-b or a\.b; set it in the file"):
        effective({"BREAKWATER_UPSTREAMS__A_B__TAG_TTL": "1h"}, text)


@pytest.mark.parametrize(
    "variable",
    [
        "BREAKWATER_CONFIG",
        "BREAKWATER_SERVICE_HOST",
        "BREAKWATER_SERVICE_PORT",
        "BREAKWATER_SERVICE_PORT_HTTP",
        "BREAKWATER_PORT",
        "BREAKWATER_PORT_5000_TCP",
        "BREAKWATER_PORT_5000_TCP_ADDR",
        "BREAKWATER_ADMIN_PORT_5001_TCP_PROTO",
        "BREAKWATERS_X",
        "_BREAKWATER_COMPLETE",
    ],
)
def test_variables_that_are_not_settings_are_let_be(variable: str) -> None:
    """Kubernetes sets `breakwater`'s service links in every pod of its namespace, our own included."""
    effective({variable: "tcp://10.0.0.1:5000"})


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_everything() -> None:
    """Built in, file, environment, command line: the later wins, and the origin says which."""
    below = [built_in_layer("/cache"), file_layer(FILE, "b.toml", folder="/")]
    below.append(environment_layer({"BREAKWATER_SERVER__LISTEN": ":2"}, below))
    options = [
        ("--listen", ("server", "listen"), [":3"]),
        ("--upstream", ("upstreams", "quay.io", "url"), ["http://x"]),
    ]
    found = read([*below, command_line_layer(options, below)])
    assert found.settings.server.listen == (TcpAddress("", 3),)
    assert origin(found, "server", "listen") == "--listen"
    assert origin(found, "server", "shutdown_grace") == "b.toml:4"
    assert origin(found, "store", "path") == "built-in"
    assert [str(host) for host in found.settings.upstreams] == ["quay.io"]
    assert found.settings.upstreams[SourceHost("quay.io")].url[0].url == "http://x"


def test_a_list_is_replaced_and_a_table_is_joined() -> None:
    """Adding to a list of addresses would leave no way to take one away."""
    lower = file_layer('[server]\nlisten = [":1", ":2"]\nshutdown_grace = "1s"', "low.toml", folder="/")
    upper = file_layer('[server]\nlisten = [":3"]', "high.toml", folder="/")
    found = read([built_in_layer("/x"), lower, upper])
    assert found.settings.server.listen == (TcpAddress("", 3),)
    assert found.settings.server.shutdown_grace == 1
    assert origin(found, "server", "listen", 0) == "high.toml:2"


def test_a_table_may_take_the_place_of_a_value_and_a_value_that_of_a_table() -> None:
    """Laying never fails; what comes out is judged afterwards."""
    layers = [Layer({"a": {"b": 1}}, file_layer("", "x", folder="/").origin), file_layer("a = 3", "y.toml", folder="/")]
    with pytest.raises(InvalidSettings, match=r"y\.toml:1: a: unknown key"):
        read([built_in_layer("/x"), *layers])
    with pytest.raises(InvalidSettings, match=r"x: a: unknown key"):
        read([built_in_layer("/x"), *reversed(layers)])


# -- finding the file --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no file in /etc."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        settings_file, "WELL_KNOWN_PLACES", (Path("breakwater.toml"), tmp_path / "etc" / "breakwater.toml")
    )
    (tmp_path / "etc").mkdir()
    return tmp_path


def listen(grace: str) -> str:
    """A file that one can tell from the others."""
    return f'[server]\nshutdown_grace = "{grace}"\n'


def test_the_file_is_found_in_the_order_of_the_contract(folder: Path) -> None:
    """--config, else $BREAKWATER_CONFIG, else ./breakwater.toml, else /etc, else what is built in."""
    for name, grace in (("option", "1s"), ("variable", "2s"), ("breakwater", "3s"), ("etc/breakwater", "4s")):
        (folder / f"{name}.toml").write_text(listen(grace))
    environ = {"BREAKWATER_CONFIG": "variable.toml", "HOME": "/home/x"}

    def grace_of(config: str | None, environ: Mapping[str, str]) -> float:
        return settings_file.load(config, environ=environ).settings.server.shutdown_grace

    assert grace_of("option.toml", environ) == 1
    assert grace_of(None, environ) == 2
    assert grace_of(None, {}) == 3
    (folder / "breakwater.toml").unlink()
    assert grace_of(None, {}) == 4
    (folder / "etc" / "breakwater.toml").unlink()
    assert grace_of(None, {}) == 30


@pytest.mark.parametrize(
    ("config", "environ", "why"),
    [
        pytest.param("no.toml", {}, "no.toml: cannot be read (--config): No such file or directory", id="absent"),
        pytest.param(None, {"BREAKWATER_CONFIG": "no.toml"}, "($BREAKWATER_CONFIG)", id="absent, by variable"),
        pytest.param("folder", {}, "Is a directory", id="a folder"),
        pytest.param("latin", {}, "not UTF-8 at byte 2", id="another encoding"),
        pytest.param("broken", {}, "not TOML", id="not TOML"),
    ],
)
def test_a_file_that_was_named_is_never_passed_over(
    folder: Path, config: str | None, environ: Mapping[str, str], why: str
) -> None:
    """Running with other settings than those somebody pointed at is the worst answer."""
    (folder / "folder").mkdir()
    (folder / "latin").write_bytes("# é".encode("latin-1"))
    (folder / "broken").write_text("[server")
    with pytest.raises(InvalidSettings) as caught:
        settings_file.load(config, environ=environ)
    assert why in str(caught.value)


def test_a_dangling_link_in_a_well_known_place_is_a_problem(folder: Path) -> None:
    """Somebody meant a file to be there."""
    (folder / "breakwater.toml").symlink_to("gone.toml")
    with pytest.raises(InvalidSettings, match="No such file"):
        settings_file.load(environ={})


@pytest.mark.parametrize(
    ("environ", "store"),
    [
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/x"}, "/xdg"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/x"}, "/home/x/.cache"),
        ({"HOME": "/home/x"}, "/home/x/.cache"),
        ({}, "/var/cache"),
    ],
)
def test_the_store_of_somebody_who_configured_none_is_in_the_cache_folder(
    folder: Path, environ: Mapping[str, str], store: str
) -> None:
    """XDG Base Directory Specification; a relative path in its variable is ignored."""
    assert settings_file.load(environ=environ).settings.store.path == store


def test_a_store_that_an_earlier_version_made_by_default_is_used_on(tmp_path: Path) -> None:
    """0.1.0 made one folder more below the cache folder; nobody's images are left behind there."""
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    assert settings_file.default_store(environ) == tmp_path
    (tmp_path / "breakwater" / "blobs").mkdir(parents=True)
    assert settings_file.default_store(environ) == tmp_path, "this one is of today"
    (tmp_path / "breakwater" / "breakwater").mkdir()
    assert settings_file.default_store(environ) == tmp_path / "breakwater"
