"""The day a cluster is born without a network: two sides with no way between them, a bundle and a folder of wheels.

What README says under "Air gap" is what is done here, in its order.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests.support.clients import Containerd, Podman, Skopeo
from tests.support.commands import breakwater_command
from tests.support.images import Image, artifact, image, index, multi_arch
from tests.support.namespaces import Namespace, attempts, traced
from tests.support.origin import Origin
from tests.support.process import Breakwater, eventually, program, run

_SEED = count(83_000)
KIB = 1024
HOST = "registry.k8s.io"
#: A release by its names (`kubeadm config images list`); what is in the images is made up.
RELEASE = {
    "kube-apiserver": "v1.31.0",
    "kube-controller-manager": "v1.31.0",
    "kube-scheduler": "v1.31.0",
    "kube-proxy": "v1.31.0",
    "coredns/coredns": "v1.11.3",
    "pause": "3.10",
    "etcd": "3.5.15-0",
}


@pytest.fixture
def sides() -> Iterator[tuple[Namespace, Namespace]]:
    """A connected side and a sealed one. Their only ways out lead nowhere; the registry is on the first one's loopback."""
    with Namespace(f"bw-near-{os.getpid()}") as near, Namespace(f"bw-far-{os.getpid()}") as far:
        yield near, far


def pushed(origin: Origin, version: str, shared: Image, before: dict[str, Image] | None = None) -> dict[str, Image]:
    """A release in the registry: every image for two platforms, one layer of them all the same; what is in the release
    `before` stays as it is."""
    release = dict(before or {})
    for name, tag in RELEASE.items():
        tag = tag.replace("v1.31.0", version)
        if f"{name}:{tag}" in release:
            continue
        children = [*multi_arch(next(_SEED), (20 * KIB, 60 * KIB)).children, shared]
        release[f"{name}:{tag}"] = origin.push(name, tag, index(children))
    return {name: wanted for name, wanted in release.items() if not name.startswith("kube-") or version in name}


@pytest.mark.timeout(600)
def test_a_cluster_is_born_from_a_bundle_and_upgraded_by_a_second_one(
    sides: tuple[Namespace, Namespace], scratch: Path
) -> None:
    """Issue 8: list, prefetch, export, carry, install offline, import, pull by tag and digest; nothing goes out."""
    near, far = sides
    bundle, upgrade, key = scratch / "release.tar", scratch / "upgrade.tar", scratch / "key"
    wheels = scratch / "wheels"
    run([program("make"), "-s", "wheelhouse", f"WHEELHOUSE={wheels}", *_python()], timeout_s=300)
    run([program("openssl"), "genpkey", "-algorithm", "ed25519", "-out", f"{key}.pem"])
    run([program("openssl"), "pkey", "-in", f"{key}.pem", "-pubout", "-out", f"{key}.pub"])

    # Here: a machine that reaches the registry.
    shared = image(next(_SEED), (200 * KIB,), architecture="s390x")
    with near.inside(), Origin(scratch / "origin") as origin:
        first = pushed(origin, "v1.31.0", shared)
        sbom = origin.push("pause", None, artifact(first["pause:3.10"], "application/spdx+json", b"pause"))
        origin.push("pause", first["pause:3.10"].digest.replace(":", "-"), index([sbom]))
        mirror = Breakwater(scratch / "near", {"upstreams": {HOST: {"url": origin.url}}, "server": _NO_DEFAULT})
        images = scratch / "images.txt"
        images.write_text("".join(f"{HOST}/{name}\n" for name in first))
        _done(breakwater_command(mirror, "prefetch", "-f", str(images)))
        _done(breakwater_command(mirror, "export", "-o", str(bundle), "--sign", f"{key}.pem", "-f", str(images)))

        second = pushed(origin, "v1.32.0", shared, first)
        images.write_text("".join(f"{HOST}/{name}\n" for name in second))
        _done(breakwater_command(mirror, "prefetch", "-f", str(images)))
        since = ["--since", str(bundle), "--sign", f"{key}.pem", "--zstd"]
        _done(breakwater_command(mirror, "export", "-o", str(upgrade), *since, "-f", str(images)))
    assert upgrade.stat().st_size < bundle.stat().st_size

    # There: an empty machine, the disk with the bundle, and Python.
    with far.inside(), ExitStack() as stack:
        run([sys.executable, "-m", "venv", str(scratch / "venv")])
        pip = [str(scratch / "venv/bin/python"), "-m", "pip", "install", "--quiet", "--no-index", "--no-cache-dir"]
        run([*pip, "--disable-pip-version-check", "--find-links", str(wheels), "breakwater[zstd]"], timeout_s=300)
        program_there = str(scratch / "venv/bin/breakwater")
        settings = {"upstreams": {HOST: {"url": f"https://{HOST}"}}, "server": {**_NO_DEFAULT, "sealed": True}}
        node = Breakwater(scratch / "far", settings)
        run([program_there, "import", "--config", str(node.settings_path), "--key", f"{key}.pub", str(bundle)])

        trace = scratch / "trace"
        node.command = [*traced(trace), program_there, "serve", "--config", str(node.settings_path)]
        stack.enter_context(node)
        containerd = stack.enter_context(Containerd(scratch / "containerd", node.address, host=HOST))
        podman = stack.enter_context(Podman(scratch / "podman", node.address, host=HOST))
        skopeo = stack.enter_context(Skopeo(scratch / "skopeo", node.address))
        skopeo.host = HOST
        _pull_everything(first, [containerd, podman, skopeo])

        # The upgrade, into the running server, by the same key.
        report = run(
            [
                program_there,
                "import",
                "--config",
                str(node.settings_path),
                "--json",
                "--key",
                f"{key}.pub",
                str(upgrade),
            ]
        )
        assert json.loads(report)["n_missing"] == 0
        for name, wanted in second.items():
            assert containerd.pull(*name.split(":")) == wanted.digest

        for path in ("kube-apiserver/manifests/v9", "nothing/manifests/latest", "pause/tags/list", "nothing/tags/list"):
            run([program("curl"), "-s", f"{node.url}/v2/{HOST}/{path}"])
        run([program("curl"), "-s", f"{node.url}/v2/{HOST}/pause/referrers/{first['pause:3.10'].digest}"])
        status = json.loads(run([program_there, "status", "--config", str(node.settings_path), "--json"]))
        assert [each["n_images"] for each in status["seal"]["imports"]] == [len(first), len(second)]
        node.stop_cleanly()
    assert attempts(trace) == []
    assert far.n_packets_out() == 0


_NO_DEFAULT = {"default_upstream": ""}


def _python() -> list[str]:
    """The interpreter that make is to use: the one of these tests, so that it makes no environment of its own."""
    return [f"VENV={Path(sys.executable).parents[1]}"]


def _done(done: object) -> None:
    assert getattr(done, "code") == 0, done  # noqa: B009


def _pull_everything(release: dict[str, Image], clients: list[Containerd | Podman | Skopeo]) -> None:
    """By tag; then, with everything forgotten, by digest, as kubelets do."""
    for name, wanted in release.items():
        for client in clients:
            assert client.pull(*name.split(":")) == wanted.digest, f"{client.name} {name}"
    for client in clients:
        client.reset()
    for name, wanted in release.items():
        for client in clients:
            assert client.pull_digest(name.partition(":")[0], wanted.digest) == wanted.digest, f"{client.name} {name}"


def test_the_watch_sees_what_goes_out(sides: tuple[Namespace, Namespace], scratch: Path) -> None:
    """A check that never fails proves nothing: one connection outward is seen both by the trace and on the wire, and a
    question for a name by the trace, wherever the machine's resolver is."""
    _, far = sides
    trace = scratch / f"trace-{next(_SEED)}"
    with far.inside():
        question = "import socket\ntry: socket.getaddrinfo('registry.k8s.io', 443)\nexcept OSError: pass"
        environment = {"RES_OPTIONS": "timeout:1 attempts:1"}
        run([*traced(trace), sys.executable, "-c", question], environment)
        eventually(lambda: any("htons(53)" in line for line in attempts(trace)), "the trace has the question")
        trace.unlink()
        outward = "import socket; s = socket.socket(); s.setblocking(False); s.connect_ex(('198.51.100.1', 443))"
        run([*traced(trace), sys.executable, "-c", outward])
        eventually(lambda: attempts(trace), "the trace has the attempt")
    eventually(far.n_packets_out, "a packet went out")
