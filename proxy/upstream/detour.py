"""Which requests of an upstream go through its HTTP proxy. Pure.

`no_proxy` is read as most programs do: a host and all below it (`corp.test`, `.corp.test`), an address or a network
(`10.0.0.0/8`), any of these with a port, or `*` for everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network

from yarl import URL


def goes_direct(url: URL, no_proxy: Sequence[str]) -> bool:
    """Whether a request for `url` is excepted from the proxy."""
    host = (url.raw_host or "").lower().rstrip(".")
    return any(_fits(host, url.port, entry.strip().lower()) for entry in no_proxy)


def _fits(host: str, port: int | None, entry: str) -> bool:
    if entry == "*":
        return True
    name, mark, digits = entry.rpartition(":")
    if mark and digits.isdigit() and (name.endswith("]") or ":" not in name):
        if int(digits) != port:
            return False
        entry = name
    entry = entry.strip("[]")
    try:
        return ip_address(host) in ip_network(entry, strict=False)
    except ValueError:
        pass  # one of the two is a name
    entry = entry.removeprefix("*").lstrip(".")
    return bool(entry) and (host == entry or host.endswith(f".{entry}"))
