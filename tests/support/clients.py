"""Real clients, each with its storage and its daemon in a scratch folder, so that several may live side by side.

What they share is small: pull a reference, say which manifest was pulled, forget everything. How a client is pointed at
Breakwater is its own business, and is written down here as an operator would write it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Protocol, Self

from tests.support.images import digest_of
from tests.support.process import Child, clear_away, program, run, to_toml

#: The source host that stands for a registry other than Docker Hub.
TEST_HOST = "registry.test"
#: A port on which nothing listens: where the way round the mirror leads.
NOWHERE = "127.0.0.1:9"
#: Every address but loopback is to be had through nowhere: what a client has, it has from here.
NO_WAY_OUT = {"HTTP_PROXY": f"http://{NOWHERE}", "HTTPS_PROXY": f"http://{NOWHERE}", "NO_PROXY": "127.0.0.1"}


class Client(Protocol):
    """A client of registries. A context manager: leaving it leaves nothing running, mounted or stored."""

    name: str
    #: The source host under which this client asks for images in these tests.
    host: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def pull(self, repository: str, tag: str) -> str:
        """Pull `<host>/<repository>:<tag>` and return the digest that the tag named. Raises CommandFailed."""
        ...

    def reset(self) -> None:
        """Forget everything pulled, so that the next pull fetches every byte."""
        ...


class Skopeo:
    """skopeo, by path: the source host is the first element of the repository."""

    name = "skopeo"
    host = TEST_HOST

    def __init__(self, scratch: Path, mirror: str) -> None:
        """`mirror` is host:port of Breakwater."""
        self._scratch, self._mirror = scratch, mirror
        self._policy = scratch / "policy.json"

    def __enter__(self) -> Self:
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._policy.write_text(_ACCEPT_ANYTHING)
        return self

    def __exit__(self, *_: object) -> None:
        clear_away(self._scratch)

    def login(self, name: str, secret: str) -> None:
        """`skopeo login` at Breakwater; what is pulled later is pulled with it. Raises CommandFailed."""
        skopeo = [program("skopeo"), "login", "--tls-verify=false", "--authfile", f"{self._scratch}/auth.json"]
        run([*skopeo, "--username", name, "--password", secret, self._mirror], NO_WAY_OUT)

    def pull(self, repository: str, tag: str) -> str:
        """Copies every platform, as `skopeo sync` does, into a folder of files named by their digests."""
        return self._copy(repository, f":{tag}")

    def pull_digest(self, repository: str, digest: str) -> str:
        """The same of `<host>/<repository>@<digest>`."""
        return self._copy(repository, f"@{digest}")

    def _copy(self, repository: str, which: str) -> str:
        target = self._scratch / "pulled" / repository / which[1:].replace(":", "-")
        target.mkdir(parents=True)
        source = f"docker://{self._mirror}/{self.host}/{repository}{which}"
        skopeo = [program("skopeo"), "--policy", str(self._policy), "--tmpdir", str(self._scratch)]
        auth = ["--src-authfile", f"{self._scratch}/auth.json"] if (self._scratch / "auth.json").exists() else []
        run([*skopeo, "copy", "--all", "--src-tls-verify=false", *auth, source, f"dir:{target}"], NO_WAY_OUT)
        for path in target.iterdir():
            if len(path.name) == 64:
                assert digest_of(path.read_bytes()) == f"sha256:{path.name}"
        return digest_of((target / "manifest.json").read_bytes())

    def reset(self) -> None:
        shutil.rmtree(self._scratch / "pulled", ignore_errors=True)


class Containerd:
    """containerd through hosts.toml: the source host travels as `ns=`."""

    name = "containerd"

    def __init__(self, scratch: Path, mirror: str, setup: str | None = None, *, host: str = TEST_HOST) -> None:
        """`setup` is what the hosts.toml of `host` says, if not what is written here."""
        self.host = host
        self._scratch = scratch
        self._hosts = scratch / "hosts.d"
        #: name:secret that every host is shown, as a kubelet shows its pull secrets to mirrors.
        self.user = ""
        self._socket = scratch / "c.sock"
        hosts = {"server": f"http://{NOWHERE}", "host": {f"http://{mirror}": {"capabilities": ["pull", "resolve"]}}}
        self._hosts_toml = to_toml(hosts) if setup is None else setup
        self._settings = {
            "version": 2,
            "root": str(scratch / "root"),
            "state": str(scratch / "state"),
            # Nothing here runs containers; cri and opt would look for folders of the whole machine.
            "disabled_plugins": ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"],
            "grpc": {"address": str(self._socket)},
            "ttrpc": {"address": f"{self._socket}.ttrpc"},
        }
        self._daemon: Child | None = None

    def __enter__(self) -> Self:
        folder = self._hosts / self.host
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts.toml").write_text(self._hosts_toml)
        (self._scratch / "c.toml").write_text(to_toml(self._settings))
        command = [program("containerd"), "-c", str(self._scratch / "c.toml"), "-l", "warn"]
        self._daemon = _Answering(self.name, command, self._scratch / "containerd.log", self._ctr("version"))
        self._daemon.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemon:
            self._daemon.close()
        clear_away(self._scratch)

    def pull(self, repository: str, tag: str) -> str:
        """Pulls and unpacks for this machine's platform."""
        return self._pull(f"{self.host}/{repository}:{tag}")

    def pull_digest(self, repository: str, digest: str) -> str:
        """The same of `<host>/<repository>@<digest>`."""
        return self._pull(f"{self.host}/{repository}@{digest}")

    def _pull(self, reference: str) -> str:
        how = ["--user", self.user] if self.user else []
        how += ["--hosts-dir", str(self._hosts), "--snapshotter", "overlayfs", "--platform", "linux/amd64"]
        run(self._ctr("images", "pull", *how, reference), NO_WAY_OUT)
        for line in run(self._ctr("images", "list")).splitlines():
            if line.startswith(f"{reference} "):
                return line.split()[2]
        raise AssertionError(f"containerd does not list {reference}")

    def reset(self) -> None:
        names = run(self._ctr("images", "list", "--quiet")).split()
        if names:
            run(self._ctr("images", "remove", "--sync", *names))
        left = run(self._ctr("content", "list", "--quiet")).split()
        assert not left, f"containerd still has {left}"

    def _ctr(self, *arguments: str) -> list[str]:
        # Not in namespace k8s.io, where images outlive their removal.
        return [program("ctr"), "--address", str(self._socket), "--namespace", "test", *arguments]


class Docker:
    """dockerd through registry-mirrors: only Docker Hub has mirrors, and they are asked at their root."""

    name = "docker"
    host = "docker.io"

    def __init__(self, scratch: Path, mirror: str, setup: str | None = None) -> None:
        """`setup` is what daemon.json says, if not what is written here."""
        self._scratch = scratch
        self._daemon_json = json.dumps({"registry-mirrors": [f"http://{mirror}"]}) if setup is None else setup
        self._url = f"unix://{scratch / 'd.sock'}"
        self._daemon: Child | None = None

    def __enter__(self) -> Self:
        self._scratch.mkdir(parents=True, exist_ok=True)
        at = self._scratch
        (at / "daemon.json").write_text(self._daemon_json)
        command = [program("dockerd"), "--config-file", f"{at}/daemon.json", "--host", self._url]
        command += ["--data-root", f"{at}/data", "--exec-root", f"{at}/exec", "--pidfile", f"{at}/d.pid"]
        command += ["--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--bridge=none"]
        command += ["--storage-driver", "overlay2", "--log-level", "warn"]
        # It cannot be kept from falling back to Docker Hub otherwise.
        self._daemon = _Answering(self.name, command, at / "dockerd.log", self._docker("version"), NO_WAY_OUT)
        self._daemon.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemon:
            self._daemon.close()
        clear_away(self._scratch)

    def pull(self, repository: str, tag: str) -> str:
        return self.pull_as_written(f"{repository.removeprefix('library/')}:{tag}")

    def pull_as_written(self, reference: str) -> str:
        """`docker pull` of exactly this; returns the digest that it named."""
        run(self._docker("pull", "--quiet", reference))
        shown = run(self._docker("image", "inspect", "--format", "{{json .RepoDigests}}", reference))
        names: list[str] = json.loads(shown)
        return names[0].partition("@")[2]

    def login(self, registry: str, name: str, secret: str) -> None:
        """`docker login` at host:port. Raises CommandFailed."""
        run(self._docker("login", "--username", name, "--password", secret, registry))

    def pull_at(self, registry: str, repository: str, tag: str) -> str:
        """Pull from host:port itself, past all mirrors, with what `login` left; returns the digest."""
        reference = f"{registry}/{repository}:{tag}"
        run(self._docker("pull", "--quiet", reference))
        shown = run(self._docker("image", "inspect", "--format", "{{json .RepoDigests}}", reference))
        names: list[str] = json.loads(shown)
        return next(name for name in names if name.startswith(registry)).partition("@")[2]

    def reset(self) -> None:
        ids = run(self._docker("image", "ls", "--all", "--quiet", "--no-trunc")).split()
        if ids:
            run(self._docker("image", "rm", "--force", *sorted(set(ids))))

    def _docker(self, *arguments: str) -> list[str]:
        # A configuration folder of its own: no credentials and no context of whoever runs the tests.
        return [program("docker"), "--config", f"{self._scratch}/cli", "--host", self._url, *arguments]


class Podman:
    """podman through registries.conf, whose library CRI-O shares: the mirror's location is a host and a path."""

    name = "podman"

    def __init__(self, scratch: Path, mirror: str, setup: str | None = None, *, host: str = TEST_HOST) -> None:
        """`setup` is what a file in registries.conf.d says, if not what is written here."""
        self.host = host
        self._scratch = scratch
        self._env = {
            **NO_WAY_OUT,
            "CONTAINERS_REGISTRIES_CONF": f"{scratch}/registries.conf",
            "CONTAINERS_STORAGE_CONF": f"{scratch}/storage.conf",
            "CONTAINERS_CONF": f"{scratch}/containers.conf",
            "TMPDIR": f"{scratch}/tmp",
            "XDG_RUNTIME_DIR": f"{scratch}/run",
        }
        ours = (
            f'[[registry]]\nprefix = "{self.host}"\nlocation = "{NOWHERE}"\ninsecure = true\n\n'
            f'[[registry.mirror]]\nlocation = "{mirror}/{self.host}"\ninsecure = true\n'
        )
        self._registries = f"unqualified-search-registries = []\n\n{ours if setup is None else setup}"
        self._storage = {
            "storage": {"driver": "overlay", "graphroot": f"{scratch}/graph", "runroot": f"{scratch}/runroot"}
        }

    def __enter__(self) -> Self:
        for name in ("tmp", "run"):
            (self._scratch / name).mkdir(parents=True, exist_ok=True)
        (self._scratch / "registries.conf").write_text(self._registries)
        (self._scratch / "storage.conf").write_text(to_toml(self._storage))
        (self._scratch / "containers.conf").write_text(f'[engine]\ntmp_dir = "{self._scratch}/run/libpod"\n')
        (self._scratch / "policy.json").write_text(_ACCEPT_ANYTHING)
        return self

    def __exit__(self, *_: object) -> None:
        clear_away(self._scratch)

    def pull(self, repository: str, tag: str) -> str:
        return self._pull(f"{self.host}/{repository}:{tag}")

    def pull_digest(self, repository: str, digest: str) -> str:
        """Pull `<host>/<repository>@<digest>`; returns the digest under which it is kept."""
        return self._pull(f"{self.host}/{repository}@{digest}")

    def _pull(self, reference: str) -> str:
        self._podman("pull", "--quiet", "--signature-policy", f"{self._scratch}/policy.json", reference)
        return self._podman("image", "inspect", "--format", "{{.Digest}}", reference).strip()

    def login(self, registry: str, name: str, secret: str) -> None:
        """`podman login` at host:port. Raises CommandFailed."""
        how = ["--tls-verify=false", "--authfile", f"{self._scratch}/auth.json"]
        self._podman("login", *how, "--username", name, "--password", secret, registry)

    def pull_at(self, registry: str, repository: str, tag: str) -> str:
        """Pull from host:port itself, past all mirrors, with what `login` left; returns the digest."""
        reference = f"{registry}/{repository}:{tag}"
        how = ["--tls-verify=false", "--signature-policy", f"{self._scratch}/policy.json"]
        if (self._scratch / "auth.json").exists():
            how += ["--authfile", f"{self._scratch}/auth.json"]
        self._podman("pull", "--quiet", *how, reference)
        return self._podman("image", "inspect", "--format", "{{.Digest}}", reference).strip()

    def reset(self) -> None:
        self._podman("rmi", "--all", "--force")

    def _podman(self, *arguments: str) -> str:
        return run([program("podman"), "--cgroup-manager=cgroupfs", "--events-backend=file", *arguments], self._env)


class _Answering(Child):
    """A daemon that is ready once a command of its own client says so."""

    def __init__(self, name: str, command: list[str], log: Path, asks: list[str], env: dict[str, str] | None = None):
        super().__init__(name, command, log, env)
        self._asks = asks

    def is_ready(self) -> bool:
        try:
            run(self._asks, timeout_s=10)
        except AssertionError:
            return False
        return True


_ACCEPT_ANYTHING = json.dumps({"default": [{"type": "insecureAcceptAnything"}]})


class Maker(Protocol):
    """A kind of client: made of a scratch folder and Breakwater's host:port. Each of the classes above is one."""

    name: str

    def __call__(self, scratch: Path, mirror: str) -> Client:
        """A client that is not started yet."""
        ...


#: The four that every kind of node comes down to.
EVERY_CLIENT: tuple[Maker, ...] = (Skopeo, Containerd, Docker, Podman)
