"""The admin listener of a real process: the API as its document says, the token, sockets, nothing on the data port."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import upstreams_at
from tests.support import ports
from tests.support.commands import breakwater_command
from tests.support.crowd import Visit, visit_all
from tests.support.images import KIB, Image, artifact, image, multi_arch
from tests.support.images import index as referring_index
from tests.support.origin import Origin
from tests.support.process import Breakwater, eventually, program

_SEED = count(171_000)


@pytest.fixture(scope="module")
def appliance(scratch: Path, origin: Origin) -> Iterator[Breakwater]:
    """A Breakwater with something in it, a project with rules, and probes on an address of their own."""
    settings = upstreams_at(origin.url)
    settings["server"] |= {"probe_listen": f"127.0.0.1:{ports.take()}", "admin_hosts": ["breakwater.test"]}
    settings["projects"] = {"platform": {"match": ["docker.io/library/**"], "deny": ["**:latest"], "quota": "64MiB"}}
    with Breakwater(scratch / "appliance", settings) as running:
        yield running
        running.stop_cleanly()


def token_of(running: Breakwater) -> str:
    """As an operator finds it."""
    return (running.store / "breakwater" / "admin-token").read_text().strip()


def ask(
    running: Breakwater, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    """Status and document of an answer of the admin listener."""
    connection = http.client.HTTPConnection("127.0.0.1", running.admin_port, timeout=60)
    try:
        ours = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, None if body is None else json.dumps(body), ours)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def pull(running: Breakwater, name: str, target: str, wanted: Image, *, layers: bool = True) -> None:
    """As a node does."""
    targets = [f"manifests/{target}", *(f"manifests/{child.digest}" for child in wanted.children)]
    if layers:
        targets += [f"blobs/{blob.digest}" for blob in wanted.all_blobs()]
    for one in targets:
        visits = [Visit(f"/v2/{name}/{one}")]
        visit_all(running.port, visits)
        assert visits[0].status == 200


@pytest.mark.timeout(420)  # half a minute of processor time, on a machine that may be busy
def test_the_document_is_true(appliance: Breakwater, origin: Origin, tmp_path: Path) -> None:
    """Issue 7: whatever the OpenAPI document allows is answered as it says, whatever it forbids is refused; no request
    makes a 500."""
    name = f"library/fuzzed-{next(_SEED)}"
    pull(appliance, name, "1", origin.push(name, "1", image(next(_SEED), (4 * KIB,))))
    visit_all(appliance.port, [Visit(f"/v2/{name}/manifests/latest")])  # a denial to show
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run"),
            f"http://127.0.0.1:{appliance.admin_port}/api/v1/openapi.json",
            *("--header", f"Authorization: Bearer {token_of(appliance)}"),
            *("--max-examples", "10", "--seed", "7", "--phases", "examples,coverage,fuzzing", "--workers", "1"),
            *("--no-color", "--generation-database", "none"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "HOME": str(tmp_path)},
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()[-6000:] + done.stderr.decode()[-2000:]


def test_nothing_of_it_is_on_the_data_port(appliance: Breakwater) -> None:
    """Issue 7: what operators see is never on the data port, whatever the path and the method."""
    document = appliance.admin("/api/v1/openapi.json")
    paths = ["/", "/live", "/images", "/purge", "/static/dashboard.js", "/healthz", "/readyz", "/metrics"]
    for path in [*paths, "/api/v1/openapi.json", *document["paths"]]:
        visits = [Visit(path), Visit(path, method="POST")]
        visit_all(appliance.port, visits)
        assert {visit.status for visit in visits} <= {404, 405}, path
        assert all(visit.answered["content-type"] == "application/json" for visit in visits)


def test_probes_have_an_address_of_their_own_with_nothing_else(appliance: Breakwater) -> None:
    """Issue 7: probes and metrics may listen on the pod's address; nothing that names a repository is there."""
    port = int(appliance.settings_path.read_text().partition("probe_listen")[2].split(":")[1].split('"')[0])
    paths = {"/healthz": 200, "/readyz": 200, "/metrics": 200, "/": 404, "/api/v1/status": 404, "/images": 404}
    visits = [Visit(path) for path in paths]
    visit_all(port, visits)
    assert {visit.target: visit.status for visit in visits} == paths


def test_the_metrics_satisfy_prometheus_own_judge(appliance: Breakwater) -> None:
    """Issue 7: `promtool check metrics` has nothing to say."""
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=appliance.admin("/metrics").encode(), capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_an_image_is_found_looked_at_and_purged(appliance: Breakwater, origin: Origin) -> None:
    """Platforms, layers, sizes, tags, referrers, last pull; then it is gone, and asked for again it is fetched anew."""
    name = f"library/looked-{next(_SEED)}"
    both = origin.push(name, "1", multi_arch(next(_SEED), (20 * KIB, 40 * KIB)))
    sbom = origin.push(name, None, artifact(both, "application/spdx+json", b"what is in it"))
    origin.push(name, both.digest.replace(":", "-"), referring_index([sbom]))
    pull(appliance, name, "1", both)
    pull(appliance, name, sbom.digest, sbom)

    def found() -> list[dict[str, Any]]:
        images: list[dict[str, Any]] = ask(appliance, "GET", f"/api/v1/images?search={name}")[1]["images"]
        return images

    eventually(found, "the image in a search: records are read again every few seconds")
    (one,) = found()
    assert (one["project"], one["repository"]) == ("platform", name)
    assert one["cached_bytes"] > 2 * 60 * KIB

    _, document = ask(appliance, "GET", f"/api/v1/image?reference=docker.io/{name}:1")
    (seen,) = document["found"]
    assert (seen["digest"], seen["tag"], seen["tags"]) == (both.digest, "1", ["1"])
    assert [(v["platform"], v["cached"], len(v["layers"])) for v in seen["platforms"]] == [
        ("linux/amd64", True, 3),
        ("linux/arm64", True, 3),
    ]
    assert [each["artifact_type"] for each in seen["referrers"]] == ["application/spdx+json"]
    assert seen["last_pull_at"] is not None and seen["validated_at"] is not None

    body = {"what": f"docker.io/{name}:1"}
    assert ask(appliance, "POST", "/api/v1/purge", body)[0] == 401
    allowed = {"Authorization": f"Bearer {token_of(appliance)}"}
    status, said = ask(appliance, "POST", "/api/v1/purge", {**body, "dry_run": True}, allowed)
    assert (status, said["manifests"], said["dry_run"]) == (200, 4, True)
    assert ask(appliance, "GET", f"/api/v1/image?reference=docker.io/{name}:1")[0] == 200
    status, done = ask(appliance, "POST", "/api/v1/purge", body, allowed)
    assert (status, done["blobs"], done["freed_bytes"]) == (200, said["blobs"], said["freed_bytes"])
    assert ask(appliance, "GET", f"/api/v1/image?reference=docker.io/{name}:1")[0] == 404
    assert ask(appliance, "POST", "/api/v1/purge", body, allowed)[0] == 404

    n_before = len(origin.requests())
    pull(appliance, name, "1", both)
    assert len(origin.requests()) > n_before


def test_who_is_busy_and_who_was_refused(appliance: Breakwater, origin: Origin) -> None:
    """The busiest repositories, and denials with the rule and the sentence that the client was given."""
    name = f"library/busy-{next(_SEED)}"
    wanted = origin.push(name, "1", image(next(_SEED), (4 * KIB,)))
    for _ in range(60):
        pull(appliance, name, "1", wanted, layers=False)
    visit_all(appliance.port, [Visit(f"/v2/{name}/manifests/latest")])
    _, repositories = ask(appliance, "GET", "/api/v1/repositories?limit=1")
    assert repositories["repositories"][0]["repository"] == name
    assert repositories["repositories"][0]["requests"] == 60
    _, denials = ask(appliance, "GET", "/api/v1/denials?limit=1")
    (denial,) = denials["denials"]
    assert (denial["rule"], denial["project"], denial["remote"]) == ("**:latest", "platform", "127.0.0.1")
    assert f"{name}:latest is refused" in denial["sentence"]


def test_upstreams_and_projects_are_told(appliance: Breakwater) -> None:
    """How each upstream is, and what each project uses of its quota."""
    _, upstreams = ask(appliance, "GET", "/api/v1/upstreams")
    assert {"docker.io", "registry.test"} <= set(upstreams["upstreams"])
    _, projects = ask(appliance, "GET", "/api/v1/projects")
    platform = next(one for one in projects["projects"] if one["project"] == "platform")
    assert platform["quota_bytes"] == 64 << 20 and 0 < platform["charged_bytes"] <= 64 << 20


def test_names_that_are_not_ours_are_refused_and_probes_are_not(appliance: Breakwater) -> None:
    """DNS rebinding, at a real process: `server.admin_hosts` says which names are ours."""
    assert ask(appliance, "GET", "/api/v1/status", headers={"Host": "evil.test"})[0] == 421
    assert ask(appliance, "GET", "/api/v1/status", headers={"Host": "breakwater.test:9"})[0] == 200
    assert ask(appliance, "GET", "/healthz", headers={"Host": "evil.test"})[0] == 200


def test_commands_of_the_same_user_find_the_token_by_themselves(appliance: Breakwater, origin: Origin) -> None:
    """Nobody configures a token for a command on the same machine; somebody else's is refused, and told why."""
    name = f"library/commanded-{next(_SEED)}"
    origin.push(name, "1", image(next(_SEED), (4 * KIB,)))
    done = breakwater_command(appliance, "prefetch", f"docker.io/{name}:1", "--json")
    assert done.code == 0, done.err
    wrong = appliance.scratch / "another-token"
    wrong.write_text("x" * 40)
    env = {"BREAKWATER_SERVER__ADMIN_TOKEN_FILE": str(wrong)}
    refused = breakwater_command(appliance, "prefetch", f"docker.io/{name}:1", env=env)
    assert refused.code == 1 and "token" in refused.err


def test_over_a_unix_socket_no_token_is_asked_for(scratch: Path, origin: Origin) -> None:
    """Issue 7: except on the unix socket; its mode says who may connect, and one that was left over is replaced."""
    path = scratch / "admin.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    settings = upstreams_at(origin.url)
    settings["server"]["admin_listen"] = f"unix:{path}"

    class OverUnix(Breakwater):
        def is_ready(self) -> bool:
            return "admin unix:" in self.log()

    name = f"library/unix-{next(_SEED)}"
    wanted = origin.push(name, "1", image(next(_SEED), (4 * KIB,)))
    running = OverUnix(scratch / "over-unix", settings)
    text = running.settings_path.read_text()
    running.settings_path.write_text(text.replace(f'"127.0.0.1:{running.admin_port}"', f'"unix:{path}"'))
    with running:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        pull(running, name, "1", wanted)
        assert running.status()["store"]["blobs"] == 3
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            body = json.dumps({"what": f"docker.io/{name}:1"})
            head = "POST /api/v1/purge HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert running.status()["store"]["blobs"] == 0
        running.stop_cleanly()


def test_the_store_is_listed_and_purged_by_command_with_and_without_a_server(scratch: Path, origin: Origin) -> None:
    """Product, command line: `ls` and `purge` speak to a running server, and take the lock only when there is none."""
    running = Breakwater(scratch / "commands", upstreams_at(origin.url))
    names = [f"library/listed-{next(_SEED)}" for _ in range(2)]
    with running:
        for name in names:
            pull(running, name, "1", origin.push(name, "1", image(next(_SEED), (4 * KIB,))))
        assert _listed(running, "listed") == names
        done = breakwater_command(running, "purge", f"docker.io/{names[0]}", "--json")
        assert (done.code, done.report["blobs"]) == (0, 3), done.err
        absent = breakwater_command(running, "purge", f"docker.io/{names[0]}")
        assert absent.code == 1 and "nothing here is called" in absent.err
        running.stop_cleanly()
    assert _listed(running) == names[1:]
    assert "would go: 1 tags" in breakwater_command(running, "purge", f"docker.io/{names[1]}:1", "--dry-run").out
    assert breakwater_command(running, "purge", f"docker.io/{names[1]}:1").code == 0
    assert _listed(running) == []
    assert breakwater_command(running, "purge", f"docker.io/{names[1]}:1").code == 1
    assert breakwater_command(running, "purge", "no such thing").code == 2


def _listed(running: Breakwater, *words: str) -> list[str]:
    done = breakwater_command(running, "ls", *words, "--json")
    assert done.code == 0, done.err
    return [one["repository"] for one in done.report["images"]]
