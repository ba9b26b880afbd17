"""Redirects and places that must receive nothing (INV-7; reliability.md T12, T15, T16)."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from proxy.errors import Misbehaved, Unauthorised, Unreachable, UpstreamError
from proxy.oci.digest import Digest
from proxy.upstream.credentials.static import StaticCredentials
from proxy.upstream.policy import UpstreamPolicy
from proxy.upstream.targets import Targets
from proxy.upstream.wire import Wire
from tests.support import images
from tests.support.appliance import appliance
from tests.support.registry import Guard, ScriptedRegistry, Twist, redirect
from tests.support.upstream import ALPINE, Asking, asking

CONTENT = b"what was asked for" * 100
DIGEST = Digest.of(CONTENT)
BLOBS = "/v2/library/alpine/blobs/*"
SIGNED = "X-Amz-Algorithm=AWS4&X-Amz-Credential=a%2Fb%2f~%7E+c%20d&&empty=&X-Amz-Signature=5igned"


@pytest.fixture
async def registry() -> AsyncIterator[ScriptedRegistry]:
    async with ScriptedRegistry() as scripted:
        scripted.put_blob(str(ALPINE), CONTENT)
        yield scripted


@pytest.fixture
async def storage() -> AsyncIterator[ScriptedRegistry]:
    """Another origin, which answers every GET with the content."""
    async with ScriptedRegistry(Twist(status=200, body=CONTENT)) as scripted:
        yield scripted


async def fetched(asked: Asking) -> bytes:
    body = await asked.client.blob(ALPINE, DIGEST)
    pieces = []
    try:
        while piece := await body.read():
            pieces.append(piece)
    finally:
        await body.close()
    return b"".join(pieces)


# -- that are followed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_followed_and_counted(
    registry: ScriptedRegistry, storage: ScriptedRegistry, status: int
) -> None:
    """Each hop is a request of its own: the first of its kind, the others called redirects."""
    registry.rewrite(Twist(status=status, add=[("Location", f"{storage.url}/b")], body=b""))
    async with asking(registry, allow_private=True) as asked:
        assert await fetched(asked) == CONTENT
        assert asked.asked == [("blob", "GET", status), ("redirect", "GET", 200)]


async def test_signed_url_is_sent_byte_for_byte(registry: ScriptedRegistry, storage: ScriptedRegistry) -> None:
    """T15: `%2F` and `%7E` stay as they came (reliability.md §0.9), or the signature no longer holds."""
    registry.rewrite(redirect(f"{storage.url}/a%2Fb/../c~%7e?{SIGNED}"))
    async with asking(registry, allow_private=True) as asked:
        await fetched(asked)
    assert storage.requests[0].target == f"/a%2Fb/../c~%7e?{SIGNED}"


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("/artifacts-downloads/x?token=%7E", "/artifacts-downloads/x"),
        ("../other", "/v2/library/alpine/other"),
        ("?x=y", f"/v2/library/alpine/blobs/{DIGEST}"),
    ],
)
async def test_relative_redirect_is_resolved(registry: ScriptedRegistry, location: str, path: str) -> None:
    """Google Artifact Registry sends them (peers.md §5.5)."""
    registry.rewrite(redirect(location, times=1), Twist(status=200, body=CONTENT))
    async with asking(registry) as asked:
        assert await fetched(asked) == CONTENT
    assert registry.requests[-1].path == path


@pytest.mark.parametrize(("n_bytes", "n_connections"), [(1000, 1), (1_000_000, 4)], ids=["short", "long"])
async def test_body_of_a_redirect_is_read_if_it_is_short(
    registry: ScriptedRegistry, n_bytes: int, n_connections: int
) -> None:
    """A page that says "moved" keeps its connection; one without an end is not read to keep it."""
    moved = Twist(path=BLOBS, status=307, add=[("Location", "/v2/moved/blobs/x")], body=bytes(n_bytes))
    registry.rewrite(moved, Twist(status=200, body=CONTENT))
    async with asking(registry) as asked:
        for _ in range(3):
            assert await fetched(asked) == CONTENT
    assert registry.n_connections == n_connections


async def test_list_goes_on_at_its_own_origin_alone(registry: ScriptedRegistry, storage: ScriptedRegistry) -> None:
    """The next page is asked for with our login, so another host may not name itself there."""
    registry.rewrite(Twist(body=b'{"manifests": []}', add=[("Link", f'<{storage.url}/v2/>; rel="next"')]))
    async with asking(registry, allow_private=True) as asked:
        with pytest.raises(Misbehaved, match="another host"):
            await asked.client.referrers(ALPINE, DIGEST, artifact_type="")
    assert storage.n_connections == 0


async def test_nothing_but_what_belongs_there_reaches_another_origin(
    registry: ScriptedRegistry, storage: ScriptedRegistry
) -> None:
    """T15: no Authorization, no cookie, nothing of ours; headers are made for each hop anew."""

    async def lookup(name: str, port: int) -> Sequence[str]:
        del name, port
        return ["127.0.0.1"]  # names, because cookies belong to names

    registry.guard = Guard(scheme="bearer", realm=f"http://registry.inside.test:{registry.port}/token")
    where = f"http://storage.inside.test:{storage.port}/b"
    cookie = [("Location", where), ("Set-Cookie", "session=5ecret; Domain=inside.test; Path=/")]
    registry.rewrite(Twist(path=BLOBS, after=1, status=307, body=b"", add=cookie))
    storage.rewrite(Twist(status=200, body=CONTENT, add=[("Set-Cookie", "theirs=5ecret")]))
    url = f"http://registry.inside.test:{registry.port}"
    async with asking(url, lookup=lookup, allow_private=True) as asked:
        await fetched(asked)
        await fetched(asked)
    expected = {"host", "user-agent", "accept", "accept-encoding"}
    assert [one.names() for one in storage.requests] == [expected, expected]
    assert all(one.names() <= expected | {"authorization"} for one in registry.requests)


async def test_redirect_within_the_origin_keeps_the_token(registry: ScriptedRegistry) -> None:
    """It is for that origin."""
    registry.guard = Guard(scheme="bearer")
    registry.put_blob("library/moved", CONTENT)
    registry.rewrite(redirect(f"/v2/library/moved/blobs/{DIGEST}", path=BLOBS, after=1))
    async with asking(registry) as asked:
        assert await fetched(asked) == CONTENT
    assert registry.requests[-1].header("Authorization").startswith("Bearer ")


async def test_token_left_behind_is_not_picked_up_again(registry: ScriptedRegistry, storage: ScriptedRegistry) -> None:
    """Else a foreign host could send us back, token and all, to a repository of its choice (cf. CVE-2024-45336)."""
    registry.guard = Guard(scheme="bearer")
    registry.rewrite(redirect(f"{storage.url}/b", path=BLOBS, after=1))
    storage.rewrite(redirect(f"{registry.url}/v2/library/secret/blobs/{DIGEST}"))
    async with asking(registry, allow_private=True) as asked:
        with pytest.raises(UpstreamError):
            await fetched(asked)
    assert "authorization" not in registry.asked("/v2/library/secret/*")[0].names()


async def test_basic_login_never_leaves_the_origin(registry: ScriptedRegistry, storage: ScriptedRegistry) -> None:
    """INV-7 for the password itself."""
    registry.guard = Guard(scheme="basic", login=("robot", "5ecret"))
    registry.rewrite(redirect(f"{storage.url}/b", path=BLOBS, after=1))
    async with asking(registry, allow_private=True, credentials=StaticCredentials("robot", "5ecret")) as asked:
        await fetched(asked)
        await fetched(asked)
    assert all("authorization" not in one.names() for one in storage.requests)


# -- that are not ------------------------------------------------------------------------------------------------------


async def test_sixth_redirect_is_not_followed(registry: ScriptedRegistry) -> None:
    """Five hops, and then it is a game; loops end there too."""
    registry.rewrite(redirect("?again"))
    async with asking(registry) as asked:
        with pytest.raises(Misbehaved, match="more than 5 times"):
            await fetched(asked)
    assert len(registry.requests) == 6


async def test_redirect_at_five_hops_is_followed(registry: ScriptedRegistry) -> None:
    """The fifth is the last that is."""
    registry.rewrite(redirect("?again", times=5))
    async with asking(registry) as asked:
        assert await fetched(asked) == CONTENT


@pytest.mark.parametrize(
    "headers",
    [[], [("Location", "/a"), ("Location", "/b")], [("Location", "")], [("Location", "http://")]],
    ids=["none", "two", "empty", "no host"],
)
async def test_redirect_without_one_location_is_misbehaviour(
    registry: ScriptedRegistry, headers: list[tuple[str, str]]
) -> None:
    """Nobody guesses."""
    registry.rewrite(Twist(status=307, body=b"", add=headers))
    async with asking(registry) as asked:
        with pytest.raises(Misbehaved):
            await fetched(asked)
    assert len(registry.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
async def test_refusal_by_storage_asks_nobody_for_a_token(
    registry: ScriptedRegistry, storage: ScriptedRegistry, status: int
) -> None:
    """A 401 from storage is no challenge to us, whatever realm it names."""
    challenge = [("WWW-Authenticate", f'Bearer realm="{storage.url}/token"')]
    registry.rewrite(redirect(f"{storage.url}/b?{SIGNED}"))
    storage.rewrite(Twist(status=status, body=b"", add=challenge))
    async with asking(registry, allow_private=True) as asked:
        with pytest.raises(Unreachable):
            await fetched(asked)
    assert len(storage.requests) == 1


async def test_signatures_are_in_no_sentence_or_traceback(registry: ScriptedRegistry) -> None:
    """A signed URL is a credential: it is shown without its query, and aiohttp's own texts are not passed on."""
    async with ScriptedRegistry() as storage:
        registry.rewrite(redirect(f"{storage.url}/b?{SIGNED}"))
        texts = []
        for twist in (
            Twist(status=403, body=b""),
            Twist(status=500, body=b""),
            Twist(no_answer="rst"),
            Twist(raw=b"nonsense\r\n\r\n"),
            Twist(cut_at=3, status=200, body=CONTENT),
        ):
            storage.rewrite(twist)
            async with asking(registry, allow_private=True) as asked:
                with pytest.raises(UpstreamError) as caught:
                    await fetched(asked)
            texts += traceback.format_exception(caught.value, chain=True)
    async with asking(registry, allow_private=True) as asked:
        with pytest.raises(UpstreamError) as caught:
            await fetched(asked)
    texts += traceback.format_exception(caught.value, chain=True)
    assert "5igned" not in "".join(texts)


# -- forty ways to write the wrong place -------------------------------------------------------------------------------

#: Hosts as a redirect or a realm may name them; each leads, or is read by some resolver as leading, to this machine,
#: its neighbours or a cloud's metadata.
PLACES = [
    "127.0.0.1",
    "127.0.0.2",
    "127.255.255.254",
    "127.1",
    "127.0.1",
    "2130706433",
    "017700000001",
    "0177.0.0.1",
    "0177.0.0.01",
    "0x7f000001",
    "0x7F.0.0.1",
    "0x7f.1",
    "127.0.0.01",
    "127.0.0.1.",
    "0",
    "0.0.0.0",
    "[::]",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[fe80::1]",
    "[fec0::1]",
    "[fd00:ec2::254]",
    "[ff02::1]",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "169.254.169.254",
    "[::ffff:169.254.169.254]",
    "2852039166",
    "224.0.0.1",
    "255.255.255.255",
    "localhost",
    "localhost.",
    "LOCALHOST",
    "metadata.trap",
    "mapped.trap",
    "translated.trap",
    "mixed.trap",
]

#: What the resolver of these tests answers.
NAMES: dict[str, list[str]] = {
    "localhost": ["127.0.0.1", "::1"],
    "metadata.trap": ["169.254.169.254"],
    "mapped.trap": ["::ffff:127.0.0.1"],
    "translated.trap": ["2002:7f00:1::", "64:ff9b::7f00:1"],
    "mixed.trap": ["10.0.0.1", "127.0.0.1"],
}


async def trap_lookup(name: str, port: int) -> Sequence[str]:
    del port
    return NAMES[name.lower().rstrip(".")]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("by", ["redirect", "realm"])
async def test_wrong_place_gets_no_connection(registry: ScriptedRegistry, place: str, by: str) -> None:
    """INV-7, T12, T13, T16: at whatever port, in whatever spelling, by redirect or realm: 0 connections, 0 bytes."""
    async with ScriptedRegistry() as trap:
        where = f"http://{place}:{trap.port}/latest/meta-data"
        if by == "redirect":
            registry.rewrite(redirect(where))
        else:
            registry.guard = Guard(scheme="bearer", realm=where)
        login = StaticCredentials("robot", "5ecret")
        async with asking(registry, lookup=trap_lookup, credentials=login) as asked:
            with pytest.raises(Misbehaved) as caught:
                await fetched(asked)
            assert asked.asked == [("blob", "GET", 307 if by == "redirect" else 401)]
        assert trap.n_connections == 0
        assert "5ecret" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "[::ffff:127.0.0.1]"])
async def test_address_is_judged_at_the_socket_whoever_let_it_pass(host: str) -> None:
    """The last line: below every check of URLs, a socket is not even made for a place that is denied."""
    policy = UpstreamPolicy("registry.test", "https://registry.test")
    wire = Wire(policy, Targets(policy), observer=lambda _: None)
    async with ScriptedRegistry() as trap:
        with pytest.raises(Misbehaved, match="allow_private"):
            await wire.send("GET", URL(f"http://{host}:{trap.port}/"), {}, kind="blob")
        assert trap.n_connections == 0
    await wire.aclose()


async def test_name_that_changes_its_answer_is_judged_at_every_connect() -> None:
    """T16: public when it is checked, loopback when it is used. There is one look, and it is the one that is used."""
    looks: list[str] = []

    async def rebinding(name: str, port: int) -> Sequence[str]:
        del port
        looks.append(name)
        return ["192.0.2.1"] if len(looks) == 1 else ["127.0.0.1"]

    async with ScriptedRegistry() as trap:
        async with asking(f"http://rebinding.test:{trap.port}", lookup=rebinding) as asked:
            for _ in range(3):
                with pytest.raises(Misbehaved, match="allow_private"):
                    await fetched(asked)
        assert trap.n_connections == 0
    assert len(looks) == 3


async def test_good_addresses_of_a_name_are_used_and_bad_ones_left_out() -> None:
    """One bad record does not close an upstream, nor is it ever tried."""

    async def lookup(name: str, port: int) -> Sequence[str]:
        del name, port
        return ["::ffff:127.0.0.1", "127.0.0.1"]

    async with ScriptedRegistry() as registry:
        registry.put_blob(str(ALPINE), CONTENT)
        async with asking(f"http://inside.test:{registry.port}", lookup=lookup, allow_private=True) as asked:
            assert await fetched(asked) == CONTENT
        assert registry.requests[0].header("Host") == f"inside.test:{registry.port}"


async def test_name_inside_the_walls_needs_allow_private(registry: ScriptedRegistry) -> None:
    """The sentence says what to set."""

    async def lookup(name: str, port: int) -> Sequence[str]:
        del name, port
        return ["127.0.0.1"]

    url = f"http://inside.test:{registry.port}"
    async with asking(url, lookup=lookup) as asked:
        with pytest.raises(Misbehaved, match=r"127\.0\.0\.1 \(loopback\); set allow_private"):
            await fetched(asked)
    assert registry.n_connections == 0
    async with asking(url, lookup=lookup, allow_private=True) as asked:
        assert await fetched(asked) == CONTENT


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
async def test_environment_sends_us_nowhere(
    registry: ScriptedRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, variable: str
) -> None:
    """No proxy and no netrc that nobody set for us."""
    async with ScriptedRegistry() as trap:
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login robot password 5ecret\n")
        monkeypatch.setenv(variable, trap.url)
        monkeypatch.setenv("NETRC", str(netrc))
        async with asking(registry) as asked:
            assert await fetched(asked) == CONTENT
        assert trap.n_connections == 0
    assert "authorization" not in registry.requests[0].names()


async def test_urls_of_foreign_layers_are_followed_by_nobody(registry: ScriptedRegistry, tmp_path: Path) -> None:
    """INV-7, CVE-2020-15157: an image whose layers are to be had elsewhere is served, and elsewhere hears nothing."""
    image = images.image(8, (5000, 6000))
    document = json.loads(image.body)
    async with ScriptedRegistry(Twist(status=200, body=CONTENT)) as trap:
        for number, layer in enumerate(document["layers"]):
            layer["urls"] = [f"{trap.url}/{number}", f"http://localhost:{trap.port}/"]
        document["layers"][1]["digest"] = absent = str(Digest.of(b"only elsewhere"))
        registry.put(str(ALPINE), replace(image, body=json.dumps(document).encode()), "1")
        async with appliance(registry, tmp_path, policy={"allow_private": True}) as serves:
            assert (await serves.get("/v2/library/alpine/manifests/1")).status == 200
            told = [await serves.get(f"/v2/library/alpine/blobs/{layer['digest']}") for layer in document["layers"]]
            assert [answer.status for answer in told] == [200, 404]
            assert (await serves.get(f"/v2/library/alpine/blobs/{absent}", method="HEAD")).status == 404
        assert trap.n_connections == 0


async def test_refusal_is_told_to_each_of_many(registry: ScriptedRegistry) -> None:
    """What is refused for one is refused for all who ask at once."""
    registry.guard = Guard(scheme="bearer", login=("somebody", "else"))
    async with asking(registry) as asked:
        outcomes = await asyncio.gather(*(fetched(asked) for _ in range(20)), return_exceptions=True)
    assert all(isinstance(one, Unauthorised) for one in outcomes)
    assert len(registry.asked("/token")) == 1
