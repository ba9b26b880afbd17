"""upstream/detour.py and the way through an HTTP proxy, over real sockets."""

from __future__ import annotations

import pytest
from yarl import URL

from proxy.errors import Misbehaved, Unreachable
from proxy.fitting import ignored_proxies
from proxy.oci.names import Tag
from proxy.upstream.detour import goes_direct
from tests.support import images
from tests.support.endpoint import Endpoint
from tests.support.registry import ScriptedRegistry
from tests.support.upstream import ALPINE, asking

IMAGE = images.image(1, (10,))


@pytest.mark.parametrize(
    ("url", "entry", "direct"),
    [
        ("https://a.corp.test/v2/", "corp.test", True),
        ("https://a.corp.test/v2/", ".corp.test", True),
        ("https://a.corp.test/v2/", "*.corp.test", True),
        ("https://corp.test/v2/", "corp.test", True),
        ("https://CORP.test./v2/", "corp.TEST", True),
        ("https://notcorp.test/v2/", "corp.test", False),
        ("https://corp.test.evil/v2/", "corp.test", False),
        ("https://corp.test:5000/v2/", "corp.test:5000", True),
        ("https://corp.test/v2/", "corp.test:5000", False),
        ("https://corp.test/v2/", "corp.test:443", True),
        ("http://10.1.2.3/v2/", "10.0.0.0/8", True),
        ("http://10.1.2.3/v2/", "10.1.2.3", True),
        ("http://11.1.2.3/v2/", "10.0.0.0/8", False),
        ("http://[fd00::1]/v2/", "fd00::/8", True),
        ("http://[fd00::1]:5000/v2/", "[fd00::1]:5000", True),
        ("https://anything.test/v2/", "*", True),
        ("https://anything.test/v2/", "", False),
        ("https://anything.test/v2/", ".", False),
    ],
)
def test_no_proxy_is_read_as_others_read_it(url: str, entry: str, direct: bool) -> None:
    """A host and what is below it, an address, a network, each with a port where one is given."""
    assert goes_direct(URL(url), ["other.test", entry]) is direct


async def test_requests_go_to_the_proxy_and_to_nobody_else() -> None:
    """By the whole URL, with what belongs to the registry; the registry's own port sees no connection."""
    async with ScriptedRegistry() as registry:
        answered = (200, IMAGE.body)
        async with Endpoint(lambda _: answered) as proxy, asking(registry, http_proxy=proxy.url) as asked:
            found = await asked.client.manifest(ALPINE, Tag("1"))
            assert found.body == IMAGE.body
            (came,) = proxy.came
            assert came.target == f"{registry.url}/v2/library/alpine/manifests/1"
        assert registry.n_connections == 0


async def test_what_is_excepted_goes_direct() -> None:
    """no_proxy counts for each hop by itself."""
    async with ScriptedRegistry() as registry, Endpoint(lambda _: (502, b"")) as proxy:
        registry.put("library/alpine", IMAGE, "1")
        async with asking(registry, http_proxy=proxy.url, no_proxy=("127.0.0.0/8",)) as asked:
            assert (await asked.client.manifest(ALPINE, Tag("1"))).body == IMAGE.body
        assert proxy.n_connections == 0


async def test_https_goes_through_a_tunnel() -> None:
    """The proxy is told a host and a port, and sees nothing of the rest."""
    async with Endpoint(lambda _: (403, b"")) as proxy:
        async with asking("https://registry.test", http_proxy=proxy.url) as asked:
            with pytest.raises(Unreachable, match="HTTP proxy"):
                await asked.client.manifest(ALPINE, Tag("1"))
        (came,) = proxy.came
        assert (came.method, came.target) == ("CONNECT", "registry.test:443")
        assert "authorization" not in came.headers


async def test_behind_a_proxy_literals_are_still_judged() -> None:
    """Names cannot be: the proxy resolves them. What a redirect spells out can."""
    async with Endpoint(lambda _: (307, b"")) as proxy:
        async with asking("https://registry.test", http_proxy=proxy.url) as asked:
            with pytest.raises(Misbehaved, match="link-local"):
                asked.client._targets.redirect(URL("https://registry.test/"), "https://169.254.169.254/latest")
        assert proxy.n_connections == 0


def test_proxies_of_the_environment_are_told_and_not_used() -> None:
    """Never silently: somebody who set them expects them to count."""
    said = ignored_proxies({"https_proxy": "http://u:hunter2@p", "HTTP_PROXY": " ", "NO_PROXY": "x"})
    assert "https_proxy in the environment" in said
    assert "hunter2" not in said
    assert ignored_proxies({"PATH": "/bin"}) == ""
