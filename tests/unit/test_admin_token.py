"""The token of the admin listener: where it comes from, and what becomes of files that are none."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from proxy import admin_token
from proxy.errors import InvalidSettings
from proxy.settings import Settings, parse


def settings_for(folder: Path, token_file: Path | None = None) -> Settings:
    server = {"admin_token_file": str(token_file)} if token_file else {}
    return parse({"server": server, "store": {"path": str(folder)}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store's path, with the folder that the store makes."""
    (tmp_path / "breakwater").mkdir(mode=0o700)
    return tmp_path


def test_the_first_start_makes_a_token_that_only_its_owner_reads(folder: Path) -> None:
    """And that commands of the same user find without being told."""
    settings = settings_for(folder)
    token = admin_token.obtain(settings)
    path = folder / "breakwater" / "admin-token"
    assert admin_token.place_of(settings) == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) >= admin_token.FEWEST_CHARS
    assert admin_token.read(settings) == token


def test_the_next_start_keeps_it(folder: Path) -> None:
    """Scripts and open tabs go on working."""
    assert admin_token.obtain(settings_for(folder)) == admin_token.obtain(settings_for(folder))


@pytest.mark.parametrize("content", ["", "short", "with a space " * 4, "é" * 40, "\x00" * 40])
def test_a_file_of_ours_that_holds_no_token_is_made_anew(folder: Path, content: str) -> None:
    """An empty token would let everybody in."""
    (folder / "breakwater" / "admin-token").write_text(content)
    token = admin_token.obtain(settings_for(folder))
    assert token != content and admin_token.read(settings_for(folder)) == token


def test_a_link_in_its_place_is_replaced_and_not_followed(folder: Path, tmp_path: Path) -> None:
    """What it points to is somebody's file."""
    target = tmp_path / "precious"
    target.write_text("keep me")
    (folder / "breakwater" / "admin-token").symlink_to(target)
    admin_token.obtain(settings_for(folder))
    assert target.read_text() == "keep me"


def test_where_nothing_can_be_written_there_is_a_token_that_nobody_knows(tmp_path: Path) -> None:
    """A store that cannot be written still serves; changes then come through a Unix socket alone."""
    settings = settings_for(tmp_path / "absent")
    first, second = admin_token.obtain(settings), admin_token.obtain(settings)
    assert first != second and len(first) >= admin_token.FEWEST_CHARS
    assert admin_token.read(settings) == ""


def test_the_file_of_the_settings_is_used_as_it_is(folder: Path, tmp_path: Path) -> None:
    """A closing newline does not belong to it."""
    given = tmp_path / "token"
    given.write_text("t" * 40 + "\n")
    assert admin_token.obtain(settings_for(folder, given)) == "t" * 40


@pytest.mark.parametrize("content", [None, b"", b"short\n", b"two words " * 5, b"\xff" * 40])
def test_a_file_of_the_settings_that_is_of_no_use_is_a_mistake_in_the_settings(
    folder: Path, tmp_path: Path, content: bytes | None
) -> None:
    """It says which key, which file and what is wrong; nothing is made in its place."""
    given = tmp_path / "token"
    if content is not None:
        given.write_bytes(content)
    with pytest.raises(InvalidSettings) as caught:
        admin_token.obtain(settings_for(folder, given))
    assert "admin_token_file" in str(caught.value) and str(given) in str(caught.value)
