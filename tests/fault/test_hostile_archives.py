"""T25: hostile archives are refused with a sentence, leave nothing, and cost little memory.

Taken as `breakwater import` takes them, in one process, so that what they cost adds up where it can be seen.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from proxy.archives.files import Bundle, grouped, plain_pieces
from proxy.engine.intake import Terms
from proxy.errors import BreakwaterError
from proxy.settings import Settings, parse
from proxy.telemetry.log import EventLog, LineWriter
from proxy.wiring import Appliance
from tests.support.hostile import archives, good, written

Way = Callable[[Path], AsyncIterator[bytes]]

#: reliability.md T25. Measured after the first hundred, when the allocator has what it needs.
MAX_GROWTH = 64 << 20


def settings_in(folder: Path) -> Settings:
    return parse(
        {
            "server": {"sealed": True},
            "store": {"path": str(folder), "capacity": "64MiB", "min_free": "1MiB"},
            "upstreams": {"registry.test": {"url": "http://127.0.0.1:9"}},
        }
    )


def everything_below(folder: Path) -> set[str]:
    """Names below a folder, but for the store's own notes and facts, which change by themselves."""
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    return {str(name) for name in names if not {"facts", "notes"} & set(name.parts)}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def as_the_command_does(path: Path) -> AsyncIterator[bytes]:
    """A look first, which also turns docker-save into a layout."""
    [paths] = await asyncio.to_thread(grouped, [path])
    async for piece in in_thread((await asyncio.to_thread(Bundle.look, paths)).pieces()):
        yield piece


async def as_it_is(path: Path) -> AsyncIterator[bytes]:
    """Straight to the import, as somebody could send it to the admin listener."""
    async for piece in in_thread(plain_pieces([path])):
        yield piece


async def in_thread(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", [as_the_command_does, as_it_is])
async def test_every_hostile_archive_is_refused_and_leaves_nothing(tmp_path: Path, way: Way) -> None:
    """reliability.md §2.7 and T25: 200 archives, 200 refusals that say why, nothing outside, bounded memory."""
    with (tmp_path / "log").open("w") as stream:
        writer = LineWriter(stream)
        log = EventLog(writer, lambda: 0.0, as_json=False, level="error", requests="off")
        home = tmp_path / "home"
        home.mkdir()
        appliance = await Appliance.start(settings_in(home / "store"), log, listens=False)
        try:
            await _try_all(appliance, tmp_path, way)
        finally:
            await appliance.aclose()
            await asyncio.to_thread(writer.close)


async def _try_all(appliance: Appliance, tmp_path: Path, way: Way) -> None:
    await appliance.kept.capacity.counted()
    before, in_parent = everything_below(tmp_path / "home"), set(os.listdir(tmp_path))
    path = tmp_path / "bundle.tar"
    refused: dict[str, str] = {}
    resident = 0
    for n, (what, body) in enumerate(archives()):
        assert what not in refused, "each is another one"
        path.write_bytes(body)
        del body
        if n == 100:
            resident = resident_bytes()
        try:
            report = await appliance.freight.take(way(path), Terms(), lambda _: None)
            pytest.fail(f"{what}: taken, {report}")
        except BreakwaterError as error:
            refused[what] = str(error)
        path.unlink()
        assert appliance.kept.capacity.ledger.committed == 0, what
        assert appliance.kept.capacity.ledger.reserved == 0, what
        left = {name for name in everything_below(tmp_path / "home") - before if not _is_empty_folder(tmp_path, name)}
        assert not left, f"{what}: left {left}"
        assert set(os.listdir(tmp_path)) == in_parent, what
    assert len(refused) >= 275
    assert all(len(sentence) > 10 for sentence in refused.values()), refused
    assert resident_bytes() - resident < MAX_GROWTH

    # The same door is still open to what is good.
    path.write_bytes(written(good()))
    report = await appliance.freight.take(way(path), Terms(), lambda _: None)
    assert (report["n_images"], report["n_missing"]) == (1, 0)


def _is_empty_folder(tmp_path: Path, name: str) -> bool:
    """Shards of the store are made for a blob and stay when it goes."""
    path = tmp_path / "home" / name
    return path.is_dir() and not any(each.is_file() for each in path.rglob("*"))
