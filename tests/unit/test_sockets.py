"""proxy/service/sockets.py: which addresses a handed socket covers, and whose sockets they are."""

from __future__ import annotations

import os
import socket

import pytest

from proxy.service.sockets import NOTHING_HANDED, handed, not_covered


@pytest.mark.parametrize(
    ("bound", "address", "is_covered"),
    [
        ("127.0.0.1", "127.0.0.1:{}", True),
        ("127.0.0.1", "localhost:{}", True),
        ("127.0.0.1", "127.0.0.1:1", False),
        ("127.0.0.1", ":{}", False),
        ("127.0.0.1", "unix:/run/x", False),
        ("0.0.0.0", "127.0.0.1:{}", True),
        ("0.0.0.0", ":{}", True),
    ],
)
def test_a_handed_socket_covers_its_address(bound: str, address: str, is_covered: bool) -> None:
    """A settings file and a socket unit may name the same port: it is listened on once."""
    with socket.create_server((bound, 0)) as ours:
        listen = [address.format(ours.getsockname()[1])]
        assert not_covered(listen, [ours]) == ([] if is_covered else listen)


@pytest.mark.parametrize("environ", [{"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {}], ids=["another's", "nobody's"])
def test_sockets_meant_for_another_process_are_left_alone(environ: dict[str, str]) -> None:
    """sd_listen_fds(3): LISTEN_PID says for whom they are."""
    assert handed(environ, os.getpid()) == NOTHING_HANDED
