"""The token that changes something through the admin listener: where it is, and how it comes to be.

Without a setting it is a file in the store's own folder, which nobody else may enter: whoever can read that folder can
do anything with the store anyway, and commands of the same user find the token there by themselves.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from proxy.errors import InvalidSettings
from proxy.settings import Settings

#: Below the store's path, in the folder that the store has made and checked to be ours alone.
OF_THE_STORE = Path("breakwater", "admin-token")
#: What cannot be guessed: as many signs as 128 bits take in hex.
FEWEST_CHARS = 32


def place_of(settings: Settings) -> Path:
    """Where the token is, or will be after the first start."""
    written = settings.server.admin_token_file
    return Path(written) if written is not None else Path(settings.store.path) / OF_THE_STORE


def read(settings: Settings) -> str:
    """The token, "" where it cannot be read. For commands; reads a file."""
    try:
        return place_of(settings).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def obtain(settings: Settings) -> str:
    """The token to ask for; made where there is no setting and no file yet. For a server that holds the store's lock.

    Reads and writes files. Raises InvalidSettings when the file that the settings name cannot be used. Where the
    store's own cannot be written nobody knows the token, and changes come through a Unix socket or not at all.
    """
    path = place_of(settings)
    if settings.server.admin_token_file is not None:
        return _given(path)
    known = read(settings)
    if _is_strong(known):
        return known
    made = secrets.token_urlsafe(32)
    try:
        # Made anew and not written over: whoever has the old file open keeps the old one.
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(made + "\n")
    except OSError:
        pass  # read-only, or full: serving goes on
    return made


def _given(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidSettings([f"[server] admin_token_file: cannot read {path}: {reason}"]) from error
    if not _is_strong(token):
        raise InvalidSettings(
            [f"[server] admin_token_file: {path} must hold one line of {FEWEST_CHARS} or more signs without a space"]
        )
    return token


def _is_strong(token: str) -> bool:
    return len(token) >= FEWEST_CHARS and token.isascii() and token.isprintable() and " " not in token
