"""Where requests of an upstream may go, and which realm may have its credentials (INV-7)."""

from __future__ import annotations

import pytest
from yarl import URL

from proxy.errors import Misbehaved
from proxy.upstream.policy import UpstreamPolicy
from proxy.upstream.targets import Targets, shown


def targets(
    url: str = "https://registry.test", *, realms: frozenset[str] = frozenset(), private: bool = False
) -> Targets:
    return Targets(UpstreamPolicy("registry.test", url, token_realms=realms, allow_private=private))


CURRENT = URL("https://registry.test/v2/library/a/blobs/sha256:0", encoded=True)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("https://cdn.test/a%2Fb~%7e?X-Amz-Signature=%2F%2f+a%20b&&=", None),
        ("https://cdn.test/a/../b?x", None),
        ("https://cdn.test:8443/x?redirect=https://10.0.0.1/", None),
        ("/rel/a%2Fb?token=%7E", "https://registry.test/rel/a%2Fb?token=%7E"),
        ("?only=query", "https://registry.test/v2/library/a/blobs/sha256:0?only=query"),
        ("//cdn.test/x?%41", "https://cdn.test/x?%41"),
    ],
)
def test_location_is_followed_byte_for_byte(location: str, expected: str | None) -> None:
    """A signed URL that somebody tidies is no longer signed; only what is relative is resolved (RFC 3986 §5)."""
    assert str(targets().redirect(CURRENT, location)) == (expected or location)


REFUSED = {
    "empty": "",
    "a space": "https://cdn.test/a b",
    "a line break": "https://cdn.test/\r\nX: y",
    "not ASCII": "https://cdn.tést/",
    "a backslash": "https:\\\\cdn.test\\x",
    "http from https": "http://cdn.test/x",
    "file": "file:///etc/passwd",
    "ftp": "ftp://cdn.test/x",
    "javascript": "javascript:alert(1)",
    "unix": "unix:///run/docker.sock",
    "no host": "https:///x",
    "user name": "https://user@cdn.test/",
    "user name and password": "https://user:secret@cdn.test/",
    "empty user name": "https://@cdn.test/",
    "fragment": "https://cdn.test/x#y",
    "empty fragment": "https://cdn.test/x#",
    "port 0": "https://cdn.test:0/",
    "port too large": "https://cdn.test:65536/",
    "port not a number": "https://cdn.test:http/",
    "percent-encoded host": "https://%6cocalhost/",
    "loopback": "https://127.0.0.1/",
    "loopback in six": "https://[::1]/",
    "mapped loopback": "https://[::ffff:127.0.0.1]/",
    "metadata": "https://169.254.169.254/latest/meta-data/",
    "unspecified": "https://0.0.0.0/",
    "decimal": "https://2130706433/",
    "octal": "https://0177.0.0.1/",
    "hexadecimal": "https://0x7f000001/",
    "short": "https://127.1/",
    "final dot": "https://127.0.0.1./",
    "zone": "https://[fe80::1%25eth0]/",
    "brackets left open": "https://[::1/",
}


@pytest.mark.parametrize("location", REFUSED.values(), ids=REFUSED.keys())
def test_redirect_that_leads_astray_is_refused(location: str) -> None:
    """INV-7, CVE-2026-2376: https is kept, addresses are judged, and nothing odd is interpreted."""
    with pytest.raises(Misbehaved):
        targets().redirect(CURRENT, location)
    with pytest.raises(Misbehaved):
        targets().realm(location)


def test_sentence_about_a_redirect_keeps_the_query_to_itself() -> None:
    """Signatures are in queries, and sentences end in logs and answers."""
    with pytest.raises(Misbehaved) as caught:
        targets().redirect(CURRENT, "http://cdn.test/x?X-Amz-Signature=5ecret")
    assert "5ecret" not in str(caught.value) and "cdn.test/x" in str(caught.value)
    assert shown(URL("https://h/a?sig=5ecret", encoded=True)) == "https://h/a"


def test_plain_upstream_may_redirect_to_plain_http() -> None:
    """https is kept where there is https; an upstream that is plain by its settings has none to lose."""
    plain = targets("http://registry.test:5000")
    assert str(plain.redirect(URL("http://registry.test:5000/v2/"), "http://cdn.test/x")) == "http://cdn.test/x"


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1:5001/", "http://127.0.0.2:5000/", "http://[::1]:5000/", "http://127.0.0.1/"]
)
def test_literal_url_permits_its_own_address_and_port_alone(location: str) -> None:
    """product.md § allow_private: a literal url permits itself, and not the rest of the machine."""
    local = targets("http://127.0.0.1:5000")
    base = URL("http://127.0.0.1:5000/v2/")
    assert str(local.redirect(base, "http://127.0.0.1:5000/x")) == "http://127.0.0.1:5000/x"
    with pytest.raises(Misbehaved):
        local.redirect(base, location)


def test_allow_private_permits_private_addresses() -> None:
    """An upstream inside the walls may redirect to storage inside the walls."""
    inside = targets("https://registry.test", private=True)
    assert str(inside.redirect(CURRENT, "https://10.0.0.5:9000/b")) == "https://10.0.0.5:9000/b"


@pytest.mark.parametrize(
    ("realm", "named", "receives"),
    [
        ("https://registry.test/token", set(), True),
        ("https://REGISTRY.test:443/token", set(), True),
        ("https://registry.test:8443/token", set(), False),
        ("https://auth.registry.test/token", set(), False),
        ("https://registry.test.evil.test/token", set(), False),
        ("https://auth.test/token", {"auth.test"}, True),
        ("https://AUTH.test/token", {"auth.test"}, True),
        ("https://auth.test:5001/token", {"auth.test"}, True),
        ("https://auth.test:5001/token", {"auth.test:5001"}, True),
        ("https://auth.test:5002/token", {"auth.test:5001"}, False),
        ("https://auth.test/token", {"auth.test:443"}, True),
        ("https://evil-auth.test/token", {"auth.test"}, False),
        ("https://auth.test.evil.test/token", {"auth.test"}, False),
        ("https://evil.test/auth.test", {"auth.test"}, False),
        ("https://registry.test.:443/token", set(), False),
    ],
)
def test_credentials_go_to_the_own_origin_and_to_named_realms(realm: str, named: set[str], receives: bool) -> None:
    """INV-7, CVE-2026-33540: the realm that an upstream names is not thereby trusted."""
    judge = targets(realms=frozenset(named))
    assert judge.receives_credentials(judge.realm(realm)) is receives


@pytest.mark.parametrize(
    "url",
    [
        "",
        "registry.test",
        "ftp://registry.test",
        "https://",
        "https://registry.test/?x=y",
        "https://a b/",
        "https://127.1",
    ],
)
def test_url_that_is_no_registry_is_refused_at_once(url: str) -> None:
    """A client that could never ask anybody is not made."""
    with pytest.raises(ValueError):
        targets(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://registry.test", "https://registry.test/v2/a/tags/list"),
        ("https://registry.test/", "https://registry.test/v2/a/tags/list"),
        ("https://registry.test:5000/mirror/", "https://registry.test:5000/mirror/v2/a/tags/list"),
        ("https://[2606:4700::1]:5000", "https://[2606:4700::1]:5000/v2/a/tags/list"),
    ],
)
def test_path_of_the_url_comes_before_v2(url: str, expected: str) -> None:
    """Registries behind a path are asked below it."""
    assert str(targets(url).at("/v2/a/tags/list")) == expected
