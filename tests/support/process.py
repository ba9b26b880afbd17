"""Real processes under test: started in a group of their own, watched, and ended whatever happens.

`Child` runs any daemon; `Breakwater` runs the appliance itself from a generated settings file. Neither imports the
package under test: what they know of it is its command line, its settings file and its HTTP faces.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.support import ports

#: Patience with a daemon that starts on a busy machine of two cores, in seconds. Never a claim about speed.
START_S = 60
#: Patience with a daemon that was asked to end, before it is killed.
STOP_S = 30


class DidNotStart(AssertionError):
    """A daemon ended, or did not answer in time; the end of its log is in the message."""


class Child:
    """One daemon with its log. A context manager: leaving it ends the whole process group."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        """Nothing runs before `start`. `env` is added to this process's environment."""
        self.name = name
        self.command = [*_dying_with_us(), *command]
        self.log_path = log
        self._env = {**os.environ, **(env or {})}
        #: Descriptors that it inherits, under their own numbers.
        self.pass_fds: Sequence[int] = ()
        self._running: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name} pid={self.pid if self.is_running else None}>"

    @property
    def pid(self) -> int:
        """The process id. Raises AssertionError when it was never started."""
        assert self._running is not None, f"{self.name} was never started"
        return self._running.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._running is not None and self._running.poll() is None

    def start(self) -> None:
        """Start it and wait until `is_ready`. Raises DidNotStart."""
        assert not self.is_running, f"{self.name} runs already"
        with self.log_path.open("ab") as log:
            self._running = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                pass_fds=self.pass_fds,
                start_new_session=True,
            )
        give_up_at = time.monotonic() + START_S
        while not self.is_ready():
            if not self.is_running or time.monotonic() > give_up_at:
                code = self._running.poll()
                self.kill()
                state = f"did not answer within {START_S} s" if code is None else f"ended with {code}"
                raise DidNotStart(f"{self.name} {state}. Its log ends:\n{tail_of(self.log_path)}")
            time.sleep(0.02)

    @contextlib.contextmanager
    def with_env(self, **more: str) -> Iterator[None]:
        """What is started in the block has this in its environment besides."""
        before, self._env = self._env, {**self._env, **more}
        try:
            yield
        finally:
            self._env = before

    def is_ready(self) -> bool:
        """Whether it answers. The default is content with a process that runs."""
        return self.is_running

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process itself, not to its children."""
        if self._running:
            self._running.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """Its exit code; negative for a signal. Raises subprocess.TimeoutExpired."""
        assert self._running is not None
        return self._running.wait(timeout_s)

    def stop(self) -> int:
        """SIGTERM, then patience, then SIGKILL for the group. Returns the exit code."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            return self.kill()
        finally:
            self._end_group()

    def kill(self) -> int:
        """SIGKILL for the whole group. Returns the exit code."""
        self._end_group()
        assert self._running is not None
        return self._running.wait()

    def close(self) -> None:
        """End it, if it runs."""
        if self.is_running:
            self.stop()

    def log(self) -> str:
        """Everything it has written to stdout and stderr, over all its starts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _end_group(self) -> None:
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):  # the group is gone with its last member
                os.killpg(self._running.pid, signal.SIGKILL)


class Breakwater(Child):
    """A running `python -m proxy serve`, with the settings file that it was given."""

    def __init__(self, scratch: Path, settings: Mapping[str, Any], env: Mapping[str, str] | None = None) -> None:
        """`settings` are sections as in the settings file; listen addresses and the store's path are filled in here.

        The ports are taken once and kept over restarts, as a node's configuration would expect.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        self.scratch = scratch
        self.port = ports.take()
        self.admin_port = ports.take()
        self.store = scratch / "store"
        ours = {
            "server": {"listen": f"127.0.0.1:{self.port}", "admin_listen": f"127.0.0.1:{self.admin_port}"},
            "store": {"path": str(self.store), "capacity": "8GiB", "min_free": "1%"},
        }
        self.settings_path = scratch / "breakwater.toml"
        self.settings_path.write_text(to_toml(_merged(ours, settings)))
        super().__init__(
            "breakwater",
            [sys.executable, "-m", "proxy", "serve", "--config", str(self.settings_path)],
            scratch / "breakwater.log",
            env,
        )

    @property
    def address(self) -> str:
        """host:port of the data face."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Base URL of the data face, without a slash at the end."""
        return f"http://{self.address}"

    def is_ready(self) -> bool:
        """Whether both faces answer: `/v2/` to clients, `/readyz` to whoever watches it."""
        return _status(self.port, "/v2/") == 200 and _status(self.admin_port, "/readyz") == 200

    def admin(self, path: str) -> Any:
        """What the admin face answers to a GET: JSON parsed where it says JSON, else text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=START_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, f"GET {path} on the admin face: {response.status} {body[:500]!r}"
            is_json = (response.getheader("Content-Type") or "").startswith("application/json")
            return json.loads(body) if is_json else body.decode()
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        """What `breakwater status --json` prints."""
        answer = subprocess.run(
            [sys.executable, "-m", "proxy", "status", "--json", "--config", str(self.settings_path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=START_S,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr.decode(errors="replace")
        parsed: dict[str, Any] = json.loads(answer.stdout)
        return parsed

    def stop_cleanly(self) -> None:
        """SIGTERM, and hold it to what a service manager expects: exit code 0, nothing alarming in the log."""
        code = self.stop()
        self.assert_log_is_clean()
        assert code == 0, f"breakwater ended with {code} after SIGTERM. Its log ends:\n{tail_of(self.log_path)}"

    def assert_log_is_clean(self) -> None:
        """Nothing in the log is a traceback or one of asyncio's complaints about forgotten work."""
        found = _ALARMING.search(self.log())
        assert found is None, f"{found[0]!r} in the log of breakwater, which ends:\n{tail_of(self.log_path)}"


class Guarded(Breakwater):
    """Breakwater where clients log in, as robots or with accounts of an upstream: `/v2/` challenges once it is ready."""

    def is_ready(self) -> bool:
        return _status(self.port, "/v2/") == 401 and _status(self.admin_port, "/readyz") == 200


_ALARMING = re.compile(
    r"Traceback \(most recent call last\)|Task was destroyed|never retrieved|was never awaited"
    r"|Unclosed (client|connector)|ResourceWarning|Segmentation fault"
)


def run(command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 120) -> str:
    """Run a command to its end and return its stdout. Raises CommandFailed with the command and what it wrote."""
    done = subprocess.run(
        list(command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, **(env or {})},
        timeout=timeout_s,
        check=False,
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if done.returncode != 0:
        raise CommandFailed(f"{' '.join(command)}\nended with {done.returncode}\n{err[-4000:]}\n{out[-1000:]}")
    return out


class CommandFailed(AssertionError):
    """A command ended with something else than 0."""


def program(name: str) -> str:
    """The path of a program that a test needs. Its absence is a failure of the run, never a reason to skip."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    assert path is not None, f"{name} is not installed; `make test` installs what the tests need (.ci/packages)"
    return path


def processes_in(folder: Path) -> list[int]:
    """Ids of the processes whose command line names something in `folder`: what a test left running."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended while we looked
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def mounts_in(folder: Path) -> list[Path]:
    """Mount points at or below `folder`, the innermost first."""
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    below = (Path(point.encode().decode("unicode_escape")) for point in points)
    return sorted((p for p in below if p.is_relative_to(folder)), key=lambda p: len(p.parts), reverse=True)


def clear_away(folder: Path) -> None:
    """End and unmount whatever still lives in `folder`, then remove it."""
    for pid in processes_in(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for point in mounts_in(folder):
        subprocess.run([program("umount"), "--lazy", str(point)], check=False, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


def tail_of(log: Path, n_lines: int = 60) -> str:
    """The last lines of a log, for a failure's message."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-n_lines:])


def to_toml(settings: Mapping[str, Any]) -> str:
    """Nested mappings as TOML: enough for settings files and the configuration of the daemons used here."""
    lines: list[str] = []
    _write_table(lines, (), settings)
    return "\n".join(lines) + "\n"


def _write_table(lines: list[str], path: tuple[str, ...], table: Mapping[str, Any]) -> None:
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    if path and (plain or not table):
        lines.append(f"[{'.'.join(json.dumps(part) for part in path)}]")
    # JSON's strings, numbers, booleans and lists of these are TOML's too.
    lines.extend(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in plain.items())
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_table(lines, (*path, key), value)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        mine = merged.get(key)
        merged[key] = _merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return merged


def _dying_with_us() -> list[str]:
    """A prefix that has the kernel end the child when the test process dies without a chance to tidy up."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def fetched(port: int, path: str) -> tuple[int, bytes]:
    """A GET on a connection of its own: status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _status(port: int, path: str) -> int | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def eventually(true: Callable[[], object], what: str, timeout_s: float = START_S) -> None:
    """Return once `true()` is true: for what can only be seen from outside, never for what a test can be told.

    The patience is no claim about speed. Raises AssertionError saying what never came to be.
    """
    give_up_at = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < give_up_at, f"after {timeout_s} s still not: {what}"
        time.sleep(0.02)
