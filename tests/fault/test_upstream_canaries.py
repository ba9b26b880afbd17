"""Forty forms of the machine's own address, and a canary that listens on all of them: 0 connections, so 0 bytes.

INV-7; CVE-2026-2376. Each form is tried as where a redirect leads, as the token realm of a challenge, and as where the
next page of a list is. The upstream itself is at a loopback address with another port: its literal `url` permits that
one, and nothing else of the machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from proxy.errors import UpstreamError
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.upstream.credentials.static import StaticCredentials
from tests.support import ports
from tests.support.registry import Guard, ScriptedRegistry, Twist, redirect
from tests.support.upstream import ALPINE, asking

#: Names that the resolver of these tests knows: name -> its answers, one for each time that it is asked.
NAMES: dict[str, Sequence[Sequence[str]]] = {
    "localhost": [["127.0.0.1", "::1"]],
    "localhost.": [["127.0.0.1", "::1"]],
    "localhost.localdomain": [["127.0.0.1"]],
    "canary.test": [["127.0.0.1"]],
    "six.canary.test": [["::1"]],
    "mapped.canary.test": [["::ffff:127.0.0.1"]],
    "nat64.canary.test": [["64:ff9b::7f00:1"]],
    "sixtofour.canary.test": [["2002:7f00:1::"]],
    "zero.canary.test": [["0.0.0.0"]],
    "rebinding.canary.test": [["10.0.0.1"], ["127.0.0.1"], ["127.0.0.1"]],
    "several.canary.test": [["169.254.169.254", "10.0.0.1", "127.0.0.1", "::1"]],
    "127.0.0.1.nip.test": [["127.0.0.1"]],
    "metadata.google.internal": [["169.254.169.254"]],
}

FORMS = [
    # written plainly
    "127.0.0.1", "127.0.0.2", "127.255.255.254", "[::1]", "0.0.0.0", "[::]", "169.254.169.254", "[fd00:ec2::254]",
    # decimal, octal, hexadecimal, shortened, with a dot too many
    "2130706433", "017700000001", "0x7f000001", "0X7F000001", "127.1", "127.0.1", "0177.0.0.1", "0x7f.0.0.1",
    "0x7f.1", "127.0.0.01", "0x7F.0x0.0x0.0x1", "127.0.0.1.", "0", "127.0.0.1%00.test",
    # mapped, translated, long and zoned
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:7f00:0001]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]",
    "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[0:0:0:0:0:0:0:1]", "[::1%25lo]", "[fe80::1]",
    # encoded, full width, other dots, a user name before it
    "%31%32%37.0.0.1", "１２７.0.0.1", "127。0。0。1", "registry.test@127.0.0.1", "127.0.0.1\\@registry.test",
    # names
    *NAMES,
]  # fmt: skip


class Canary:
    """Listens on every address of this machine that the forms mean, and counts who comes."""

    def __init__(self) -> None:
        self.port = ports.take()
        self.n_connections = 0
        self.received = bytearray()

    async def __aenter__(self) -> Canary:
        hosts = ["127.0.0.1", "127.0.0.2", "127.255.255.254", "::1"]
        self._servers = [await asyncio.start_server(self._came, host, self.port) for host in hosts]
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
            await server.wait_closed()

    async def _came(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        self.received += await reader.read(4096)
        writer.close()


class Resolver:
    """Answers from NAMES, the next answer each time."""

    def __init__(self) -> None:
        self._asked: dict[str, int] = {}

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        del port
        answers = NAMES.get(name)
        if answers is None:
            raise OSError("no such name")
        turn = self._asked[name] = self._asked.get(name, -1) + 1
        return answers[min(turn, len(answers) - 1)]


@pytest.fixture
async def canary() -> AsyncIterator[Canary]:
    async with Canary() as listening:
        yield listening


def test_there_are_forty_forms() -> None:
    """And each is another one."""
    assert len(set(FORMS)) == len(FORMS) >= 40


async def test_the_canary_sings(canary: Canary) -> None:
    """It would be seen: on each of its addresses."""
    for host in ("127.0.0.1", "127.0.0.2", "127.255.255.254", "::1"):
        reader, writer = await asyncio.open_connection(host, canary.port)
        writer.write(b"x")
        await reader.read()
        writer.close()
    assert canary.n_connections == 4
    assert bytes(canary.received) == b"xxxx"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("through", ["redirect", "realm", "next page"])
async def test_no_form_of_an_address_reaches_the_machine_itself(form: str, through: str, canary: Canary) -> None:
    """Twice each, because a resolver may say something else the second time."""
    url = f"http://{form}:{canary.port}/steal"
    raw = url.encode().decode("latin-1")  # headers are bytes: what is not ASCII goes as UTF-8
    digest = Digest.of(b"content")
    async with ScriptedRegistry() as registry:
        if through == "redirect":
            registry.rewrite(redirect(raw))
        elif through == "realm":
            registry.guard = Guard(scheme="bearer", realm=raw)
        else:
            registry.rewrite(Twist(body=b'{"manifests": []}', add=[("Link", f'<{raw}>; rel="next"')]))
        credentials = StaticCredentials("u", "hunter2")
        async with asking(registry, lookup=Resolver(), credentials=credentials) as asked:
            for _ in range(2):
                try:
                    if through == "next page":
                        await asked.client.referrers(ALPINE, digest, artifact_type="")
                    else:
                        await asked.client.manifest(ALPINE, Tag("1"))
                except UpstreamError as error:
                    assert "hunter2" not in str(error)
                    continue
                # A Link that cannot be read at all is none: the list ends there.
                assert through == "next page"
    assert canary.n_connections == 0
    assert bytes(canary.received) == b""
