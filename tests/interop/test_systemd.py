"""Installed as systemd/README.md says, on a host whose PID 1 is a real systemd.

A hundred restarts are a minute's work: `make soak` has them, and every run has a few.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.interop.conftest import upstreams_at
from tests.support import ports
from tests.support.clients import TEST_HOST, Skopeo
from tests.support.images import Image, image
from tests.support.load import Load
from tests.support.origin import Origin
from tests.support.process import eventually, fetched, run, to_toml
from tests.support.systemd import REPOSITORY, SystemdHost

_SEED = count(8000)
N_RELOADS = 100

UNITS = REPOSITORY / "systemd"
#: A client that is refused goes elsewhere at once; one in a queue nobody serves hangs for its own patience.
CLOSED_WITHIN_S = 10
#: What a small disk has free before somebody fills it.
ROOM_BYTES = 32 << 20


def commands(heading: str) -> list[str]:
    """The shell of one section of systemd/README.md, block by block."""
    text = (UNITS / "README.md").read_text()
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, f"systemd/README.md has no section {heading!r}"
    return re.findall(r"^```sh\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)


def upstream_of(settings: str) -> str:
    """The address of the upstreams of a settings file."""
    found = re.search(r'"url" = "([^"]+)"', settings)
    assert found is not None
    return found[1]


class Installed:
    """Breakwater on a host of its own, on ports of our choice."""

    def __init__(self, host: SystemdHost, origin: Origin) -> None:
        self.host = host
        self.port, self.admin_port = ports.take(), ports.take()
        files, start = commands("Install")
        host.run(f"set -e; {files}", timeout_s=300)
        settings = upstreams_at(origin.url)
        settings["server"] |= {"listen": f"127.0.0.1:{self.port}", "admin_listen": f"127.0.0.1:{self.admin_port}"}
        settings["store"] = {"path": "/var/lib/breakwater", "capacity": "1GiB", "min_free": "1%"}
        # The journal takes some ten thousand lines of a unit in half a minute and drops the rest, whatever they say:
        # with a line for each request of a load it is chance whether those that tests look for are among them.
        settings["server"]["request_log"] = "errors"
        self.settings = to_toml(settings)
        self.write(self.settings)
        listen = f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{self.port}\n"
        self.drop_in("breakwater.socket", "port", listen)
        host.run(f"set -e; {start}")

    def write(self, settings: str) -> None:
        """Replace the settings file."""
        self.host.run(f"cat > /etc/breakwater/breakwater.toml <<'END'\n{settings}\nEND")

    def drop_in(self, unit: str, name: str, text: str) -> None:
        """Change a unit as `systemctl edit` does; "" takes the change back."""
        path = f"/run/systemd/system/{unit}.d/{name}.conf"
        if text:
            self.host.run(f"mkdir -p {os.path.dirname(path)}; cat > {path} <<'END'\n{text}\nEND")
        else:
            self.host.run(f"rm {path}")
        self.host.run("systemctl daemon-reload")

    def show(self, unit: str, what: str) -> str:
        """A property of a unit."""
        return self.host.run(f"systemctl show --value -p {what} {unit}")

    def is_refused(self) -> bool:
        """Whether a client is turned away at once: refused, or reset out of a queue that is closing."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except (ConnectionRefusedError, ConnectionResetError):
            return True
        return False

    def ask(self, path: str) -> int:
        """The status that a client gets."""
        return fetched(self.port, path)[0]

    def answers(self) -> bool:
        """Whether a client is answered."""
        return self.ask("/v2/") == 200

    def ready(self) -> str:
        """What /readyz says, always with 200: it can serve something."""
        status, body = fetched(self.admin_port, "/readyz")
        assert status == 200, body
        return body.decode()


@pytest.fixture(scope="module")
def host() -> Iterator[SystemdHost]:
    """One host for the module, booted once."""
    with SystemdHost() as running:
        yield running


@pytest.fixture(scope="module")
def installed(host: SystemdHost, origin: Origin) -> Installed:
    """Breakwater, installed and started on it."""
    return Installed(host, origin)


@pytest.fixture(scope="module")
def pushed(origin: Origin) -> Image:
    """An image to pull."""
    return origin.push("library/app", "1", image(next(_SEED), (100_000,)))


def test_the_unit_is_hardened() -> None:
    """`systemd-analyze security`: an exposure of 2.0 or less."""
    run(["systemd-analyze", "security", "--offline=true", "--threshold=20", str(UNITS / "breakwater.service")])


def test_it_is_installed_as_the_readme_says_and_the_units_are_clean(host: SystemdHost, installed: Installed) -> None:
    """READY comes once it serves; it runs as its own user on systemd's socket; `systemd-analyze verify` is silent."""
    units = "breakwater.service breakwater.socket breakwater-down.target"
    assert host.run(f"systemd-analyze verify {units}") == ""
    assert installed.show("breakwater.service", "ActiveState") == "active"
    assert host.run("ps -o user= -p $(systemctl show --value -p MainPID breakwater)") == "breakwater"
    assert host.run("stat -c %U:%a /var/lib/breakwater") == "breakwater:750"
    assert f"ready, on 127.0.0.1:{installed.port}" in installed.show("breakwater.service", "StatusText")
    assert installed.show("breakwater.service", "LoadCredential") != ""
    assert host.run("systemctl --failed --plain --no-legend") == ""


def test_a_client_pulls(scratch: Path, installed: Installed, pushed: Image) -> None:
    """Nothing in the sandbox stands in the way of a pull."""
    with Skopeo(scratch / "skopeo", f"127.0.0.1:{installed.port}") as client:
        assert client.pull("library/app", "1") == pushed.digest


def test_reloads_fail_no_request(installed: Installed, pushed: Image) -> None:
    """`systemctl reload`, a hundred times under load, and each is taken up.

    It sends a signal and may return before the process has heard it: a second signal would then be one with the first,
    rightly, so the next one waits for the line in the log.
    """
    n_logged = "journalctl -u breakwater -o cat | grep -c 'reload: settings'"
    before = int(installed.host.run(f"{n_logged} || true"))
    with Load(installed.port, "/v2/library/app/manifests/1", pushed.digest) as load:
        taken_up = f"until [ $({n_logged}) -ge $(({before} + i)) ]; do sleep 0.01; done"
        installed.host.run(
            f"for i in $(seq {N_RELOADS}); do systemctl reload breakwater || exit 1; {taken_up}; done", timeout_s=150
        )
    assert load.failures == []
    assert load.n_answers > N_RELOADS
    assert int(installed.host.run(n_logged)) == before + N_RELOADS


def test_what_the_unit_prepares_is_used(installed: Installed) -> None:
    """A secret that root alone can read reaches the service (LoadCredential); the admin socket lies in its
    RuntimeDirectory, for its user and group; and nothing of it waits for the network.
    """
    host = installed.host
    waits_for = host.run("systemctl show -p After -p Wants -p Requires breakwater.service breakwater.socket")
    assert "network-online" not in waits_for
    host.run("umask 077; echo secret > /etc/breakwater/secrets/hub")
    password = "/run/credentials/breakwater.service/secrets_hub"
    credentials = f'"credentials" = {{ username = "me", password_file = "{password}" }}'
    settings = re.sub(r'^("url" = .*)$', rf"\1\n{credentials}", installed.settings, flags=re.MULTILINE)
    socket_path = "/run/breakwater/admin.sock"
    installed.write(settings.replace(f"127.0.0.1:{installed.admin_port}", f"unix:{socket_path}"))
    try:
        host.run("systemctl reset-failed breakwater; systemctl restart breakwater")
        assert installed.answers(), "a password file that cannot be read would have ended the start"
        assert host.run(f"stat -c %U:%G:%a {socket_path}") == "breakwater:breakwater:660"
        said = host.run("/opt/breakwater/bin/breakwater status --json")
        assert json.loads(said)["ready"] == "ready"
    finally:
        installed.write(installed.settings)
        host.run("systemctl reset-failed breakwater; systemctl restart breakwater")


def test_what_the_dashboard_is_made_of_is_installed(installed: Installed) -> None:
    """Templates, styles and scripts are in the wheel that `pip install .` makes, not in the checkout alone."""
    status, page = fetched(installed.admin_port, "/")
    assert status == 200 and b"Overview" in page
    files = re.findall(r'(?:href|src)="(/static/[^"]+)"', page.decode())
    assert {name.rpartition("?")[0].rpartition(".")[2] for name in files} == {"css", "js", "svg"}
    assert {fetched(installed.admin_port, name)[0] for name in files} == {200}


@pytest.mark.parametrize("n_restarts", [6, pytest.param(100, marks=pytest.mark.soak)])
def test_restarts_refuse_no_connection(installed: Installed, pushed: Image, n_restarts: int) -> None:
    """Under socket activation whoever comes while it restarts waits a moment and is answered.

    `reset-failed` because systemd counts an operator's restarts, too, and a hundred in a row are no operator's.
    """
    restart = "systemctl reset-failed breakwater; systemctl restart breakwater || exit 1"
    with Load(installed.port, "/v2/library/app/manifests/1", pushed.digest, keep_alive=False) as load:
        installed.host.run(f"for i in $(seq {n_restarts}); do {restart}; done", timeout_s=600)
    assert load.failures == []
    assert load.n_answers > n_restarts


#: Python reads this at every start. The signal's handler runs in the loop's thread, between two callbacks, and stays.
_BLOCK = "import signal, time; signal.signal(signal.SIGUSR2, lambda *_: time.sleep(3600))"


@pytest.fixture
def watched(installed: Installed) -> Iterator[Installed]:
    """With a watchdog that has little patience, and the means to block the loop, which the product has not."""
    installed.host.run(f"mkdir -p /opt/fault; echo '{_BLOCK}' > /opt/fault/sitecustomize.py")
    fault = "Environment=PYTHONPATH=/opt/fault"
    installed.drop_in("breakwater.service", "watchdog", f"[Service]\nWatchdogSec=1s\nTimeoutAbortSec=1s\n{fault}\n")
    installed.host.run("systemctl reset-failed breakwater; systemctl restart breakwater")
    yield installed
    installed.drop_in("breakwater.service", "watchdog", "")
    installed.write(installed.settings)
    installed.host.run("systemctl reset-failed breakwater; systemctl restart breakwater")


def test_a_blocked_loop_is_restarted_by_the_watchdog(watched: Installed) -> None:
    """The process lives, its other threads run, and nothing is fed: it is replaced, and the socket stays open."""
    host = watched.host
    was = watched.show("breakwater.service", "MainPID")
    host.run(f"kill -USR2 {was}")
    eventually(lambda: watched.show("breakwater.service", "MainPID") not in ("0", was), "another process runs")
    assert watched.answers()
    assert "watchdog timeout" in host.run("journalctl -u breakwater -o cat --no-pager | tail -40").lower()


def test_a_full_disk_and_a_lost_upstream_restart_nothing(watched: Installed, pushed: Image) -> None:
    """They show in /readyz, with 200, and in `systemctl status`; the watchdog is fed, and what is cached is served.

    It is somebody else who fills the disk, to the last byte, and what is cached is pinned: otherwise it is evicted, that
    may be room enough, and then the disk is rightly not full.
    """
    host, store, reference = watched.host, "/var/lib/breakwater", f"{TEST_HOST}/library/app:1"
    host.run(f"/opt/breakwater/bin/breakwater prefetch --pin {reference}")
    watched.write(watched.settings.replace(upstream_of(watched.settings), f"http://127.0.0.1:{ports.take()}"))
    host.run("systemctl reset-failed breakwater; systemctl restart breakwater")
    was = watched.show("breakwater.service", "MainPID")
    host.run(f"mount -o remount,size=$(( $(du -s -B1 {store} | cut -f1) + {ROOM_BYTES} )) {store}")
    try:
        # It ends with an error, as it is to.
        host.run(f"! head -c {2 * ROOM_BYTES} /dev/zero 2>&1 >{store}/of-somebody-else")
        eventually(lambda: "degraded" in watched.ready(), "the full disk is seen")
        assert watched.ask(f"/v2/{TEST_HOST}/library/app/manifests/1") == 200
        assert watched.ask(f"/v2/{TEST_HOST}/library/app/manifests/2") == 502
        fed = set()

        def is_fed_on() -> bool:
            fed.add(watched.show("breakwater.service", "WatchdogTimestampMonotonic"))
            return len(fed) > 6

        eventually(is_fed_on, "it is fed for more than its watchdog's patience")
        eventually(lambda: "degraded" in watched.show("breakwater.service", "StatusText"), "systemctl status says it")
        assert watched.show("breakwater.service", "MainPID") == was
        assert watched.show("breakwater.service", "NRestarts") == "0"
    finally:
        host.run(f"rm -f {store}/of-somebody-else; mount -o remount,size=1g {store}")
    eventually(lambda: "degraded" not in watched.ready(), "it is well again by itself")
    host.run(f"/opt/breakwater/bin/breakwater unpin {reference}")


@pytest.mark.parametrize(
    ("drop_in", "settings"),
    [
        ("", "[server]\nlistne = 1\n"),
        ("[Service]\nExecStart=\nExecStart=/bin/false\n", ""),
        ("[Service]\nExecStart=\nExecStart=/bin/sleep 1000\n", ""),
    ],
    ids=["its settings are wrong", "it ends at once", "it hangs"],
)
def test_a_service_that_cannot_start_closes_its_socket(installed: Installed, drop_in: str, settings: str) -> None:
    """Within ten seconds clients are refused, and so containerd goes to the next host. Mended, it comes back whole."""
    host = installed.host
    if settings:
        installed.write(settings)
    if drop_in:
        installed.drop_in("breakwater.service", "broken", drop_in)
    host.run("systemctl reset-failed breakwater; systemctl restart --no-block breakwater")
    eventually(installed.is_refused, "the socket is closed", CLOSED_WITHIN_S)
    eventually(lambda: installed.show("breakwater.service", "ActiveState") == "failed", "it is given up")
    assert installed.is_refused(), "it stays closed"

    installed.write(installed.settings)
    if drop_in:
        installed.drop_in("breakwater.service", "broken", "")
    host.run("systemctl reset-failed breakwater; systemctl start breakwater.socket breakwater.service")
    assert installed.answers()


def test_an_upgrade_keeps_the_store_and_a_removal_leaves_it(installed: Installed, pushed: Image) -> None:
    """What was pulled is there after an upgrade; a removal takes the program and the units, and says what it leaves."""
    host = installed.host
    (upgrade,) = commands("Upgrade")
    assert installed.ask("/v2/library/app/manifests/1") == 200
    n_blobs = host.run("find /var/lib/breakwater -type f -path '*blobs*' | wc -l")
    assert int(n_blobs) > 0
    host.run(f"set -e; systemctl reset-failed breakwater; {upgrade}", timeout_s=300)
    assert installed.answers()
    (remove,) = commands("Remove")
    said = host.run(f"set -e; {remove}")
    assert "/var/lib/breakwater" in said
    assert host.run("find /var/lib/breakwater -type f -path '*blobs*' | wc -l") == n_blobs
    assert installed.is_refused()
    assert host.run("ls -d /opt/breakwater /etc/systemd/system/breakwater* 2>/dev/null || true") == ""
