"""Real registries that want to know who asks: docker-registry with htpasswd, and with tokens of a server of our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import TEST_HOST
from tests.support.images import Image, image
from tests.support.origin import Origin
from tests.support.process import Breakwater, fetched
from tests.support.token_server import TokenServer

LOGIN = ("robot", "5ecret")
WRONG = ("robot", "wrong")
#: `htpasswd -B` of LOGIN: the registry takes bcrypt alone.
HTPASSWD = "robot:$2b$05$abcdefghijklmnopqrstuudOtBUGUcP115bSnB/1XRPoS05sdSgSW\n"

APP = image(61, (200_000,))
_NUMBER = count()


@pytest.fixture(scope="module")
def filled(scratch: Path) -> Path:
    """A folder with the content of a registry: the image, as private/app and as public/app."""
    with Origin(scratch / "filled") as origin:
        for name in ("private/app", "public/app"):
            origin.push(name, "1", APP)
    return scratch / "filled"


@contextmanager
def before(scratch: Path, origin: Origin, login: tuple[str, str] | None, **more: Any) -> Iterator[Breakwater]:
    """Breakwater before a registry, with a login in a file."""
    upstream: dict[str, Any] = {"url": origin.url, **more}
    folder = scratch / f"breakwater-{next(_NUMBER)}"
    if login is not None:
        folder.mkdir()
        (folder / "secret").write_text(login[1] + "\n")
        upstream["credentials"] = {"username": login[0], "password_file": str(folder / "secret")}
    with Breakwater(folder, {"upstreams": {TEST_HOST: upstream}}) as running:
        yield running
        running.stop_cleanly()


def get(breakwater: Breakwater, path: str) -> tuple[int, bytes]:
    """A GET at the data face, below the registry's source host."""
    return fetched(breakwater.port, f"/v2/{TEST_HOST}/{path}")


def pulled(breakwater: Breakwater, wanted: Image, name: str) -> list[int]:
    """The statuses of an image's parts, each of which has to be right where it is 200."""
    parts: Mapping[str, bytes] = {
        "manifests/1": wanted.body,
        f"manifests/{wanted.digest}": wanted.body,
        **{f"blobs/{blob.digest}": blob.content for blob in wanted.blobs},
    }
    statuses = []
    for path, content in parts.items():
        status, body = get(breakwater, f"{name}/{path}")
        statuses.append(status)
        assert status != 200 or body == content
    return statuses


# -- htpasswd ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def behind_a_password(filled: Path, scratch: Path) -> Iterator[Origin]:
    """The filled registry, which lets nobody in without LOGIN."""
    path = scratch / "htpasswd"
    path.write_text(HTPASSWD)
    with Origin(filled, auth={"htpasswd": {"realm": "basic realm", "path": str(path)}}) as origin:
        yield origin


def test_a_registry_with_htpasswd_is_pulled_from(scratch: Path, behind_a_password: Origin) -> None:
    """Basic, at the registry's own door; once it is known it is shown at once, so one request is one request."""
    n_before = len(behind_a_password.requests())
    with before(scratch, behind_a_password, LOGIN) as breakwater:
        assert set(pulled(breakwater, APP, "private/app")) == {200}
    statuses = [one.status for one in behind_a_password.requests()[n_before:]]
    assert statuses.count(401) == 1, statuses


def test_a_wrong_password_is_tried_once(scratch: Path, behind_a_password: Origin) -> None:
    """Harbor #22569: and the clients are told 403 with a sentence, never a 401 that they would answer themselves."""
    n_before = len(behind_a_password.requests())
    with before(scratch, behind_a_password, WRONG) as breakwater:
        for _ in range(3):
            assert set(pulled(breakwater, APP, "private/app")) == {403}
        _, refused = get(breakwater, "private/app/manifests/1")
        assert b"not tried again within a minute" in refused and b"wrong" not in refused
    statuses = [one.status for one in behind_a_password.requests()[n_before:]]
    assert statuses == [401, 401], "one that asks who we are, one with the wrong password"


def test_a_password_file_is_read_when_it_is_needed(scratch: Path, behind_a_password: Origin) -> None:
    """Nothing is reloaded: what upstream is shown is what the file holds now."""
    with before(scratch, behind_a_password, LOGIN) as breakwater:
        assert get(breakwater, "private/app/manifests/1")[0] == 200
        (breakwater.scratch / "secret").write_text("wrong\n")
        assert get(breakwater, "public/app/manifests/1")[0] == 403


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens(scratch: Path) -> Iterator[TokenServer]:
    """Gives tokens for public/… to everybody, and for the rest to LOGIN."""
    with TokenServer(scratch / "tokens", LOGIN, public="public/") as server:
        yield server


@pytest.fixture
def behind_tokens(filled: Path, tokens: TokenServer) -> Iterator[Origin]:
    """The filled registry, which lets in whoever shows a token that the server signed."""
    with Origin(filled, auth=tokens.settings) as origin:
        yield origin


def test_a_registry_with_tokens_is_pulled_from(scratch: Path, behind_tokens: Origin, tokens: TokenServer) -> None:
    """The login goes to the realm that the settings name, once for each repository, and never to the registry."""
    words = {"token_realms": [tokens.address], "allow_private": True}
    with before(scratch, behind_tokens, LOGIN, **words) as breakwater:
        for name in ("private/app", "public/app"):
            assert set(pulled(breakwater, APP, name)) == {200}
    assert tokens.asked == [(200, f"repository:{name}:pull", True) for name in ("private/app", "public/app")]


def test_a_realm_that_nobody_named_gets_no_login(scratch: Path, behind_tokens: Origin, tokens: TokenServer) -> None:
    """INV-7: what is public comes with an anonymous token; what is private is refused, with what to write."""
    with before(scratch, behind_tokens, LOGIN, allow_private=True) as breakwater:
        assert set(pulled(breakwater, APP, "public/app")) == {200}
        assert set(pulled(breakwater, APP, "private/app")) == {403}
        assert b"token_realms" in get(breakwater, "private/app/manifests/1")[1]
    assert not any(with_login for _, _, with_login in tokens.asked)


def test_a_token_server_refuses_a_wrong_password_once(
    scratch: Path, behind_tokens: Origin, tokens: TokenServer
) -> None:
    """A rollout that pulls with a wrong password is one failed login a minute, however many pull what."""
    words = {"token_realms": [tokens.address], "allow_private": True}
    with before(scratch, behind_tokens, WRONG, **words) as breakwater:
        for name in ("private/app", "public/app"):
            assert set(pulled(breakwater, APP, name)) == {403}
    assert [(status, with_login) for status, _, with_login in tokens.asked] == [(401, True)]
