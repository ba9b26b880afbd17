"""wiring/: settings become running parts, over real sockets and a real store, in this process."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from proxy.clock import SystemClock
from proxy.errors import InvalidSettings
from proxy.oci.endpoints import RepositoryPath
from proxy.planning import plan_of
from proxy.ports import Records
from proxy.settings import Settings, parse
from proxy.store.disk import DiskStore
from proxy.telemetry.log import EventLog, LineWriter
from proxy.wiring import Appliance
from tests.support import images
from tests.support.appliance import Answer, ask
from tests.support.registry import Guard, ScriptedRegistry

IMAGE = images.image(12, (3 * images.MIB, 400_000))
LAYER = max((blob.content for blob in IMAGE.blobs), key=len)
MANIFEST = "/v2/library/alpine/manifests/1"
BLOB = f"/v2/library/alpine/blobs/{images.digest_of(LAYER)}"


def settings(folder: Path, url: str, **sections: Any) -> Settings:
    """A store in `folder`, listeners on free ports, and docker.io at `url`."""
    server = {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0"} | sections.pop("server", {})
    store = {"path": str(folder / "store"), "capacity": "64MiB", "min_free": "1MiB"} | sections.pop("store", {})
    upstreams = {"docker.io": {"url": url}} | sections.pop("upstreams", {})
    return parse({"server": server, "store": store, "upstreams": upstreams, **sections})


class Running:
    """An appliance, and how to ask it."""

    def __init__(self, appliance: Appliance) -> None:
        self.appliance = appliance

    async def get(self, target: str, **words: Any) -> Answer:
        """Ask the data port."""
        return await ask(int(self.appliance.serving.data.addresses[0].rpartition(":")[2]), target, **words)

    async def admin(self, path: str) -> Answer:
        """Ask the admin listener, for what everybody may ask."""
        return await ask(int(self.appliance.admin_addresses[0].rpartition(":")[2]), path)

    async def quiet(self) -> None:
        """Wait until no transfer runs, and the store is counted."""
        while list(self.appliance.serving.blobs.running()) or not self.appliance.kept.capacity.is_counted:
            await asyncio.sleep(0)


@asynccontextmanager
async def started(wanted: Settings) -> AsyncIterator[Running]:
    """A running appliance; nothing of it may be left at the end."""
    stream = io.StringIO()
    writer = LineWriter(stream)
    log = EventLog(writer, lambda: 0.0, as_json=True, level="warning", requests="off")
    try:
        appliance = await Appliance.start(wanted, log)
        try:
            yield Running(appliance)
        finally:
            await appliance.aclose()
        assert appliance.kept.capacity.ledger.reserved == 0
        assert len(appliance.around.owner) == 0
    finally:
        await asyncio.to_thread(writer.close)


@pytest.fixture
async def registry() -> AsyncIterator[ScriptedRegistry]:
    async with ScriptedRegistry() as made:
        made.put("library/alpine", IMAGE, "1")
        yield made


async def test_it_pulls_cold_once_and_warm_without_asking_also_after_a_start(
    registry: ScriptedRegistry, tmp_path: Path
) -> None:
    """INV-1, INV-4: the main job, end to end; the store outlives the process, and upstream may be gone."""
    wanted = settings(tmp_path, registry.url)
    async with started(wanted) as running:
        for outcome in ("fwd=miss; stored", "hit"):
            manifest, blob = await running.get(MANIFEST), await running.get(BLOB)
            assert (manifest.body, blob.body) == (IMAGE.body, LAYER)
            assert blob.headers["cache-status"] == f"breakwater; {outcome}"
            await running.quiet()
        assert Counter(one.method for one in registry.requests) == {"GET": 2}
    before = len(registry.requests)
    unreachable = settings(tmp_path, "http://127.0.0.1:1")
    async with started(unreachable) as running:
        await running.quiet()
        assert (await running.get(MANIFEST)).body == IMAGE.body
        assert (await running.get(BLOB)).body == LAYER
        gone = await running.get("/v2/library/alpine/manifests/other")
        assert (gone.status, gone.code) == (502, "UNAVAILABLE")
    assert len(registry.requests) == before


async def test_counters_agree_with_upstreams_own_log(registry: ScriptedRegistry, tmp_path: Path) -> None:
    """product.md: the upstream counters agree exactly with the upstream's own log, token requests among them."""
    registry.guard = Guard(scheme="bearer")
    async with started(settings(tmp_path, registry.url)) as running:
        await asyncio.gather(*(running.get(MANIFEST) for _ in range(10)), *(running.get(BLOB) for _ in range(10)))
        await running.get("/v2/library/alpine/manifests/nope")
        await running.quiet()
        text = (await running.admin("/metrics")).body.decode()
        told = re.findall(r'^breakwater_upstream_requests_total\{.*status="(\d+)".*\} (\d+)\.0$', text, re.MULTILINE)
        counted: Counter[int] = Counter()
        for status, n in told:
            counted[int(status)] += int(n)
        assert counted == Counter(served.status for served in registry.log)
        n_bytes = re.search(r'^breakwater_upstream_bytes_total\{upstream="docker.io"\} (\S+)$', text, re.MULTILINE)
        assert n_bytes is not None and float(n_bytes[1]) >= len(LAYER)
        assert 'breakwater_upstream_up{upstream="docker.io"} 1.0' in text


async def test_a_hundred_cold_clients_cost_one_token_and_one_of_each(
    registry: ScriptedRegistry, tmp_path: Path
) -> None:
    """Coalescing for one tag, one blob and one token: behind a registry that wants tokens, 100 clients at once ask for
    one of each."""
    registry.guard = Guard(scheme="bearer")
    async with started(settings(tmp_path, registry.url)) as running:
        answers = await asyncio.gather(
            *(running.get(MANIFEST) for _ in range(50)), *(running.get(BLOB) for _ in range(50))
        )
        assert {answer.body for answer in answers} == {IMAGE.body, LAYER}
        assert registry.n_tokens == 1
        let_in = [served for served in registry.log if served.status == 200]
        assert Counter((one.method, one.path.rpartition("/")[0]) for one in let_in if one.path != "/token") <= Counter(
            {("GET", "/v2/library/alpine/manifests"): 1, ("GET", "/v2/library/alpine/blobs"): 1,
             ("HEAD", "/v2/library/alpine/blobs"): 1}
        )  # fmt: skip


async def test_a_disk_that_is_full_serves_and_says_degraded_with_200(
    registry: ScriptedRegistry, tmp_path: Path
) -> None:
    """A full disk is no reason to take a mirror out of service: readers get every byte, and readiness says why."""
    whole_disk = f"{shutil.disk_usage(tmp_path).total >> 20}MiB"
    async with started(settings(tmp_path, registry.url, store={"min_free": whole_disk})) as running:
        assert (await running.get(MANIFEST)).body == IMAGE.body
        assert (await running.get(BLOB)).body == LAYER
        await running.quiet()
        ready = await running.admin("/readyz")
        document = json.loads(ready.body)
        assert (ready.status, document["status"]) == (200, "degraded")
        assert "nothing new is kept" in document["reason"] and "min_free" in document["reason"]
        status = running.appliance.reports.status()
        assert (status["ready"], status["store"]["used_bytes"]) == ("degraded", 0)


async def test_an_upstream_that_fails_is_told_and_does_not_make_it_unready(tmp_path: Path) -> None:
    """What is cached is still served."""
    async with started(settings(tmp_path, "http://127.0.0.1:1")) as running:
        assert (await running.get(MANIFEST)).status == 502
        ready = await running.admin("/readyz")
        assert (ready.status, json.loads(ready.body)["reason"]) == (200, "upstreams failing: docker.io")
        assert running.appliance.reports.status()["upstreams"]["docker.io"]["state"] == "failing"


async def test_an_upstream_that_is_sealed_while_it_fails_is_no_trouble_any_more(tmp_path: Path) -> None:
    """It is not asked again, so it would be called failing for ever."""
    async with started(settings(tmp_path, "http://127.0.0.1:1")) as running:
        await running.get(MANIFEST)
        assert b"upstreams failing: docker.io" in (await running.admin("/readyz")).body
        sealed = settings(tmp_path, "http://127.0.0.1:1", server={"sealed": True})
        assert await running.appliance.reload(sealed) == ()
        assert json.loads((await running.admin("/readyz")).body) == {"status": "ready"}
        assert 'breakwater_upstream_up{upstream="docker.io"} 1.0' in (await running.admin("/metrics")).body.decode()


async def test_while_stopping_it_is_not_ready_and_running_answers_end(
    registry: ScriptedRegistry, tmp_path: Path
) -> None:
    """A load balancer turns away before connections are refused."""
    async with started(settings(tmp_path, registry.url)) as running:
        await running.get(MANIFEST)
        hurry = asyncio.get_running_loop().create_future()
        await running.appliance.drain(5.0, hurry)
        ready = await running.admin("/readyz")
        assert (ready.status, json.loads(ready.body)["status"]) == (503, "stopping")
        with pytest.raises(OSError):
            await running.get(MANIFEST)


async def test_sealed_it_never_contacts_anybody(registry: ScriptedRegistry, tmp_path: Path) -> None:
    """server.sealed: what is here is served at any age, the rest is a 404 that says sealed."""
    async with started(settings(tmp_path, registry.url)) as running:
        await running.get(MANIFEST)
        await running.get(BLOB)
        await running.quiet()
    before = len(registry.requests)
    wanted = settings(tmp_path, registry.url, server={"sealed": True})
    async with started(wanted) as running:
        assert (await running.get(MANIFEST)).body == IMAGE.body
        assert (await running.get(BLOB)).body == LAYER
        for target in ("/v2/library/alpine/manifests/2", f"/v2/library/alpine/blobs/sha256:{'0' * 64}"):
            answer = await running.get(target)
            assert answer.status == 404 and "sealed" in answer.message
    assert len(registry.requests) == before


def test_settings_become_routes_rules_and_origins(tmp_path: Path) -> None:
    """One immutable value: projects in the file's order, the policy of all in each project's rules."""
    wanted = settings(
        tmp_path,
        "https://registry-1.docker.io",
        upstreams={"quay.io": {"url": "https://quay.io", "sealed": True, "tag_ttl": "5m", "negative_ttl": "3s"}},
        projects={
            "platform": {
                "path": "platform",
                "upstream": "quay.io",
                "match": ["docker.io/library/**"],
                "deny": ["**:x"],
            },
            "empty": {},
        },
        policy={"deny": [f"sha256:{'0' * 64}"], "unmatched": "deny"},
    )
    plan = plan_of(wanted, {"docker.io": _Nobody()}, {})  # type: ignore[dict-item]
    assert set(plan.rules) == {"default", "platform", "empty"}
    assert plan.rules["default"].closed and not plan.rules["platform"].closed
    assert all(len(rules.policy_deny) == 1 for rules in plan.rules.values())
    route = plan.routes.route(RepositoryPath(None, "platform/a"), None)
    assert (route.project, route.host) == ("platform", "quay.io")
    origin = plan.origins.of(route)
    assert (origin.tag_policy.sealed, origin.tag_policy.tag_ttl_s, origin.negative_ttl_s) == (True, 300.0, 3.0)


class _Nobody:
    """Stands for a client that is never asked."""


async def test_a_start_that_fails_lets_go_of_the_store(registry: ScriptedRegistry, tmp_path: Path) -> None:
    """Rules that cannot be used are found when the store is open already: the next start need not wait for its lock."""
    robots = {"ci": {"secret_hash": f"$scrypt$ln=40,r=8,p=1${'A' * 22}${'A' * 43}", "projects": "default"}}
    with pytest.raises(InvalidSettings, match=r"robots\.ci"):
        async with started(settings(tmp_path, registry.url, robots=robots)):
            pass
    store = await DiskStore.open(tmp_path / "store", clock=SystemClock(), report=print, patience_s=0.0)
    await store.aclose()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"], ids=["with a server name", "without one"])
async def test_a_certificate_is_taken_up_whole_whatever_becomes_of_its_files_meanwhile(
    registry: ScriptedRegistry, tmp_path: Path, name: str
) -> None:
    """What was tried is what is used: files that change between the two must not leave half of a pair in use."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    trust = [_certified(name, cert, key)]
    wanted = settings(tmp_path, registry.url, server={"tls": {"cert": str(cert), "key": str(key)}})
    async with started(wanted) as running:
        address = running.appliance.serving.data.addresses[0]
        await _shake_hands(address, name, trust[0])
        trust.append(await asyncio.to_thread(_certified, name, cert, key))
        pins = running.appliance.kept.pins
        keep_all_of = pins.keep_all_of

        async def meanwhile(records: Records, hosts: frozenset[str]) -> None:
            await asyncio.to_thread(key.unlink)
            await keep_all_of(records, hosts)

        pins.keep_all_of = meanwhile  # type: ignore[method-assign]  # in the middle of the reload, and nowhere else
        assert await running.appliance.reload(wanted) == ()
        await _shake_hands(address, name, trust[1])
        with pytest.raises(ssl.SSLError):
            await _shake_hands(address, name, trust[0])


def _certified(name: str, cert: Path, key: Path) -> ssl.SSLContext:
    """Write a certificate of an authority of its own; how to trust that one alone."""
    authority = trustme.CA()
    issued = authority.issue_cert(name)
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(trust)
    return trust


async def _shake_hands(address: str, name: str, trust: ssl.SSLContext) -> None:
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=trust, server_hostname=name)
    writer.close()
    await writer.wait_closed()
