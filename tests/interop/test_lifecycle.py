"""The life of a process, seen from outside: sockets handed to it, what it tells its service manager, signals.

What a real service manager makes of it is test_systemd.py's; here the test is the service manager.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.interop.conftest import upstreams_at
from tests.support.clients import TEST_HOST
from tests.support.crowd import Visit, visit_all
from tests.support.images import MIB, digest_of, image
from tests.support.load import Load
from tests.support.origin import Origin
from tests.support.process import START_S, Breakwater, eventually, fetched, to_toml
from tests.support.relay import Relay

_SEED = count(7000)


def _blob(n_bytes: int) -> bytes:
    return random.Random(next(_SEED)).randbytes(n_bytes)


def _path(digest: str) -> str:
    return f"/v2/library/held/blobs/{digest}"


def _is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        return False  # in the kernel's queue, accepted by nobody, when the listener was closed: the next one tells
    return False


@contextmanager
def _asked_slowly(port: int, path: str) -> Iterator[socket.socket]:
    """A client that has asked, has its first bytes, and reads no further: its answer is running."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    client.settimeout(START_S)
    with client:
        client.connect(("127.0.0.1", port))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.recv(12) == b"HTTP/1.1 200"
        yield client


def _rest_of(client: socket.socket) -> bytes:
    """What comes until the connection ends, without the headers."""
    whole = bytearray()
    while piece := client.recv(MIB):
        whole += piece
    return bytes(whole.partition(b"\r\n\r\n")[2])


class Manager:
    """The service manager's end of sd_notify(3): keeps every message, in order."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / f"notify-{next(_SEED)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.address))
        self._socket.setblocking(False)
        self._heard: list[str] = []

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def heard(self) -> list[str]:
        """Everything so far."""
        while True:
            try:
                self._heard.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return self._heard

    def n(self, line: str) -> int:
        """How many messages have this line."""
        return sum(line in message.split("\n") for message in self.heard())


# -- sockets handed over -----------------------------------------------------------------------------------------------


def _hand_over(breakwater: Breakwater, sockets: dict[str, socket.socket]) -> None:
    """Have it started as systemd would: these sockets as descriptors from 3 on, by name (sd_listen_fds(3))."""
    numbers = [each.fileno() for each in sockets.values()]
    # Through high numbers, because one of ours may be what another is to become.
    moves = "".join(f"exec {90 + i}<&{was};" for i, was in enumerate(numbers))
    moves += "".join(f"exec {3 + i}<&{90 + i} {90 + i}<&-;" for i in range(len(numbers)))
    script = f'{moves} LISTEN_PID=$$ LISTEN_FDS={len(numbers)} LISTEN_FDNAMES={":".join(sockets)} exec "$@"'
    breakwater.command[-6:-6] = ["bash", "-c", script, "bash"]
    breakwater.pass_fds = numbers


def test_handed_sockets_are_served_and_a_restart_refuses_nobody(scratch: Path, origin: Origin) -> None:
    """Connections wait in the kernel's queue while the process changes; data and admin sockets are told apart."""
    content = _blob(100_000)
    digest = origin.push_blob("library/held", content)
    breakwater = Breakwater(scratch / "handed", upstreams_at(origin.url))
    with (
        socket.create_server(("127.0.0.1", breakwater.port), backlog=1000) as data,
        socket.create_server(("127.0.0.1", breakwater.admin_port)) as admin,
    ):
        _hand_over(breakwater, {"breakwater": data, "admin": admin})
        with breakwater:
            assert breakwater.admin("/readyz")["status"] == "ready"
            assert fetched(breakwater.port, "/metrics")[0] == 404, "nothing of the admin listener is on the data port"
            with Load(breakwater.port, _path(digest), digest, keep_alive=False) as load:
                for _ in range(5):
                    assert breakwater.stop() == 0
                    breakwater.start()
            assert load.failures == []
            assert load.n_answers > 20
            breakwater.stop_cleanly()


# -- what the service manager is told ----------------------------------------------------------------------------------


def test_the_service_manager_is_told_everything(scratch: Path, origin: Origin) -> None:
    """sd_notify(3): READY once it serves, RELOADING with its instant and READY after it, STOPPING; a status throughout.

    The watchdog is fed although no upstream answers: a restart would mend nothing.
    """
    nobody = "http://127.0.0.1:1"
    with Manager(scratch) as manager:
        env = {"NOTIFY_SOCKET": str(manager.address), "WATCHDOG_USEC": "300000"}
        with Breakwater(scratch / "notified", upstreams_at(nobody), env) as breakwater:
            eventually(lambda: manager.n("READY=1") == 1, "READY was sent")
            assert re.search(rf"^STATUS=ready, on 127\.0\.0\.1:{breakwater.port}$", manager.heard()[0], re.MULTILINE)
            assert fetched(breakwater.port, "/v2/library/x/manifests/1")[0] == 502
            fed = manager.n("WATCHDOG=1")
            eventually(lambda: manager.n("WATCHDOG=1") > fed + 3, "the watchdog is fed while upstream is down")
            eventually(
                lambda: any("upstreams failing: docker.io" in message for message in manager.heard()),
                "the status says what is wrong",
            )
            breakwater.signal(signal.SIGHUP)
            eventually(lambda: manager.n("READY=1") == 2, "a reload ends with READY")
            (reloading,) = (message for message in manager.heard() if "RELOADING=1" in message)
            assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)
            breakwater.stop_cleanly()
            assert manager.n("STOPPING=1") == 1


def test_without_a_loop_that_turns_nothing_is_fed(scratch: Path, origin: Origin) -> None:
    """The watchdog is fed by the loop alone: a process that stands still says nothing, and is restarted."""
    with Manager(scratch) as manager:
        env = {"NOTIFY_SOCKET": str(manager.address), "WATCHDOG_USEC": "150000"}
        with Breakwater(scratch / "still", upstreams_at(origin.url), env) as breakwater:
            eventually(lambda: manager.n("WATCHDOG=1") > 2, "it is fed")
            breakwater.signal(signal.SIGSTOP)
            eventually(lambda: " T " in Path(f"/proc/{breakwater.pid}/stat").read_text(), "it stands still")
            fed = manager.n("WATCHDOG=1")
            time.sleep(0.5)  # many times its period
            assert manager.n("WATCHDOG=1") == fed
            breakwater.signal(signal.SIGCONT)
            eventually(lambda: manager.n("WATCHDOG=1") > fed, "it goes on")


# -- SIGTERM -----------------------------------------------------------------------------------------------------------


def test_sigterm_truncates_no_running_download(scratch: Path, origin: Origin) -> None:
    """Readiness fails, nobody new is accepted, answers that run are finished, from disk and from upstream; exit 0."""
    warm, cold = _blob(6 * MIB), _blob(6 * MIB)
    warm_digest, cold_digest = (origin.push_blob("library/held", each) for each in (warm, cold))
    with Relay(origin.port, hold_back=MIB, holds=lambda target: cold_digest in target) as relay:
        with Breakwater(scratch / "term", upstreams_at(relay.url)) as breakwater:
            assert fetched(breakwater.port, _path(warm_digest)) == (200, warm)
            visits = [Visit(_path(cold_digest)) for _ in range(20)]
            readers = threading.Thread(target=visit_all, args=(breakwater.port, visits))
            with _asked_slowly(breakwater.port, _path(warm_digest)) as slow:
                readers.start()
                eventually(lambda: all(visit.n_bytes for visit in visits), "all of them read")
                breakwater.signal(signal.SIGTERM)
                eventually(lambda: _is_refused(breakwater.port), "nobody new is accepted")
                connection = http.client.HTTPConnection("127.0.0.1", breakwater.admin_port, timeout=START_S)
                connection.request("GET", "/readyz")
                answer = connection.getresponse()
                assert (answer.status, json.loads(answer.read())["status"]) == (503, "stopping")
                connection.close()
                assert breakwater.is_running
                relay.release()
                readers.join()
                assert digest_of(_rest_of(slow)) == warm_digest
            assert breakwater.wait() == 0
            breakwater.assert_log_is_clean()
        assert [visit.digest for visit in visits] == [cold_digest] * len(visits)


def test_a_second_sigterm_hurries(scratch: Path, origin: Origin) -> None:
    """A client that reads no further holds up the end for `shutdown_grace`; an operator need not wait for it."""
    digest = origin.push_blob("library/held", _blob(20 * MIB))
    settings = upstreams_at(origin.url)
    settings["server"]["shutdown_grace"] = "1h"
    with Breakwater(scratch / "hurry", settings) as breakwater:
        assert fetched(breakwater.port, _path(digest))[0] == 200
        with _asked_slowly(breakwater.port, _path(digest)) as slow:
            breakwater.signal(signal.SIGTERM)
            eventually(lambda: _is_refused(breakwater.port), "it is stopping")
            assert breakwater.is_running
            breakwater.signal(signal.SIGTERM)
            assert breakwater.wait() == 0
            assert len(_rest_of(slow)) < 20 * MIB, "cut, and never ended as if it were whole"
        breakwater.assert_log_is_clean()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_transfer_goes_on_where_an_earlier_run_was_ended(scratch: Path, origin: Origin, end: signal.Signals) -> None:
    """What had arrived is not fetched again: the next run asks upstream for the rest alone, and the whole is right."""
    content = _blob(20 * MIB)  # less than 16 MiB would not be worth it
    digest = origin.push_blob("library/held", content)
    settings = upstreams_at("")
    settings["server"]["shutdown_grace"] = "0s"
    with Relay(origin.port, hold_back=MIB, holds=lambda target: digest in target) as relay:
        for host in settings["upstreams"].values():
            host["url"] = relay.url
        with Breakwater(scratch / f"goes-on-{end.name}", settings) as breakwater:
            visits = [Visit(_path(digest))]
            reader = threading.Thread(target=visit_all, args=(breakwater.port, visits))
            reader.start()
            eventually(lambda: visits[0].n_bytes > 18 * MIB, "most of it is here")
            breakwater.signal(end)
            breakwater.wait()
            reader.join()
            relay.release()
            breakwater.start()
            before = breakwater.status()["upstream_bytes"]
            assert fetched(breakwater.port, _path(digest)) == (200, content)
            assert breakwater.status()["upstream_bytes"] - before < 3 * MIB
            left = [path for path in breakwater.store.rglob("ingest/*") if path.is_file()]
            assert left == [], "what was gone on with has its name"
            breakwater.stop_cleanly()


# -- SIGHUP ------------------------------------------------------------------------------------------------------------


def _rewrite(breakwater: Breakwater, settings: dict[str, Any]) -> None:
    text = breakwater.settings_path.read_text()
    head = text[: text.index('["upstreams"')] if "upstreams" in text else text
    breakwater.settings_path.write_text(head + to_toml(settings))


def _reload(breakwater: Breakwater) -> str:
    """SIGHUP, then what the log says of it."""
    n_before = breakwater.log().count("reload: ")
    breakwater.signal(signal.SIGHUP)
    eventually(lambda: breakwater.log().count("reload: ") > n_before, "the reload is over")
    return breakwater.log().split("reload: ", n_before + 1)[-1]


def _upstreams(**urls: str) -> dict[str, Any]:
    return {"upstreams": {name.replace("_", "."): {"url": url} for name, url in urls.items()}}


def test_reloads_under_load_fail_no_request(scratch: Path, origin: Origin) -> None:
    """Valid, invalid and half-written files in turn: each answer is one of old or new settings, and all are right."""
    wanted = origin.push("library/loaded", "1", image(next(_SEED), (100_000,)))
    with Breakwater(scratch / "load", upstreams_at(origin.url)) as breakwater:
        contents = breakwater.settings_path.read_text()
        turns = [contents, contents + "\n[projects.a]\nmatch = ['docker.io/x']\n", contents + "\nbroken", contents[:-9]]
        with Load(breakwater.port, "/v2/library/loaded/manifests/1", wanted.digest) as load:
            for turn in range(40):
                breakwater.settings_path.write_text(turns[turn % len(turns)])
                _reload(breakwater)
        assert load.failures == []
        assert load.n_answers > 100
        breakwater.stop_cleanly()


def test_a_reload_takes_up_what_was_written(scratch: Path, origin: Origin) -> None:
    """Upstreams, rules and the log's level are new; a body that is on its way ends as it began."""
    content = _blob(6 * MIB)
    digest = origin.push_blob("library/held", content)
    origin.push("team/app", "1", image(next(_SEED), (1000,)))
    origin.push("library/ruled", "1", image(next(_SEED), (1000,)))
    with Relay(origin.port, hold_back=MIB, holds=lambda target: digest in target) as relay:
        with Breakwater(scratch / "taken-up", upstreams_at(relay.url)) as breakwater:
            visits = [Visit(_path(digest))]
            reader = threading.Thread(target=visit_all, args=(breakwater.port, visits))
            reader.start()
            eventually(lambda: visits[0].n_bytes, "it reads")
            assert fetched(breakwater.port, "/v2/new.example/team/app/manifests/1")[0] == 404
            for _ in range(3):
                assert fetched(breakwater.port, "/v2/library/ruled/manifests/1")[0] == 200
            rules = {"projects": {"default": {"deny": ["docker.io/library/**"]}}}
            _rewrite(breakwater, _upstreams(docker_io=origin.url, new_example=origin.url) | rules)
            assert "taken up" in _reload(breakwater)
            assert fetched(breakwater.port, "/v2/new.example/team/app/manifests/1")[0] == 200
            assert fetched(breakwater.port, _path(digest))[0] == 403
            assert fetched(breakwater.port, "/v2/library/ruled/manifests/1")[0] == 403, "however often it was answered"
            assert fetched(breakwater.port, f"/v2/{TEST_HOST}/team/app/manifests/1")[0] == 404
            relay.release()
            reader.join()
            assert visits[0].digest == digest
            breakwater.stop_cleanly()


def _post_reload(breakwater: Breakwater) -> tuple[int, dict[str, Any]]:
    """`POST /api/v1/reload`, as an operator's program does it."""
    token = (breakwater.store / "breakwater" / "admin-token").read_text().strip()
    connection = http.client.HTTPConnection("127.0.0.1", breakwater.admin_port, timeout=START_S)
    try:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection.request("POST", "/api/v1/reload", "{}", headers)
        answer = connection.getresponse()
        document: dict[str, Any] = json.loads(answer.read())
        return answer.status, document
    finally:
        connection.close()


@pytest.mark.parametrize("way", ["SIGHUP", "admin API"])
def test_a_digest_that_is_blocked_now_is_blocked_for_running_transfers_new_readers(
    scratch: Path, origin: Origin, way: str
) -> None:
    """ "Block this digest now": who reads already reads on, nobody else begins, by blob, range or manifest, and the audit
    log has the change. A broken file changes nothing and says where it is broken."""
    wanted = image(next(_SEED), (3 * MIB,))
    name = f"library/blocked-{next(_SEED)}"
    origin.push(name, "1", wanted)
    layer = wanted.blobs[1].digest
    paths = [f"/v2/{name}/blobs/{layer}", f"/v2/{name}/manifests/1", f"/v2/{name}/manifests/{wanted.digest}"]
    with Relay(origin.port, hold_back=MIB, holds=lambda target: layer in target) as relay:
        with Breakwater(scratch / f"block-{next(_SEED)}", upstreams_at(relay.url)) as breakwater:
            assert fetched(breakwater.port, paths[1])[0] == 200
            visits = [Visit(paths[0])]
            reader = threading.Thread(target=visit_all, args=(breakwater.port, visits))
            reader.start()
            eventually(lambda: visits[0].n_bytes, "it reads")
            text = breakwater.settings_path.read_text()

            breakwater.settings_path.write_text(text + '\n[policy]\nunmatchd = "deny"\n')
            if way == "SIGHUP":
                said = _reload(breakwater)
            else:
                status, answer = _post_reload(breakwater)
                said = answer["error"]
                assert status == 400
            assert "nothing was changed" in said and "policy.unmatchd" in said and "breakwater.toml:" in said
            assert fetched(breakwater.port, paths[1])[0] == 200

            breakwater.settings_path.write_text(text + f'\n[policy]\ndeny = ["{layer}"]\n')
            if way == "SIGHUP":
                assert "taken up" in _reload(breakwater)
            else:
                assert _post_reload(breakwater) == (200, {"waiting": []})
            for path in paths:
                status, body = fetched(breakwater.port, path)
                assert status == 403 and layer in body.decode(), path
            relay.release()
            reader.join()
            assert visits[0].digest == layer, "what had begun ends whole"
            assert fetched(breakwater.port, paths[0])[0] == 403
            audit = breakwater.store / "breakwater" / "audit" / "audit.jsonl"
            # A thread of its own gathers lines before it writes them, so an answer may be here before its line is.
            n_denied = len(paths) + 1
            eventually(
                lambda: audit.read_text().count(f'"rule": "{layer}"') == n_denied, "the audit log has each refusal"
            )
            assert audit.read_text().count('"what": "rules"') == 1, "and the change, which came before them"
            breakwater.stop_cleanly()


def test_what_cannot_change_is_said_and_a_mistake_changes_nothing(scratch: Path, origin: Origin) -> None:
    """One line names the keys that wait for the next start; a file with a mistake is refused whole, with its reason."""
    origin.push("team/app", "1", image(next(_SEED), (1000,)))
    with Breakwater(scratch / "held-back", upstreams_at(origin.url)) as breakwater:
        text = breakwater.settings_path.read_text()
        breakwater.settings_path.write_text(text.replace(f":{breakwater.port}", ":1").replace("8GiB", "9GiB"))
        assert _reload(breakwater).partition("next start only: ")[2].startswith('server.listen, store.capacity"')
        assert fetched(breakwater.port, "/v2/team/app/manifests/1")[0] == 200
        assert "breakwater_reload_successful 1.0" in breakwater.admin("/metrics")

        breakwater.settings_path.write_text(text.replace('["upstreams"', '["upstream"'))
        assert "nothing was changed" in _reload(breakwater)
        assert fetched(breakwater.port, "/v2/team/app/manifests/1")[0] == 200
        assert "breakwater_reload_successful 0.0" in breakwater.admin("/metrics")
        breakwater.settings_path.write_text(text)
        _reload(breakwater)
        assert "breakwater_reload_successful 1.0" in breakwater.admin("/metrics")
        breakwater.stop_cleanly()


def test_another_certificate_is_shown_and_no_connection_is_dropped(scratch: Path, origin: Origin) -> None:
    """The live context takes the new pair; a pair that does not match leaves the old one in use."""
    folder = scratch / "tls"
    folder.mkdir()
    authority = trustme.CA()
    first, second = (authority.issue_cert("127.0.0.1") for _ in range(2))
    cert, key = folder / "cert.pem", folder / "key.pem"

    def write(pair: trustme.LeafCert, its_key: trustme.LeafCert) -> None:
        cert.write_bytes(b"".join(pem.bytes() for pem in pair.cert_chain_pems))
        key.write_bytes(its_key.private_key_pem.bytes())

    trust = ssl.create_default_context()
    authority.configure_trust(trust)

    def connect() -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection("127.0.0.1", breakwater.port, timeout=START_S, context=trust)
        connection.connect()
        return connection

    def shown(connection: http.client.HTTPSConnection) -> bytes:
        assert isinstance(connection.sock, ssl.SSLSocket)
        return ssl.DER_cert_to_PEM_cert(connection.sock.getpeercert(binary_form=True) or b"").encode()

    write(first, first)
    settings = upstreams_at(origin.url)
    settings["server"]["tls"] = {"cert": str(cert), "key": str(key)}
    breakwater = Breakwater(folder, settings)
    breakwater.is_ready = lambda: "Breakwater " in breakwater.log()  # type: ignore[method-assign]  # it speaks TLS
    with breakwater:
        old = connect()
        for pair, its_key, expected in ((second, second, second), (first, second, second)):
            write(pair, its_key)
            _reload(breakwater)
            new = connect()
            assert shown(new) in expected.cert_chain_pems[0].bytes()
            new.close()
        old.request("GET", "/v2/")
        assert old.getresponse().status == 200
        old.close()
        assert breakwater.stop() == 0


def test_credentials_files_are_read_again(scratch: Path, origin: Origin) -> None:
    """A rotated password is used from the reload on; an unreadable file changes nothing and is named."""
    secret = scratch / "secret"
    secret.write_text("one\n")
    upstreams = upstreams_at(origin.url, credentials={"username": "me", "password_file": str(secret)})
    with Breakwater(scratch / "rotated", upstreams) as breakwater:
        assert "taken up" in _reload(breakwater)
        secret.unlink()
        said = _reload(breakwater)
        assert "nothing was changed" in said and str(secret) in said
        secret.write_text("two\n")
        assert "taken up" in _reload(breakwater)
        breakwater.stop_cleanly()


# -- a start that comes to nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"server": {"listne": "x"}}, 2, "server.listne"),
        ({"upstreams": {"a.example": {"url": "https://a.example", "ca": "/nowhere/ca.pem"}}}, 2, "/nowhere/ca.pem"),
        ({"store": {"path": "/proc/breakwater"}}, 1, "cannot start"),
    ],
    ids=["an unknown key", "a file that is not there", "a store that cannot be"],
)
def test_a_start_that_fails_says_why_and_how(scratch: Path, settings: dict[str, Any], code: int, says: str) -> None:
    """product.md, exit codes: 2 for wrong settings, files that they name included, 1 for what the machine refuses."""
    breakwater = Breakwater(scratch / f"fails-{next(_SEED)}", settings)
    ended = subprocess.run(
        [sys.executable, "-m", "proxy", "serve", "--config", str(breakwater.settings_path)],
        capture_output=True,
        env={**os.environ, "BREAKWATER_CONFIG": ""},
        timeout=START_S,
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr.decode()
    assert b"Traceback" not in ended.stderr
