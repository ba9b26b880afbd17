"""From TOML to Settings, or to every problem at once with its place."""

import tomllib
from pathlib import Path
from typing import Any

import pydantic
import pytest

from proxy.errors import InvalidSettings
from proxy.oci.names import SourceHost
from proxy.rules.globs import Glob
from proxy.rules.secret_hash import SecretHash
from proxy.settings import (
    FOREVER,
    Amount,
    Layer,
    Origin,
    Settings,
    TcpAddress,
    effective_default,
    file_layer,
    parse,
    read,
)
from proxy.settings.keys import every_key, spelled

EXAMPLES = sorted((Path(__file__).parents[2] / "config").glob("*.toml"))

DOCKER = '[upstreams."docker.io"]\nurl = "https://registry-1.docker.io"\n'
STORE = '[store]\npath = "/var/lib/breakwater"\n'
CREDENTIALS = '[upstreams."docker.io".credentials]\n'


def settings_of(text: str) -> Settings:
    """The settings of a file's text, on top of a store and docker.io where it writes neither."""
    return parse(tomllib.loads(_complete(text)))


def problems_of(text: str, name: str = "b.toml") -> list[str]:
    """Every problem of a file's text."""
    with pytest.raises(InvalidSettings) as caught:
        read([file_layer(_complete(text), name, folder="/etc")])
    return caught.value.problems


def _complete(text: str) -> str:
    store = "" if "[store]" in text else STORE
    return text + ("\n" + DOCKER if "[upstreams" not in text else "\n") + store


# -- values ------------------------------------------------------------------------------------------------------------


def test_values_come_ready_for_use() -> None:
    """Durations are seconds, sizes bytes, rates bytes per second, lists tuples, source hosts parsed."""
    settings = settings_of("""
        [server]
        listen = ["0.0.0.0:5000", "unix:/run/b.sock"]
        [store]
        path = "/srv"
        capacity = "80%"
        [transfers]
        min_rate = "1KiB/s"
        [upstreams."Quay.io"]
        url = "https://quay.io/"
        tag_ttl = "1h30m"
        token_realms = "sso.example"
        credentials = { username = "u", password = "secret" }
        [projects.platform]
        path = "platform"
        upstream = "quay.io"
        match = "quay.io/prometheus/**"
    """)
    quay = settings.upstreams[SourceHost("quay.io")]
    assert settings.server.listen[0] == TcpAddress("0.0.0.0", 5000)
    assert settings.store.capacity == Amount(share=0.8)
    assert settings.transfers.min_rate == 1024
    assert (quay.tag_ttl, quay.stale_if_error, quay.negative_ttl) == (5400, FOREVER, 10)
    assert quay.token_realms == (SourceHost("sso.example"),)
    assert quay.url[0].url == "https://quay.io"
    assert quay.credentials is not None
    assert quay.credentials.password is not None
    assert quay.credentials.password.get_secret_value() == "secret"
    assert settings.projects["platform"].match == ("quay.io/prometheus/**",)


def test_settings_never_change() -> None:
    """A reload makes new ones; nobody holding the old ones sees a mixture."""
    settings = settings_of("")
    with pytest.raises(pydantic.ValidationError):
        settings.server.sealed = True
    with pytest.raises(TypeError):
        settings.upstreams[SourceHost("x.y")] = settings.upstreams[SourceHost("docker.io")]  # type: ignore[index]


def test_projects_keep_the_order_of_the_file() -> None:
    """product.md: a request belongs to the first project that matches, in the file's order."""
    assert list(settings_of("[projects.b]\n[projects.a]\n[projects.c]").projects) == ["b", "a", "c"]


def test_a_secret_does_not_show_in_a_repr() -> None:
    """What is logged by accident must not hold a password."""
    settings = settings_of(DOCKER + 'credentials = { username = "u", password = "hunter2" }')
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_right(path: Path) -> None:
    """What we hand out must parse as it stands, and every rule in it must be one the gates understand."""
    settings = read([file_layer(path.read_text(), path.name, folder="/etc/breakwater")]).settings
    for project in settings.projects.values():
        assert all(Glob.parse(rule).text == rule for rule in (*project.match, *project.allow, *project.deny))


def test_there_is_an_example_for_each_shape_of_deployment() -> None:
    """product.md names three; the fourth is what the image has in it."""
    assert [path.stem for path in EXAMPLES] == ["air-gapped", "container", "datacenter-edge", "node-local"]


def test_every_key_says_what_it_is_and_why_its_default() -> None:
    """house.md habit 11: the reason and the unit are in the field."""
    for pattern, field in every_key().items():
        extra = field.json_schema_extra
        if len(pattern) > 1:
            assert isinstance(extra, dict)
            assert field.description and extra["why"], f"{'.'.join(pattern)} gives no reason"
            is_number = isinstance(field.get_default(), int) and not isinstance(field.get_default(), bool)
            assert extra["unit"] or not is_number, f"{'.'.join(pattern)} has no unit"


# -- all problems at once, each with its place -------------------------------------------------------------------------


def test_every_problem_is_reported_at_once_in_the_order_of_the_file() -> None:
    """Unknown keys, wrong types, wrong values and contradictions: one run shows all of them."""
    assert problems_of("""
[server]
seald = true
sealed = "yes"
max_connections = 0
admin_listen = 5001
default_upstream = "dockr.io"
[store]
path = "/srv"
capacity = "1MiB"
[upstreams."docker.io"]
url = ["https://u:hunter2@x", 7]
tag_tll = "10m"
[upstreams."quay.io"]
[projekts.x]
[projects.a]
deny = ["**:latest", "alpine"]
on_ful = "deny"
""") == [
        "b.toml:3: server.seald: unknown key; did you mean sealed?",
        "b.toml:4: server.sealed: expected true or false",
        "b.toml:5: server.max_connections: must be at least 1",
        'b.toml:6: server.admin_listen: expected an address such as "127.0.0.1:5000", ":5000", "[::]:5000" or '
        '"unix:/run/breakwater.sock"',
        "b.toml:7: server.default_upstream: dockr.io is not configured under [upstreams]; did you mean docker.io?",
        "b.toml:10: store.capacity: is smaller than one manifest may be (4 MiB), so nothing could be kept",
        'b.toml:12: upstreams."docker.io".url (entry 1): a URL must not carry a user name or password; '
        "write them under credentials",
        'b.toml:12: upstreams."docker.io".url (entry 2): expected a table',
        'b.toml:13: upstreams."docker.io".tag_tll: unknown key; did you mean tag_ttl?',
        'b.toml:14: upstreams."quay.io".url: is missing. Its address, or a list tried in order; an entry may be a '
        "table `{ url = …, credentials = … }`",
        "b.toml:15: projekts: unknown key; did you mean projects?",
        "b.toml:17: projects.a.deny (entry 2): 'alpine' would match nothing: expected \"alpine/**\" for a host or "
        '"**/alpine"',
        "b.toml:18: projects.a.on_ful: unknown key; did you mean on_full?",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("[server]\nlistn = 1", "b.toml:2: server.listn: unknown key; did you mean listen?", id="a typo"),
        pytest.param(
            '[server]\ncapacity = "1GiB"',
            "b.toml:2: server.capacity: unknown key here; did you mean store.capacity?",
            id="the right key in the wrong table",
        ),
        pytest.param(
            "[policy]\nxyzzy = 1",
            "b.toml:2: policy.xyzzy: unknown key; expected one of deny, unmatched",
            id="nothing near",
        ),
        pytest.param("server = 3", "b.toml:1: server: expected a table", id="a number for a table"),
        pytest.param("[projects]\na = 3", "b.toml:2: projects.a: expected a table", id="a number for a project"),
        pytest.param(
            '[log]\nformat = "xml"', 'b.toml:2: log.format: expected "auto", "json" or "text"', id="a word of a choice"
        ),
        pytest.param(
            "[projects.Team]",
            "b.toml:1: projects.Team: 'Team' is not a name: expected",
            id="a project's name in capitals",
        ),
        pytest.param(
            '[upstreams."docker_io"]\nurl = "https://x"',
            "b.toml:1: upstreams.docker_io: 'docker_io' is not",
            id="no source host",
        ),
        pytest.param(
            '[upstreams."docker.io"]\nurl = []', 'b.toml:2: upstreams."docker.io".url: expected at least', id="no url"
        ),
        pytest.param(
            "[server]\nlisten = []", "b.toml:2: server.listen: expected at least one entry", id="nowhere to listen"
        ),
        pytest.param(
            "[server]\ntls = { cert = 'a' }",
            "b.toml:2: server.tls.key: is missing. Private key",
            id="a certificate without a key",
        ),
        pytest.param(
            "[transfers]\nheader_deadline = 25",
            'b.toml:2: transfers.header_deadline: a duration needs a unit: "25s"',
            id="no unit",
        ),
        pytest.param(
            '[transfers]\nheader_deadline = "0s"', "b.toml:2: transfers.header_deadline: a duration must be", id="zero"
        ),
        pytest.param('[store]\npath = "~/x"', "b.toml:2: store.path: ~ is not expanded", id="a tilde"),
    ],
)
def test_a_problem_names_its_place_and_what_is_expected(text: str, problem: str) -> None:
    """File, line, the key as TOML writes it, and the way out."""
    (found,) = problems_of(text)
    assert found.startswith(problem)


def test_a_file_that_is_not_toml_says_where() -> None:
    """The parser's own words hold line and column."""
    assert problems_of("[server\n")[0].startswith("b.toml: not TOML: ")
    assert "line 1" in problems_of("[server\n")[0]


def test_a_place_outside_a_file_has_no_line() -> None:
    """A mapping alone is reported by key."""
    with pytest.raises(InvalidSettings) as caught:
        parse({"store": {"path": "/x"}, "server": {"sealed": 1}}, origin=Origin("file", "memory"))
    assert caught.value.problems == ["memory: server.sealed: expected true or false"]


# -- contradictions ----------------------------------------------------------------------------------------------------


ROBOT = f"""
[robots.ci]
secret_hash = "{SecretHash.of("bw_ci", bytes(16)).text}"
projects = ["a"]
"""


def _upstream(extra: str, host: str = "docker.io") -> str:
    return f'[upstreams."{host}"]\nurl = "https://x.test"\n{extra}\n'


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        pytest.param(
            '[server]\ndefault_upstream = "quay.io"', "server.default_upstream", "not configured", id="default upstream"
        ),
        pytest.param(
            '[server]\nlisten = [":1", ":1"]', "server.listen (entry 2)", "listened on twice", id="the same address"
        ),
        pytest.param(
            '[server]\nlisten = [":1", "10.0.0.1:1"]', "server.listen (entry 2)", "twice", id="all addresses and one"
        ),
        pytest.param(
            '[server]\nlisten = ["[::]:1", "[::1]:1"]', "server.listen (entry 2)", "twice", id="all of IPv6 and one"
        ),
        pytest.param(
            '[server]\nlisten = ["localhost:1", "127.0.0.1:1"]', "server.listen (entry 2)", "twice", id="localhost"
        ),
        pytest.param(
            '[server]\nlisten = ["unix:/a", "unix:/a"]', "server.listen (entry 2)", "twice", id="the same socket"
        ),
        pytest.param('[server]\nlisten = ":5001"', "server.admin_listen", "data port", id="admin on the data port"),
        pytest.param(
            '[server]\nlisten = "unix:/a"\nadmin_listen = "unix:/a"',
            "server.admin_listen",
            "data port",
            id="and socket",
        ),
        pytest.param('[store]\npath = "/x"\ncapacity = "4MB"', "store.capacity", "one manifest", id="capacity"),
        pytest.param(
            '[store]\npath = "/x"\ncapacity = "99%"', "store.capacity", "whole file system", id="more than the disk"
        ),
        pytest.param(
            '[store]\npath = "/x"\nmin_free = "100%"', "store.min_free", "nothing to store in", id="all of it free"
        ),
        pytest.param('[transfers]\nqueue_deadline = "25s"', "transfers.queue_deadline", "shorter", id="deadlines"),
        pytest.param("[transfers]\nmax_concurrent = 3", "transfers.max_per_upstream", "allows in all", id="limits"),
        pytest.param(
            CREDENTIALS + 'username = "u"\n' + DOCKER,
            'upstreams."docker.io".credentials',
            "no source",
            id="no password",
        ),
        pytest.param(
            CREDENTIALS + 'username = "u"\npassword = "p"\npassword_file = "f"\n' + DOCKER,
            'upstreams."docker.io".credentials.password_file',
            "both written",
            id="two passwords",
        ),
        pytest.param(
            CREDENTIALS + 'password = "p"\n' + DOCKER,
            'upstreams."docker.io".credentials.password',
            "without username",
            id="no name",
        ),
        pytest.param(
            _upstream('client_cert = "c"'),
            'upstreams."docker.io".client_cert',
            "without client_key",
            id="no client key",
        ),
        pytest.param(
            _upstream('client_key = "c"'),
            'upstreams."docker.io".client_key',
            "without client_cert",
            id="no client cert",
        ),
        pytest.param(
            _upstream('bandwidth = ["5MiB/s", { rate = "1MiB/s", between = "22:00-06:00" }]'),
            'upstreams."docker.io".bandwidth (entry 2)',
            "never reached",
            id="a rate after one that always holds",
        ),
        pytest.param(
            _upstream('bandwidth = [{ zone = "UTC" }]'),
            'upstreams."docker.io".bandwidth (entry 1)',
            "neither how fast nor when",
            id="a rate that says nothing",
        ),
        pytest.param(
            _upstream('bandwidth = [{ rate = "1MiB/s", zone = "Europe/Berlin" }]'),
            'upstreams."docker.io".bandwidth (entry 1).zone',
            "without between",
            id="a zone of no hours",
        ),
        pytest.param(
            '[projects.team]\nbandwidth = ["5MiB/s", "1MiB/s"]\n',
            "projects.team.bandwidth (entry 2)",
            "never reached",
            id="a project's second rate",
        ),
        pytest.param(
            _upstream("") + _upstream("", "Docker.io"), 'upstreams."docker.io"', "written twice", id="capitals"
        ),
        pytest.param(
            '[projects.a]\nupstream = "quai.io"', "projects.a.upstream", "not configured", id="project's upstream"
        ),
        pytest.param(
            '[projects.a]\npath = "x"\n[projects.b]\npath = "x"', "projects.b.path", "path of projects.a", id="one path"
        ),
        pytest.param(
            _upstream("", "intern") + '[projects.a]\npath = "intern"',
            "projects.a.path",
            "source host",
            id="path is a host",
        ),
        pytest.param(
            _upstream("", "quay.io") + '[projects.a]\npath = "x"',
            "projects.a.path",
            "needs an upstream",
            id="path to nowhere",
        ),
        pytest.param(
            '[projects.a]\nmatch = "dockr.io/**"', "projects.a.match (entry 1)", "did you mean docker.io", id="match"
        ),
        pytest.param(
            '[projects.a]\nallow = ["**", "quay.io/**"]', "projects.a.allow (entry 2)", "matches nothing", id="allow"
        ),
        pytest.param(
            _upstream("pass_through = true") + f'[projects.a]\naccess = "ci"\n{ROBOT}',
            'upstreams."docker.io".pass_through',
            "and robots.ci exclude each other",
            id="robots and pass_through",
        ),
        pytest.param(
            _upstream("pass_through = true\nsealed = true"),
            'upstreams."docker.io".pass_through',
            "lets nobody ask docker.io",
            id="sealed and pass_through",
        ),
        pytest.param(
            "[server]\nsealed = true\n" + _upstream("pass_through = true"),
            'upstreams."docker.io".pass_through',
            "server.sealed lets nobody ask",
            id="all sealed and pass_through",
        ),
        pytest.param(
            _upstream("pass_through = true")
            + '[projects.a]\nupstream = "docker.io"\ncredentials = { username = "u", password = "p" }',
            "projects.a.credentials",
            "in the place of the client's own login",
            id="a project's credentials and pass_through",
        ),
        pytest.param('[projects.default]\npath = "x"', "projects.default.path", "no path", id="default's path"),
        pytest.param('[projects.default]\nmatch = "**"', "projects.default.match", "no match", id="default's match"),
        pytest.param(
            '[policy]\nunmatched = "deny"\n[projects.default]',
            "policy.unmatched",
            "never be asked",
            id="default denied",
        ),
    ],
)
def test_a_contradiction_is_a_problem(text: str, place: str, why: str) -> None:
    """Keys that are right one by one, and cannot be meant together."""
    found = problems_of(text)
    assert any(f": {place}: " in problem and why in problem for problem in found), found


def test_addresses_that_only_look_alike_may_stand_together() -> None:
    """The two families, other ports, and port 0 as often as one likes."""
    settings_of(
        '[server]\nlisten = ["127.0.0.1:1", "[::1]:1", "0.0.0.0:2", "[::]:2", "127.0.0.1:0", "127.0.0.1:0", "unix:/a"]'
    )


def test_a_deny_rule_may_name_a_registry_that_is_not_configured() -> None:
    """One list of what is withdrawn serves many mirrors, and denying what cannot be reached promises nothing false."""
    settings_of('[policy]\ndeny = ["quay.io/bad/**"]\n[projects.a]\ndeny = ["gcr.io/bad/**"]')


def test_the_built_in_default_upstream_is_none_where_docker_io_is_not_configured() -> None:
    """Only a default_upstream that somebody wrote can be wrong."""
    assert effective_default(settings_of(_upstream("", "quay.io"))) is None
    assert effective_default(settings_of("")) == SourceHost("docker.io")
    assert effective_default(settings_of('[server]\ndefault_upstream = ""')) is None


def test_a_wrong_value_is_not_reported_twice() -> None:
    """A password that is no text is one problem, not also a user name without a password."""
    assert problems_of(DOCKER + 'credentials = { username = "u", password = 5 }') == [
        'b.toml:3: upstreams."docker.io".credentials.password: expected text in quotes'
    ]


# -- the contract ------------------------------------------------------------------------------------------------------


def test_the_keys_of_the_contract_are_there() -> None:
    """product.md, Settings file: the names are a contract. Extended, never renamed."""
    contract = """
        server.listen server.admin_listen server.default_upstream server.sealed server.tls.cert server.tls.key
        server.tls.client_ca store.path store.capacity store.min_free upstreams.*.url upstreams.*.credentials.username
        upstreams.*.credentials.password_file upstreams.*.credentials.docker_config upstreams.*.credentials.helper
        upstreams.*.token_realms upstreams.*.tag_ttl upstreams.*.stale_if_error upstreams.*.allow_private upstreams.*.ca
        upstreams.*.client_cert upstreams.*.client_key upstreams.*.http_proxy upstreams.*.sealed projects.*.path
        projects.*.upstream projects.*.match projects.*.credentials projects.*.allow projects.*.deny projects.*.quota
        projects.*.on_full projects.*.access projects.*.immutable_tags policy.deny policy.unmatched robots.*.secret_hash
        robots.*.projects
    """
    known = {".".join(pattern) for pattern in every_key()}
    assert set(contract.split()) <= known


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (("upstreams", "docker.io", "url"), 'upstreams."docker.io".url'),
        (("server", "listen", 0), "server.listen (entry 1)"),
        (("a b", 'c"d', "e\nf"), '"a b"."c\\"d"."e\\nf"'),
        (("upstreams", "x", "url", 1, "credentials"), "upstreams.x.url (entry 2).credentials"),
    ],
)
def test_a_place_is_spelled_as_toml_writes_it(place: Any, text: str) -> None:
    """So that it can be searched for in the file."""
    assert spelled(place) == text


def test_a_layer_is_plain_data() -> None:
    """Whoever embeds Breakwater may lay their own values, with their own origin."""
    layer = Layer(
        {"store": {"path": "/x"}, "upstreams": {"x.y": {"url": "http://127.0.0.1:1"}}}, Origin("file", "mine")
    )
    assert str(read([layer]).written.origin_of(("store", "path"))) == "mine"
