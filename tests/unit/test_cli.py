"""The command line: what it prints, and how it ends. 0 done, 1 failed, 2 wrong usage or settings."""

import http.server
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import proxy
from proxy import settings_file
from proxy.cli import main
from proxy.cli.status_text import text_of

ANSWER = {
    "version": "0.1.0",
    "uptime_s": 93784.0,
    "sealed": False,
    "ready": "ready",
    "requests": {"hit": 123456, "coalesced": 12, "miss": 7, "stale": 0, "denied": 3, "failed": 0},
    "response_bytes": 3 * 2**30,
    "upstream_bytes": 5 * 2**20,
    "store": {
        "path": "/var/lib/breakwater",
        "used_bytes": 4 * 2**30,
        "reserved_bytes": 2**30,
        "capacity_bytes": 20 * 2**30,
        "blobs": 1234,
        "evicted_bytes": 0,
        "state": "ok",
    },
    "transfers": [
        {
            "digest": "sha256:" + "a" * 64,
            "upstream": "docker.io",
            "repository": "library/alpine",
            "received_bytes": 2**20,
            "size_bytes": None,
            "readers": 64,
            "age_s": 3.2,
        }
    ],
    "upstreams": {
        "docker.io": {"state": "failing", "last_error": "timed out\x1b[2J\n", "requests": 55, "failures": 3},
        "quay.io": {"state": "ok", "last_error": None, "requests": 1, "failures": 0},
    },
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, no file in /etc, no variables of ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings_file, "WELL_KNOWN_PLACES", (Path("breakwater.toml"),))
    return tmp_path


class Ended:
    """How a command ended and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


class Run:
    """Runs a command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["breakwater", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, printed.out, printed.err)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command: `run("settings", "--json")`."""
    return Run(capsys, monkeypatch)


# -- how it ends -------------------------------------------------------------------------------------------------------


def test_help_and_version_end_well(run: Run) -> None:
    """Commands that do not exist yet are not listed."""
    answer = run("--help")
    assert answer.code == 0
    listed = [line.split()[0] for line in answer.out.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == sorted(listed)
    assert {"hosts-toml", "robot", "serve", "settings", "status"} <= set(listed)
    assert run("--version").out == f"breakwater {proxy.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["serve", "--no-such-option"],
        ["serve", "--upstream", "docker.io"],
        ["serve", "--upstream", "=https://x"],
        ["serve", "stray"],
        ["status", "--admin-listen", "5001"],
        ["hosts-toml", "--client", "crane"],
        ["settings", "--config", "no-such-file"],
        ["hosts-toml", "no.such.upstream"],
        ["hosts-toml", "--project", "nobody"],
        ["hosts-toml", "--url", "ftp://x"],
        ["hosts-toml", "--url", "http://x/path"],
        ["serve", "--capacity", "much"],
        ["serve", "--log-level", "loud"],
    ],
    ids=" ".join,
)
def test_wrong_usage_and_wrong_settings_end_with_2_and_one_line(run: Run, arguments: list[str]) -> None:
    """One line on stderr that begins with our name; nothing on stdout, which may be a file by now."""
    ended = run(*arguments)
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("breakwater: ")


def test_every_problem_of_the_settings_is_a_line(run: Run, folder: Path) -> None:
    """All of them at once, as a compiler would."""
    (folder / "breakwater.toml").write_text('[server]\nseald = true\nsealed = "x"\n')
    ended = run("settings", "--check")
    assert ended.code == 2
    assert ended.err.splitlines() == [
        "breakwater: breakwater.toml:2: server.seald: unknown key; did you mean sealed?",
        "breakwater: breakwater.toml:3: server.sealed: expected true or false",
    ]


def test_no_command_at_all_is_wrong_usage_and_shows_the_help(run: Run) -> None:
    """Whoever types the bare name wants to know what there is."""
    ended = run()
    assert ended.code == 2
    assert "Commands:" in ended.err


def test_a_bug_of_ours_is_one_line_and_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the place, so that a report is of use."""

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(settings_file, "load", broken)
    ended = run("settings")
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert "internal error" in line and "ZeroDivisionError at test_cli.py:" in line


def test_help_imports_nothing_heavy() -> None:
    """Shell completion asks for it at every keystroke."""
    program = (
        "import sys, proxy.cli\n"
        "sys.argv = ['breakwater', '--help']\n"
        "try: proxy.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'pydantic', 'aiohttp', 'uvloop', 'asyncio', 'rich'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "[]\n"


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    """As the README says to set it up; what bash offers is what there is."""
    command = tmp_path / "breakwater"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m proxy "$@"\n')
    command.chmod(0o755)
    script = """
        eval "$(_BREAKWATER_COMPLETE=bash_source breakwater)"
        for words in "breakwater st" "breakwater hosts-toml --cl" "breakwater hosts-toml --client cr"; do
            COMP_WORDS=($words) COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
            _breakwater_completion breakwater
            echo "${COMPREPLY[@]}"
        done
    """
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, check=True, timeout=60)
    assert done.stdout.splitlines() == ["status", "--client", "crio"]


def test_a_reader_that_has_had_enough_is_no_error_to_talk_about() -> None:
    """`breakwater settings | head -1` must not print about a broken pipe."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m proxy settings | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.returncode in (0, 1)


# -- serve -------------------------------------------------------------------------------------------------------------


def test_serve_runs_with_the_effective_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options win, now and at every reload; the exit code is the one that the run returns."""
    from proxy import lifecycle

    served: list[Any] = []

    def serve(settings: Any, load: Any) -> int:
        assert load() == settings
        served.append(settings)
        return 0

    monkeypatch.setattr(lifecycle, "run", serve)
    options = (
        "--listen :1 --listen unix:/s --admin-listen 127.0.0.1:2 --store /srv --capacity 80% --sealed --log-level debug"
    )
    upstreams = "--upstream quay.io=http://a --upstream Quay.io=http://b"
    ended = run("serve", *options.split(), *upstreams.split()[:2])
    assert ended.code == 0
    (settings,) = served
    assert [str(address) for address in settings.server.listen] == [":1", "unix:/s"]
    assert (str(settings.server.admin_listen), settings.server.sealed) == ("127.0.0.1:2", True)
    assert (settings.store.path, settings.store.capacity.share, settings.log.level) == ("/srv", 0.8, "debug")
    quay = next(upstream for host, upstream in settings.upstreams.items() if host.value == "quay.io")
    assert [endpoint.url for endpoint in quay.url] == ["http://a"]
    assert run("serve", *upstreams.split()).code == 0
    quay = next(upstream for host, upstream in served[-1].upstreams.items() if host.value == "quay.io")
    assert [endpoint.url for endpoint in quay.url] == ["http://a", "http://b"]


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_prints_toml_and_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both for what is effective, each with its origins."""
    monkeypatch.setenv("BREAKWATER_SERVER__SEALED", "true")
    toml = run("settings").out
    assert tomllib.loads(toml)["server"]["sealed"] is True
    rows = json.loads(run("settings", "--json").out)["settings"]
    assert {"key": "server.sealed", "value": True, "origin": "$BREAKWATER_SERVER__SEALED"} in rows


def test_settings_check_is_silent_when_all_is_well(run: Run) -> None:
    """The exit code says it."""
    ended = run("settings", "--check")
    assert (ended.code, ended.out, ended.err) == (0, "", "")


def test_settings_reference_needs_no_right_settings(run: Run, folder: Path) -> None:
    """Whoever looks a key up may be in the middle of a broken file."""
    (folder / "breakwater.toml").write_text("[")
    assert run("settings", "--reference").out.startswith("#### `[server]`")


# -- status ------------------------------------------------------------------------------------------------------------


class _Admin(http.server.BaseHTTPRequestHandler):
    body = json.dumps(ANSWER).encode()
    status = 200

    def do_GET(self) -> None:
        assert self.path == "/api/v1/status"
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Not on the test's stderr."""

    def address_string(self) -> str:
        return "unix"


class _Nothing(_Admin):
    status = 404


class _Page(_Admin):
    body = b"<html>"


class _UnixServer(socketserver.UnixStreamServer):
    pass


@contextmanager
def listening(where: Any, handler: type[_Admin] = _Admin) -> Iterator[socketserver.BaseServer]:
    """An admin listener of ours, in a thread."""
    server = (_UnixServer if isinstance(where, str) else socketserver.TCPServer)(where, handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def port_of(server: socketserver.BaseServer) -> int:
    """The TCP port it was given."""
    address: Any = server.server_address
    return int(address[1])


def test_status_asks_the_admin_listener_of_the_settings(run: Run, folder: Path) -> None:
    """Over TCP and over a Unix socket; --json is the answer as it is."""
    with listening(("127.0.0.1", 0)) as server:
        (folder / "breakwater.toml").write_text(f'[server]\nadmin_listen = "127.0.0.1:{port_of(server)}"\n')
        assert json.loads(run("status", "--json").out) == ANSWER
        assert "123,456" in run("status").out
    with listening("s.sock"):
        (folder / "breakwater.toml").write_text(f'[server]\nadmin_listen = "unix:{folder}/s.sock"\n')
        assert json.loads(run("status", "--json").out) == ANSWER


@pytest.mark.parametrize("handler", [_Nothing, _Page])
def test_status_of_something_else_says_so(run: Run, handler: type[_Admin]) -> None:
    """Some other program may listen there."""
    with listening(("127.0.0.1", 0), handler) as server:
        ended = run("status", "--admin-listen", f":{port_of(server)}")
    assert ended.code == 1
    assert "is that the admin listener of a Breakwater?" in ended.err


def test_status_of_nothing_names_the_address(run: Run) -> None:
    """Most often it is not running, or with other settings."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else answers there
        port = taken.getsockname()[1]
        ended = run("status", "--admin-listen", f"127.0.0.1:{port}")
    assert ended.code == 1
    assert ended.err == (
        f"breakwater: no answer from 127.0.0.1:{port}: Connection refused; is it running, with these settings?\n"
    )
    assert "no answer from unix:" in run("status", "--admin-listen", "unix:/no/such/socket").err
    assert "--admin-listen" in run("status", "--admin-listen", ":0").err


def test_the_status_table_is_for_people() -> None:
    """Outcomes, bytes in sizes one can read, running transfers, upstreams, nothing that moves the cursor."""
    assert text_of(ANSWER).splitlines() == [
        "breakwater 0.1.0, ready, up 1 d 2 h",
        "",
        "    hit  coalesced  miss  stale  denied  failed",
        "123,456         12     7      0       3       0",
        "",
        "sent to clients     3.0 GiB",
        "from upstreams      5.0 MiB",
        "store               /var/lib/breakwater, ok",
        "  used              4.0 GiB + 1.0 GiB reserved of 20.0 GiB (25%)",
        "  blobs             1,234, evicted 0 B",
        "",
        "transfers running   1",
        "  digest               from                          received  readers  age",
        "  sha256:aaaaaaaaaaaa  docker.io/library/alpine  1.0 MiB of ?       64  3 s",
        "",
        "upstream   state    requests  failures  last error",
        "docker.io  failing        55         3  timed out�[2J",
        "quay.io    ok              1         0",
    ]


def test_the_status_table_stands_an_answer_of_another_version() -> None:
    """Missing parts are shown as unknown, never as a failure."""
    assert "breakwater ?, ?, up 0 s" in text_of({})


# -- hosts-toml --------------------------------------------------------------------------------------------------------

PROJECTS = """
[server]
listen = "10.0.0.1:5000"
[upstreams."docker.io"]
url = "https://registry-1.docker.io"
[upstreams."registry.test:5000"]
url = "http://registry.test:5000"
[projects.platform]
path = "plat"
upstream = "docker.io"
[projects.nopath]
"""


def test_hosts_toml_for_containerd(run: Run) -> None:
    """Each upstream's file: without `server`, containerd falls back to the registry itself (peers.md §5.1)."""
    text = run("hosts-toml", "docker.io").out
    assert text.startswith("# /etc/containerd/certs.d/docker.io/hosts.toml\n")
    assert tomllib.loads(text) == {"host": {"http://127.0.0.1:5000": {"capabilities": ["pull", "resolve"]}}}
    assert run("hosts-toml").out.count("hosts.toml\n") == 7


def test_hosts_toml_enforced_leaves_no_other_host(run: Run, folder: Path) -> None:
    """product.md: `--enforce` makes Breakwater the only host; a project is /v2/~name with override_path.

    containerd 1.6 goes to the registry itself when a file has a `server` and no [host] table, so both are written.
    """
    (folder / "breakwater.toml").write_text(PROJECTS)
    url, properties = "http://10.0.0.1:5000/v2/~platform", {"capabilities": ["pull", "resolve"], "override_path": True}
    text = run("hosts-toml", "--enforce", "--project", "platform", "docker.io").out
    assert tomllib.loads(text) == {"server": url, **properties, "host": {url: properties}}


@pytest.mark.parametrize("client", ["podman", "crio"])
def test_hosts_toml_for_podman_and_crio(run: Run, folder: Path, client: str) -> None:
    """They send no ns, so the source host leads the path; what they cannot name is a comment."""
    (folder / "breakwater.toml").write_text(PROJECTS)
    text = run("hosts-toml", "--client", client, "--url", "https://mirror.test").out
    mirror = {"location": "mirror.test/docker.io"}
    assert tomllib.loads(text) == {"registry": [{"prefix": "docker.io", "location": "docker.io", "mirror": [mirror]}]}
    assert "# registry.test:5000: " in text
    enforced = run("hosts-toml", "--client", client, "--enforce", "--project", "platform", "docker.io").out
    location = {"prefix": "docker.io", "location": "10.0.0.1:5000/plat", "insecure": True}
    assert tomllib.loads(enforced) == {"registry": [location]}


def test_hosts_toml_for_docker(run: Run) -> None:
    """Docker mirrors Docker Hub alone, at the root."""
    assert json.loads(run("hosts-toml", "--client", "docker").out) == {"registry-mirrors": ["http://127.0.0.1:5000"]}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--client docker --enforce", "always falls back"),
        ("--client docker --project platform", "no path"),
        ("--client podman registry.test:5000", "no colon"),
        ("--client podman --project nopath docker.io", "no ~"),
        ("--client podman --project platform registry.test:5000", "leads to docker.io"),
    ],
)
def test_what_a_client_cannot_be_told_is_refused_with_the_reason(
    run: Run, folder: Path, arguments: str, why: str
) -> None:
    """A file that does something else than what was asked for would be worse."""
    (folder / "breakwater.toml").write_text(PROJECTS)
    ended = run("hosts-toml", *arguments.split())
    assert (ended.code, ended.out) == (1, "")
    assert why in ended.err


def test_a_mirror_on_a_socket_alone_needs_a_url(run: Run, folder: Path) -> None:
    """No client speaks to a registry over a Unix socket."""
    (folder / "breakwater.toml").write_text('[server]\nlisten = "unix:/run/b.sock"\n')
    assert "write --url" in run("hosts-toml").err
    assert "https://m.test" in run("hosts-toml", "--url", "https://m.test", "docker.io").out
