"""A throw-away host whose PID 1 is a real systemd, and commands run on it.

What is installed on it is gone with it: /opt, /etc and the store's place are its own, laid over the machine's. Its
network is the machine's, so that clients and registries outside of it are where they always are.
"""

from __future__ import annotations

import os
import random
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Self

from tests.support.process import START_S, CommandFailed, eventually, program

REPOSITORY = Path(__file__).parents[2]
#: It lies beside the checkout, and is as much a requirement as the registry and the clients are.
BOOT = REPOSITORY.parent / "shared" / "lab" / "systemd-host"

#: What belongs to the source of a release.
_SOURCE = ("proxy", "systemd", "config", "pyproject.toml", "README.md", "LICENSE")

_LAY_OUT = """
over() {
    mkdir -p /run/over/$2/up /run/over/$2/work
    mount -t overlay overlay -o lowerdir=$1,upperdir=/run/over/$2/up,workdir=/run/over/$2/work $1
}
set -e
# As on a machine that has booted with systemd; without it the credentials of LoadCredential= are mounted for nobody.
mount --make-rshared /
over /etc etc
over /var/lib lib
mkdir -p /opt && mount -t tmpfs -o mode=0755 tmpfs /opt
mkdir -p /var/lib/breakwater && mount -t tmpfs tmpfs /var/lib/breakwater
mkdir /opt/source
tar -x -C /opt/source
"""


class SystemdHost:
    """Booted when entered, gone when left. Never skipped: without it nothing of this is shown."""

    def __init__(self) -> None:
        self._host: subprocess.Popen[bytes] | None = None
        #: A process on the host, by its number out here: the door to its namespaces.
        self._inside = 0

    def __enter__(self) -> Self:
        assert BOOT.is_file(), f"{BOOT} is not there: the tests of systemd need a host to run on"
        # A number that nobody else sleeps for, to know the process by.
        patience = str(random.SystemRandom().randrange(10**8, 10**9))
        self._host = subprocess.Popen(
            [str(BOOT), "sleep", patience],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        try:
            eventually(lambda: self._found(patience), "systemd has come up")
            with tempfile.TemporaryFile() as archive:
                with tarfile.open(fileobj=archive, mode="w") as tar:
                    for name in _SOURCE:
                        tar.add(REPOSITORY / name, name, filter=_without_leftovers)
                archive.seek(0)
                self._ask(_LAY_OUT, START_S, archive)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._host is not None
        if self._inside:
            os.kill(self._inside, 15)  # then systemd-host has nothing more to wait for, and tears the host down
        else:
            self._host.terminate()
        self._host.wait(START_S)

    def run(self, script: str, timeout_s: float = 120) -> str:
        """Run a piece of shell on the host, in the source's folder; what it wrote. Raises CommandFailed."""
        return self._ask(f"cd /opt/source; {script}", timeout_s, None)

    def _ask(self, script: str, timeout_s: float, given: IO[bytes] | None) -> str:
        done = subprocess.run(
            [program("nsenter"), "-t", str(self._inside), "-a", "--wd=/", "--", "bash", "-c", script],
            stdin=given or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Not the environment of a test run, which an operator does not have either.
            env={
                "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "LANG": "C.UTF-8",
                "HOME": os.environ.get("HOME", "/root"),
            },
            timeout=timeout_s,
            check=False,
        )
        said = done.stdout.decode(errors="replace").strip()
        if done.returncode != 0:
            raise CommandFailed(f"{script}\nended with {done.returncode}:\n{said}")
        return said

    def _found(self, patience: str) -> bool:
        assert self._host is not None and self._host.poll() is None, f"{BOOT} ended with {self._host}"
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "cmdline").read_bytes() == b"sleep\0%b\0" % patience.encode():
                    self._inside = int(entry.name)
                    return True
            except OSError:
                continue  # it ended while we looked
        return False


def _without_leftovers(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member
