"""proxy/settings/changes.py: every key is decided about, and what is held back is named."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.settings import Settings, parse
from proxy.settings.changes import AT_START, LIVE, taken_up
from proxy.settings.keys import every_key


def settings(**sections: Any) -> Settings:
    return parse({"store": {"path": "/s"}, "upstreams": {"docker.io": {"url": "https://r"}}} | sections)


def test_every_key_is_taken_up_or_named() -> None:
    """A new key that is in neither table would be ignored by a reload without a word."""
    remade = {"upstreams", "projects", "policy", "robots"}
    keys = {".".join(pattern) for pattern in every_key() if pattern[0] not in remade and len(pattern) > 1}
    assert keys == LIVE | AT_START
    assert not LIVE & AT_START


@pytest.mark.parametrize(
    ("running", "wanted", "held"),
    [
        ({}, {"server": {"shutdown_grace": "1s"}}, ()),
        ({}, {"server": {"listen": ":1"}}, ("server.listen",)),
        ({}, {"server": {"listen": ":1"}, "store": {"path": "/t"}}, ("server.listen", "store.path")),
        (
            {"prefetch": {"list": "/l", "schedule": "1h"}},
            {"prefetch": {"list": ["/l", "/m"], "schedule": "2h", "platforms": "linux/amd64"}},
            ("prefetch.list", "prefetch.platforms", "prefetch.schedule"),
        ),
        ({}, {"server": {"tls": {"cert": "/c", "key": "/k"}}}, ("server.tls",)),
        ({"server": {"tls": {"cert": "/c", "key": "/k"}}}, {}, ("server.tls",)),
        (
            {"server": {"tls": {"cert": "/c", "key": "/k"}}},
            {"server": {"tls": {"cert": "/c2", "key": "/k2"}}},
            (),
        ),
    ],
    ids=[
        "what is live",
        "a socket that is open",
        "two sections",
        "another list that is to be here at all times",
        "TLS turned on",
        "TLS turned off",
        "another certificate",
    ],
)
def test_what_waits_is_named_and_stays_as_it_is(
    running: dict[str, Any], wanted: dict[str, Any], held: tuple[str, ...]
) -> None:
    """What is in effect afterwards is the new settings but for the keys that are named."""
    before, asked = settings(**running), settings(**wanted)
    after, named = taken_up(before, asked)
    assert named == held
    for key in held:
        section, _, name = key.partition(".")
        assert getattr(getattr(after, section), name) == getattr(getattr(before, section), name)
    assert taken_up(after, asked) == (after, held)
    if not held:
        assert after == asked
