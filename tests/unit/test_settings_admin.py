"""The settings of the admin listener: names, the token's file and an address for probes."""

from __future__ import annotations

import pytest

from proxy.errors import InvalidSettings
from proxy.settings import Server, TcpAddress, parse


def server(**written: object) -> Server:
    """[server] with these keys, in a file that is right otherwise."""
    return parse({"server": written, "store": {"path": "/var/lib/breakwater"}}).server


def test_one_name_stands_for_a_list_and_capitals_do_not_matter() -> None:
    """As everywhere in the file, and in DNS."""
    assert server(admin_hosts="Breakwater.Example").admin_hosts == ("breakwater.example",)
    assert server().admin_hosts == ()


@pytest.mark.parametrize("name", ["breakwater.example:5001", "[::1]", "http://x", "a b", "", "*.example"])
def test_what_is_no_name_of_a_host_is_refused(name: str) -> None:
    """A port would never match, an address needs no entry, and a pattern would let rebinding in again."""
    with pytest.raises(InvalidSettings) as caught:
        server(admin_hosts=[name])
    assert "admin_hosts" in str(caught.value)


def test_probes_may_have_an_address_of_their_own() -> None:
    """The pod's address, while all else stays on this machine."""
    assert server(probe_listen="0.0.0.0:5002").probe_listen == TcpAddress("0.0.0.0", 5002)
    assert server().probe_listen is None


@pytest.mark.parametrize(
    "taken",
    [
        pytest.param({"listen": "0.0.0.0:5000", "probe_listen": "127.0.0.1:5000"}, id="the data port"),
        pytest.param({"admin_listen": "127.0.0.1:5001", "probe_listen": ":5001"}, id="the admin listener"),
    ],
)
def test_an_address_that_is_taken_is_said_to_be(taken: dict[str, str]) -> None:
    """Before anything listens: nothing of the admin listener is ever on the data port, probes neither."""
    with pytest.raises(InvalidSettings) as caught:
        server(**taken)
    assert "probe_listen" in str(caught.value)
