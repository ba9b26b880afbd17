"""Which addresses an upstream may have (INV-7)."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from proxy.upstream.addresses import literal, why_denied

#: address, what it is, whether allow_private permits it.
SPECIAL = [
    ("0.0.0.0", "unspecified", False),
    ("0.255.255.255", "unspecified", False),
    ("10.0.0.1", "private", True),
    ("10.255.255.255", "private", True),
    ("100.64.0.1", "carrier-grade NAT", True),
    ("100.127.255.255", "carrier-grade NAT", True),
    ("127.0.0.1", "loopback", True),
    ("127.255.255.254", "loopback", True),
    ("169.254.169.254", "link-local", True),
    ("172.16.0.1", "private", True),
    ("172.31.255.255", "private", True),
    ("192.0.0.8", "reserved", False),
    ("192.0.2.1", "documentation", False),
    ("192.88.99.1", "6to4 relay", False),
    ("192.168.1.1", "private", True),
    ("198.18.0.1", "benchmarking", True),
    ("198.51.100.7", "documentation", False),
    ("203.0.113.7", "documentation", False),
    ("224.0.0.1", "multicast", False),
    ("239.255.255.255", "multicast", False),
    ("240.0.0.1", "reserved", False),
    ("255.255.255.255", "reserved", False),
    ("::", "unspecified", False),
    ("::1", "loopback", True),
    ("::127.0.0.1", "reserved", False),
    ("::ffff:127.0.0.1", "IPv4-mapped", False),
    ("::ffff:8.8.8.8", "IPv4-mapped", False),
    ("::ffff:0:127.0.0.1", "reserved", False),
    ("64:ff9b::127.0.0.1", "NAT64 of loopback", False),
    ("64:ff9b::10.0.0.1", "NAT64 of private", False),
    ("64:ff9b::169.254.169.254", "NAT64 of link-local", False),
    ("64:ff9b:1::8.8.8.8", "local-use NAT64", False),
    ("100::1", "reserved", False),
    ("2001::1", "reserved", False),
    ("2001:db8::1", "documentation", False),
    ("2002:7f00:1::", "6to4", False),
    ("2002:808:808::1", "6to4", False),
    ("3fff::1", "documentation", False),
    ("4000::1", "reserved", False),
    ("fc00::1", "unique local", True),
    ("fd00:ec2::254", "unique local", True),
    ("fe80::1", "link-local", True),
    ("fec0::1", "site-local", True),
    ("ff02::1", "multicast", False),
]

GLOBAL = [
    "1.1.1.1",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "169.253.255.255",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.0",
    "192.167.255.255",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2001:200::1",
    "2003::1",
    "2606:4700::6810:1",
    "3ffe::1",
    "64:ff9b::8.8.8.8",
]


@pytest.mark.parametrize(("text", "word", "_permitted"), SPECIAL, ids=[row[0] for row in SPECIAL])
def test_special_address_is_denied_by_default(text: str, word: str, _permitted: bool) -> None:
    """INV-7: nothing inside our own walls, and nothing translated to it, is connected to unless that is said."""
    assert why_denied(ip_address(text), allow_private=False) == word


@pytest.mark.parametrize(("text", "word", "permitted"), SPECIAL, ids=[row[0] for row in SPECIAL])
def test_allow_private_permits_what_an_organisation_uses_and_no_more(text: str, word: str, permitted: bool) -> None:
    """allow_private is for private registries; it opens neither multicast nor translated addresses."""
    assert why_denied(ip_address(text), allow_private=True) == (None if permitted else word)


@pytest.mark.parametrize("text", GLOBAL)
def test_global_address_is_permitted(text: str) -> None:
    """The neighbours of every special range are ordinary addresses; NAT64 is judged by what is in it (RFC 6052
    §3.1).
    """
    assert why_denied(ip_address(text), allow_private=False) is None


@pytest.mark.parametrize(
    "host",
    [
        "registry-1.docker.io",
        "localhost",
        "localhost.",
        "0x7f.example",
        "127.0.0.1.nip.io",
        "1e100.net",
        "xn--0x7f",
        "a",
    ],
)
def test_name_is_not_taken_for_an_address(host: str) -> None:
    """A host whose last element is not a number is a name; what it resolves to is judged later."""
    assert literal(host) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "8.8.8.8", "::1", "::ffff:127.0.0.1", "2606:4700::1"])
def test_canonical_address_is_read(host: str) -> None:
    """Addresses written as people write them are allowed in URLs, and then judged."""
    assert str(literal(host)) == str(ip_address(host))


@pytest.mark.parametrize(
    "host",
    [
        "127.1",
        "127.0.1",
        "2130706433",
        "017700000001",
        "0177.0.0.1",
        "0x7f000001",
        "0X7F000001",
        "0x7f.1",
        "0x7f.0.0.0x1",
        "127.0.0.01",
        "127.0.0.1.",
        "0",
        "0x",
        "256.0.0.1",
        "1.2.3.4.5",
        "99999999999",
        "fe80::1%eth0",
        "::1%25lo",
        ":::",
        "example.1",
    ],
)
def test_address_spelled_in_another_way_is_refused(host: str) -> None:
    """Decimal, octal, hexadecimal, short and zoned spellings exist to slip past checks (WHATWG URL)."""
    with pytest.raises(ValueError):
        literal(host)
