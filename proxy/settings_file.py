"""Finds and reads the settings: the file, the environment, the user's cache folder. `proxy.settings` judges them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from proxy.errors import InvalidSettings
from proxy.settings.keys import Place
from proxy.settings.layers import (
    FILE_VARIABLE,
    Layer,
    built_in_layer,
    command_line_layer,
    environment_layer,
    file_layer,
)
from proxy.settings.reading import Effective, read

#: Where a settings file is looked for when nobody names one; the first that exists counts.
WELL_KNOWN_PLACES = (Path("breakwater.toml"), Path("/etc/breakwater/breakwater.toml"))


def load(
    config: str | None = None,
    options: Iterable[tuple[str, Place, Any]] = (),
    *,
    environ: Mapping[str, str] = os.environ,
) -> Effective:
    """The effective settings: built in, file, environment, then `options` of the command line.

    `config` names the file, else $BREAKWATER_CONFIG does, else the first of WELL_KNOWN_PLACES that exists. Raises
    InvalidSettings with every problem; a file that was named and cannot be read is one, never passed over.
    """
    layers = [built_in_layer(str(default_store(environ)))]
    if (file := _file(config, environ)) is not None:
        layers.append(file)
    layers.append(environment_layer(environ, layers))
    layers.append(command_line_layer(options, layers))
    return read(layers)


def default_store(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the store of somebody who configured none is: the user's cache folder (XDG Base Directory Specification).

    A store makes a folder `breakwater` of its own there, so its files are in ~/.cache/breakwater. Where 0.1.0 made one
    folder more, that store is used on.
    """
    named, home = environ.get("XDG_CACHE_HOME", ""), environ.get("HOME")
    # The specification says that a relative path in the variable is to be ignored.
    cache = Path(named) if named.startswith("/") else Path(home, ".cache") if home else Path("/var/cache")
    older = cache / "breakwater"
    return older if (older / "breakwater").is_dir() else cache


def _file(config: str | None, environ: Mapping[str, str]) -> Layer | None:
    if config is not None:
        return _read(Path(config), "--config")
    if named := environ.get(FILE_VARIABLE):
        return _read(Path(named), f"${FILE_VARIABLE}")
    for path in WELL_KNOWN_PLACES:
        # lexists: a dangling link is a file that somebody meant, and says so when read.
        if os.path.lexists(path):
            return _read(path, "found by its name")
    return None


def _read(path: Path, whence: str) -> Layer:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidSettings([f"{path}: cannot be read ({whence}): {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise InvalidSettings([f"{path}: not TOML: not UTF-8 at byte {error.start}"]) from error
    return file_layer(text, str(path), folder=str(path.absolute().parent))
