"""Silence, names that do not resolve, TLS that does not hold (reliability.md §3, T34): told apart, in bounded time.

The deadlines are short here, and no test says how long anything took: only that it ended, and as what.
"""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import trustme

from proxy.errors import Misbehaved, Timeout, Unreachable
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.upstream.policy import Deadlines
from tests.support import images
from tests.support.registry import Gate, Guard, ScriptedRegistry, Twist, redirect
from tests.support.upstream import ALPINE, asking

IMAGE = images.image(4, (1000,))
LATEST = Tag("latest")
SHORT = Deadlines(connect_s=0.25, sock_connect_s=0.25, answer_s=0.25)
CALLS = {
    "manifest": lambda client: client.manifest(ALPINE, LATEST),
    "manifest_head": lambda client: client.manifest_head(ALPINE, LATEST),
    "blob": lambda client: client.blob(ALPINE, Digest.parse(IMAGE.digest)),
    "blob_size": lambda client: client.blob_size(ALPINE, Digest.parse(IMAGE.digest)),
    "tags": lambda client: client.tags(ALPINE, n=None, last=None),
    "referrers": lambda client: client.referrers(ALPINE, Digest.parse(IMAGE.digest), artifact_type=""),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@pytest.fixture
async def registry() -> AsyncIterator[ScriptedRegistry]:
    async with ScriptedRegistry() as scripted:
        scripted.put(str(ALPINE), IMAGE, "latest")
        yield scripted


@every_call
async def test_silence_before_the_headers_ends(registry: ScriptedRegistry, call: Any) -> None:
    """Accepted, read, and never answered."""
    registry.rewrite(Twist(gate=Gate(), holds_headers=True))
    async with asking(registry, deadlines=SHORT) as asked:
        with pytest.raises(Timeout):
            await call(asked.client)


@every_call
async def test_headers_that_drip_end(registry: ScriptedRegistry, call: Any) -> None:
    """A byte now and then resets nothing: the deadline is for all of them (reliability.md §2.5)."""
    registry.rewrite(Twist(drip_s=0.005))
    async with asking(registry, deadlines=SHORT) as asked:
        with pytest.raises(Timeout):
            await call(asked.client)


async def test_document_that_stalls_ends(registry: ScriptedRegistry) -> None:
    """Headers and body of a manifest share one deadline."""
    registry.rewrite(Twist(gate=Gate(), hold_at=[10]))
    async with asking(registry, deadlines=SHORT) as asked:
        with pytest.raises(Timeout):
            await asked.client.manifest(ALPINE, LATEST)


async def test_refusal_that_stalls_still_ends(registry: ScriptedRegistry) -> None:
    """Upstream's words are wanted, and not waited for without an end."""
    registry.rewrite(Twist(status=403, body=b"x" * 100, gate=Gate(), hold_at=[10]))
    async with asking(registry, deadlines=SHORT) as asked:
        with pytest.raises(Timeout):
            await asked.client.manifest(ALPINE, LATEST)


async def test_redirects_and_tokens_share_the_deadline_of_the_answer(registry: ScriptedRegistry) -> None:
    """Many small delays are one long one."""
    registry.guard = Guard(scheme="bearer")
    registry.rewrite(redirect("?again", path="/v2/*", after=1, times=2), Twist(path="/v2/*", after=1, drip_s=0.005))
    async with asking(registry, deadlines=SHORT) as asked:
        with pytest.raises(Timeout):
            await asked.client.manifest(ALPINE, LATEST)


async def test_headers_of_a_blob_have_a_deadline_and_its_body_none(registry: ScriptedRegistry) -> None:
    """A layer may take hours, as long as it keeps the pace."""
    content = bytes(100_000)
    registry.put_blob(str(ALPINE), content)
    gate = Gate()
    registry.rewrite(Twist(gate=gate, hold_at=[50_000]))
    async with asking(registry, deadlines=SHORT) as asked:
        body = await asked.client.blob(ALPINE, Digest.of(content))
        await asyncio.sleep(3 * SHORT.answer_s)  # the one thing that no event can stand for: a deadline not being there
        gate.open()
        found = 0
        while piece := await body.read():
            found += len(piece)
        await body.close()
    assert found == len(content)


async def test_host_that_takes_no_connections_ends() -> None:
    """A full queue of connections looks like a host behind a firewall: SYN without an answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        port = deaf.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            async with asking(f"http://127.0.0.1:{port}", deadlines=Deadlines(0.1, 0.1, 10)) as asked:
                with pytest.raises(Timeout, match="connecting"):
                    await asked.client.manifest(ALPINE, LATEST)
                assert asked.asked == []
        finally:
            for filler in fillers:
                filler.close()


async def test_refused_connection_is_no_request() -> None:
    """Nothing was sent, so nothing is counted."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with asking(f"http://127.0.0.1:{port}") as asked:
        with pytest.raises(Unreachable, match="connection refused"):
            await asked.client.manifest(ALPINE, LATEST)
        assert asked.asked == []


async def test_second_address_is_tried_when_the_first_is_deaf(registry: ScriptedRegistry) -> None:
    """Happy eyeballs (RFC 8305): a broken route to one address does not hide the others."""

    async def lookup(name: str, port: int) -> Sequence[str]:
        del name, port
        return ["::1", "127.0.0.1"]

    async with asking(f"http://dual.test:{registry.port}", lookup=lookup, allow_private=True) as asked:
        assert (await asked.client.manifest(ALPINE, LATEST)).body == IMAGE.body


# -- names -------------------------------------------------------------------------------------------------------------


async def test_name_that_does_not_resolve_is_said_so() -> None:
    """DNS failures are reported as such."""

    async def lookup(name: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async with asking("https://gone.test", lookup=lookup) as asked:
        with pytest.raises(Unreachable, match=r"gone\.test: its name does not resolve"):
            await asked.client.manifest(ALPINE, LATEST)
        assert asked.asked == []


async def test_name_with_no_addresses_is_said_so() -> None:
    """An empty answer is none."""

    async def lookup(name: str, port: int) -> Sequence[str]:
        return []

    async with asking("https://empty.test", lookup=lookup) as asked:
        with pytest.raises(Unreachable, match="does not resolve"):
            await asked.client.manifest(ALPINE, LATEST)


async def test_resolver_that_hangs_is_not_waited_for() -> None:
    """Looking up a name is part of connecting."""
    never = asyncio.Event()

    async def lookup(name: str, port: int) -> Sequence[str]:
        await never.wait()
        return []

    async with asking("https://slow.test", lookup=lookup, deadlines=SHORT) as asked:
        with pytest.raises(Timeout):
            await asked.client.manifest(ALPINE, LATEST)
        never.set()
        for _ in range(5):
            await asyncio.sleep(0)


async def test_names_of_this_machine_are_resolved_by_the_system(registry: ScriptedRegistry) -> None:
    """The default is the system's own resolver."""
    async with asking(f"http://localhost:{registry.port}", allow_private=True) as asked:
        assert (await asked.client.manifest(ALPINE, LATEST)).body == IMAGE.body


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def served(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def test_trusted_certificate_is_taken(authority: trustme.CA) -> None:
    """An upstream with a CA of its own."""
    async with ScriptedRegistry(tls=served(authority.issue_cert("127.0.0.1"))) as registry:
        registry.put(str(ALPINE), IMAGE, "latest")
        async with asking(registry, tls=trusting(authority)) as asked:
            assert (await asked.client.manifest(ALPINE, LATEST)).body == IMAGE.body


BEGAN = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
CERTIFICATES: dict[str, tuple[dict[str, Any], bool, str]] = {
    "expired": ({"not_before": BEGAN, "not_after": BEGAN + datetime.timedelta(days=1)}, True, "expired"),
    "for another name": ({"identity": "elsewhere.test"}, True, "IP address mismatch|doesn't match"),
    "by nobody we trust": ({}, False, "unable to get local issuer|self.signed"),
}


@pytest.mark.parametrize(("issue", "trusts", "piece"), CERTIFICATES.values(), ids=CERTIFICATES.keys())
async def test_certificate_that_does_not_hold_is_said_so(
    authority: trustme.CA, issue: dict[str, Any], trusts: bool, piece: str
) -> None:
    """Never http instead, never unverified; and nothing is sent."""
    certificate = authority.issue_cert(
        issue.get("identity", "127.0.0.1"), **{key: value for key, value in issue.items() if key != "identity"}
    )
    async with ScriptedRegistry(tls=served(certificate)) as registry:
        async with asking(registry, tls=trusting(authority) if trusts else None) as asked:
            with pytest.raises(Unreachable, match=f"certificate does not hold: .*({piece})"):
                await asked.client.manifest(ALPINE, LATEST)
            assert asked.asked == []
        assert registry.requests == []


async def test_plain_http_where_tls_is_wanted_is_said_so() -> None:
    """A wrong port is found by its sentence."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with asking(f"https://127.0.0.1:{port}") as asked:
        with pytest.raises(Unreachable, match="TLS failed"):
            await asked.client.manifest(ALPINE, LATEST)
    server.close()
    await server.wait_closed()


async def test_tls_handshake_that_hangs_ends() -> None:
    """It is part of connecting."""
    accepted: list[asyncio.StreamWriter] = []

    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with asking(f"https://127.0.0.1:{port}", deadlines=Deadlines(0.1, 0.1, 10)) as asked:
        with pytest.raises(Timeout, match="connecting"):
            await asked.client.manifest(ALPINE, LATEST)
    for writer in accepted:
        writer.close()
    server.close()
    await server.wait_closed()


async def test_redirect_from_https_to_http_is_not_followed(authority: trustme.CA, registry: ScriptedRegistry) -> None:
    """T12: what came by TLS stays on TLS."""
    async with ScriptedRegistry(tls=served(authority.issue_cert("127.0.0.1"))) as upstream:
        upstream.rewrite(redirect(f"{registry.url}/b"))
        async with asking(upstream, tls=trusting(authority), allow_private=True) as asked:
            with pytest.raises(Misbehaved, match="https is kept"):
                await asked.client.manifest(ALPINE, LATEST)
    assert registry.n_connections == 0


async def test_body_over_tls_that_is_cut_is_not_whole(authority: trustme.CA) -> None:
    """Without a length and without a close_notify: what ends so has no size to be whole by."""
    content = bytes(100_000)
    async with ScriptedRegistry(tls=served(authority.issue_cert("127.0.0.1"))) as upstream:
        upstream.put_blob(str(ALPINE), content)
        upstream.rewrite(Twist(cut_at=50_000, cut="rst"))
        async with asking(upstream, tls=trusting(authority)) as asked:
            body = await asked.client.blob(ALPINE, Digest.of(content))
            with pytest.raises(Unreachable):
                while await body.read():
                    pass
            await body.close()
