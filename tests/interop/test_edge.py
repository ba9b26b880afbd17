"""One Breakwater as the upstream of another: an edge behind a datacenter, in front of a real registry."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from tests.interop.conftest import upstreams_at
from tests.support.clients import TEST_HOST, Containerd, Skopeo
from tests.support.images import MIB, artifact, digest_of, index, multi_arch
from tests.support.origin import Origin
from tests.support.process import Breakwater

_SEED = count(84_000)


@dataclass(frozen=True, slots=True)
class Levels:
    """The two, and what is behind them."""

    edge: Breakwater
    datacenter: Breakwater
    origin: Origin


@pytest.fixture(scope="module")
def levels(scratch: Path, origin: Origin) -> Iterator[Levels]:
    """The edge knows the datacenter by the path under which that one has each source host."""
    with Breakwater(scratch / "datacenter", upstreams_at(origin.url)) as datacenter:
        upstreams = {host: {"url": f"{datacenter.url}/v2/{host}"} for host in ("docker.io", TEST_HOST)}
        settings = {"server": {"default_upstream": "docker.io"}, "upstreams": upstreams}
        with Breakwater(scratch / "edge", settings) as edge:
            yield Levels(edge, datacenter, origin)
            edge.stop_cleanly()
            datacenter.stop_cleanly()


def asked(breakwater: Breakwater, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers in lower case and body of a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", breakwater.port, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def test_clients_pull_through_both_with_one_transfer_at_each(levels: Levels, scratch: Path) -> None:
    """INV-4 at every level: eight nodes at once, and each digest passes each of the two links once."""
    name = f"team/edge-{next(_SEED)}"
    wanted = levels.origin.push(name, "1", multi_arch(next(_SEED), (100_000, 4 * MIB)))
    n_before = len(levels.origin.requests())
    with Containerd(scratch / f"containerd-{next(_SEED)}", levels.edge.address) as containerd:
        assert containerd.pull(name, "1") == wanted.digest
    blobs = [blob for child in wanted.children for blob in child.blobs]
    with ThreadPoolExecutor(8) as nodes:
        paths = [f"/v2/{TEST_HOST}/{name}/blobs/{blob.digest}" for blob in blobs for _ in range(4)]
        for path, (status, _, body) in zip(paths, nodes.map(lambda each: asked(levels.edge, each), paths), strict=True):
            assert (status, digest_of(body)) == (200, path.rpartition("/")[2])
    with Skopeo(scratch / f"skopeo-{next(_SEED)}", levels.edge.address) as skopeo:
        assert skopeo.pull(name, "1") == wanted.digest
    reached = Counter(
        each.target for each in levels.origin.requests()[n_before:] if each.names_a_digest and each.method == "GET"
    )
    assert set(reached.values()) == {1}, reached
    seen = Counter(
        line["path"].partition("?")[0]
        for line in map(json.loads, levels.datacenter.log().splitlines())
        if line.get("method") == "GET" and "/sha256:" in line.get("path", "") and name in line["path"]
    )
    assert set(seen.values()) == {1}, seen


def test_tags_referrers_and_ranges_pass_faithfully(levels: Levels) -> None:
    """What the edge says is what the origin says, whatever is between."""
    name = f"team/edge-{next(_SEED)}"
    wanted = levels.origin.push(name, "1", multi_arch(next(_SEED), (300_000,)))
    levels.origin.push(name, "2", wanted)
    sbom = levels.origin.push(name, None, artifact(wanted, "application/spdx+json", b"sbom"))
    levels.origin.push(name, wanted.digest.replace(":", "-"), index([sbom]))
    at = f"/v2/{TEST_HOST}/{name}"

    status, headers, body = asked(levels.edge, f"{at}/manifests/1", Accept=wanted.media_type)
    assert (status, body, headers["docker-content-digest"]) == (200, wanted.body, wanted.digest)
    assert headers["content-type"] == wanted.media_type
    assert json.loads(asked(levels.edge, f"{at}/tags/list")[2])["tags"][:2] == ["1", "2"]
    found = json.loads(asked(levels.edge, f"{at}/referrers/{wanted.digest}")[2])["manifests"]
    assert [each["digest"] for each in found] == [sbom.digest]

    layer = wanted.children[0].blobs[1]
    status, headers, body = asked(levels.edge, f"{at}/blobs/{layer.digest}", Range="bytes=1000-1999")
    assert (status, body) == (206, layer.content[1000:2000])
    assert headers["content-range"] == f"bytes 1000-1999/{len(layer.content)}"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        pytest.param("team/none/manifests/1", 404, "MANIFEST_UNKNOWN", id="a manifest"),
        pytest.param(f"team/none/blobs/sha256:{'0' * 64}", 404, "BLOB_UNKNOWN", id="a blob"),
    ],
)
def test_what_is_absent_is_absent_at_the_edge(levels: Levels, path: str, status: int, code: str) -> None:
    """Absent for certain at the origin is absent for certain here, and said in the spec's words."""
    found, _, body = asked(levels.edge, f"/v2/{TEST_HOST}/{path}")
    assert (found, json.loads(body)["errors"][0]["code"]) == (status, code)


def test_when_the_middle_cannot_know_the_edge_does_not_claim_to(scratch: Path) -> None:
    """Promise 3: an outage behind the datacenter is never a false 404 at the edge."""
    here = scratch / f"outage-{next(_SEED)}"
    with Breakwater(here / "datacenter", upstreams_at("http://127.0.0.1:9")) as datacenter:
        upstreams = {TEST_HOST: {"url": f"{datacenter.url}/v2/{TEST_HOST}"}}
        settings = {"server": {"default_upstream": ""}, "upstreams": upstreams}
        with Breakwater(here / "edge", settings) as edge:
            status, _, body = asked(edge, f"/v2/{TEST_HOST}/team/app/manifests/1")
            assert status in (502, 503, 504), body
            edge.stop_cleanly()
        datacenter.stop_cleanly()


def test_what_the_datacenter_refuses_is_refused_at_the_edge(scratch: Path, origin: Origin) -> None:
    """A rule in the middle holds behind it: 403, by tag and by digest, GET and HEAD, and what is sealed there is a 404
    that is certain; neither is hidden, and neither is taken for an outage."""
    here, name = scratch / f"refusing-{next(_SEED)}", f"team/edge-{next(_SEED)}"
    wanted = origin.push(name, "1", multi_arch(next(_SEED), (10_000,)))
    settings = upstreams_at(origin.url)
    settings["upstreams"]["docker.io"] = {"url": "http://127.0.0.1:9", "sealed": True}
    settings["policy"] = {"deny": [f"{TEST_HOST}/{name}"]}
    with Breakwater(here / "datacenter", settings) as datacenter:
        upstreams = {host: {"url": f"{datacenter.url}/v2/{host}"} for host in ("docker.io", TEST_HOST)}
        with Breakwater(here / "edge", {"server": {"default_upstream": "docker.io"}, "upstreams": upstreams}) as edge:
            for target in ("1", wanted.digest):
                status, _, body = asked(edge, f"/v2/{TEST_HOST}/{name}/manifests/{target}")
                assert (status, json.loads(body)["errors"][0]["code"]) == (403, "DENIED"), body
            assert asked(edge, f"/v2/{TEST_HOST}/{name}/blobs/{wanted.children[0].blobs[1].digest}")[0] == 403
            status, _, body = asked(edge, "/v2/docker.io/library/absent/manifests/1")
            assert (status, json.loads(body)["errors"][0]["code"]) == (404, "MANIFEST_UNKNOWN")
            edge.stop_cleanly()
        datacenter.stop_cleanly()


def test_conditions_and_heads_pass_faithfully(levels: Levels) -> None:
    """What a client asks in another way than GET is answered the same at both levels, and costs the origin nothing."""
    name = f"team/edge-{next(_SEED)}"
    wanted = levels.origin.push(name, "1", multi_arch(next(_SEED), (10_000,)))
    at, layer = f"/v2/{TEST_HOST}/{name}", wanted.children[0].blobs[1]
    for path in (f"{at}/manifests/1", f"{at}/blobs/{layer.digest}"):
        assert asked(levels.edge, path)[0] == 200
    n_before = len(levels.origin.requests())
    for breakwater in (levels.edge, levels.datacenter):
        for path, digest in ((f"{at}/manifests/1", wanted.digest), (f"{at}/blobs/{layer.digest}", layer.digest)):
            status, headers, body = asked(breakwater, path, **{"If-None-Match": f'"{digest}"'})
            assert (status, body, headers["etag"]) == (304, b"", f'"{digest}"')
        status, headers, _ = asked(breakwater, f"{at}/blobs/{layer.digest}", Range=f"bytes={len(layer.content)}-")
        assert (status, headers["content-range"]) == (416, f"bytes */{len(layer.content)}")
    assert len(levels.origin.requests()) == n_before
