"""Which network addresses an upstream's hosts may have (INV-7, reliability: CVE-2026-2376, CVE-2026-44430).

Pure. The table is written out instead of trusting `ipaddress.is_global`: what the standard library calls global has
changed between patch releases and lets 6to4, NAT64 and site-local addresses pass. `wire.py` asks for every address it
is about to connect to, after the name was resolved, so a name that changes its answer gains nothing.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address

#: (network, what it is, whether `allow_private` permits it), the first match counts. From the IANA special-purpose
#: address registries (RFC 6890 and its updates).
_V4: tuple[tuple[IPv4Network, str, bool], ...] = tuple(
    (IPv4Network(network), word, permitted)
    for network, word, permitted in (
        ("0.0.0.0/8", "unspecified", False),  # 0.0.0.0 connects to loopback on Linux
        ("10.0.0.0/8", "private", True),
        ("100.64.0.0/10", "carrier-grade NAT", True),
        ("127.0.0.0/8", "loopback", True),
        ("169.254.0.0/16", "link-local", True),
        ("172.16.0.0/12", "private", True),
        ("192.0.0.0/24", "reserved", False),
        ("192.0.2.0/24", "documentation", False),
        ("192.88.99.0/24", "6to4 relay", False),
        ("192.168.0.0/16", "private", True),
        ("198.18.0.0/15", "benchmarking", True),
        ("198.51.100.0/24", "documentation", False),
        ("203.0.113.0/24", "documentation", False),
        ("224.0.0.0/4", "multicast", False),
        ("240.0.0.0/4", "reserved", False),
    )
)
_V6: tuple[tuple[IPv6Network, str, bool], ...] = tuple(
    (IPv6Network(network), word, permitted)
    for network, word, permitted in (
        ("::/128", "unspecified", False),
        ("::1/128", "loopback", True),
        ("::ffff:0:0/96", "IPv4-mapped", False),  # no resolver has a reason to answer these
        ("64:ff9b:1::/48", "local-use NAT64", False),
        ("2001::/23", "reserved", False),  # Teredo and ORCHID among them
        ("2001:db8::/32", "documentation", False),
        ("2002::/16", "6to4", False),
        ("3fff::/20", "documentation", False),
        ("fc00::/7", "unique local", True),
        ("fe80::/10", "link-local", True),
        ("fec0::/10", "site-local", True),
        ("ff00::/8", "multicast", False),
    )
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
#: The well-known NAT64 prefix carries an IPv4 address, which is judged in its place: networks with IPv6 alone reach
#: public registries through it (RFC 6052 §3.1 forbids it for addresses that are not global).
_NAT64 = ip_network("64:ff9b::/96")


def why_denied(address: Address, *, allow_private: bool) -> str | None:
    """What is wrong with connecting to `address`, in a word or two ("loopback"); None when it is permitted.

    `allow_private` permits what an organisation uses inside its own walls, and never what nobody should connect to.
    """
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            embedded = IPv4Address(int(address) & 0xFFFF_FFFF)
            inner = why_denied(embedded, allow_private=False)
            return f"NAT64 of {inner}" if inner else None
        for network6, word, permitted in _V6:
            if address in network6:
                return None if permitted and allow_private else word
        return None if address in _GLOBAL_UNICAST else "reserved"
    for network4, word, permitted in _V4:
        if address in network4:
            return None if permitted and allow_private else word
    return None


def literal(host: str) -> Address | None:
    """The address that `host` (no brackets) spells, or None when it is a name.

    Raises ValueError for spellings of an address other than the canonical one: decimal, octal, hexadecimal, shortened,
    with a zone or a final dot. Resolvers read them, people do not; they exist to slip past checks. A host whose last
    element is a number is never a name (WHATWG URL § ends in a number).
    """
    if ":" in host:
        if "%" in host:
            raise ValueError(f"{host[:80]!r} carries a zone")
        return ip_address(host)
    last = host.removesuffix(".").rpartition(".")[2].lower()
    is_hex = last.startswith("0x") and all(letter in "0123456789abcdef" for letter in last[2:])
    if not (last.isdigit() or is_hex):
        return None
    return IPv4Address(host)
