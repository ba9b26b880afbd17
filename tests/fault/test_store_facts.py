"""What diskcache holds is lost, damaged, planted or of another version: nothing is run, nothing is raised, it goes on.

reliability.md §0.2 (CVE-2025-69872), T23 and T40.
"""

from __future__ import annotations

import pickle
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.ports import Use
from proxy.store.facts import DiskFacts
from proxy.store.filesystem import FileSystem
from proxy.store.layout import Folders
from proxy.store.upkeep import Upkeep
from proxy.store.workers import Workers

USES = [Use(Digest.of(b"%d" % n), n, n) for n in range(5000)]
VALUE = b"12345"


class Facts:
    """A folder of facts, and what was said about it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "facts"
        self.database = self.folder / "cache.db"
        self.reports: list[str] = []
        (root / "quarantine").mkdir()

    def opened(self) -> DiskFacts:
        """A new life."""
        uncounted = Upkeep(FileSystem(), Folders(path=self.root, root=-1), Workers(self.reports.append))
        return DiskFacts(self.root, self.reports.append, uncounted)

    @property
    def set_aside(self) -> list[str]:
        """What was moved to quarantine."""
        return sorted(path.name for path in (self.root / "quarantine").iterdir())

    def sql(self, statement: str, *values: object) -> None:
        """As somebody with a shell would."""
        with closing(sqlite3.connect(self.database)) as connection:
            connection.execute(statement, values)
            connection.commit()


@pytest.fixture
async def facts(tmp_path: Path) -> Facts:
    """With something in it, and closed."""
    made = Facts(tmp_path)
    life = made.opened()
    await life.remember(USES, [])
    await life.put("upper bound", VALUE)
    await life.aclose()
    assert made.database.is_file()
    return made


async def read(life: DiskFacts) -> list[Use]:
    """Everything remembered."""
    return [use async for batch in life.uses() for use in batch]


async def goes_on(facts: Facts) -> tuple[list[Use], bytes | None]:
    """What a new life finds; it must be able to remember, and its successor to find that."""
    life = facts.opened()
    found, value = await read(life), await life.get("upper bound")
    later = [Use(use.digest, use.size, use.counter + 1_000_000) for use in USES[:10]]
    for _ in range(2):  # some damage shows only in writing: what was told before that is lost with the rest
        await life.remember(later, [])
        await life.put("upper bound", b"new")
    await life.aclose()
    life = facts.opened()
    assert (await read(life))[-10:] == later
    assert await life.get("upper bound") == b"new"
    await life.aclose()
    return found, value


async def test_nothing_happened(facts: Facts) -> None:
    """The measure for the rest: all is there, and nothing is said."""
    assert await goes_on(facts) == (USES, VALUE)
    assert facts.reports == []
    assert facts.set_aside == []


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("column", ["value", "key"])
@pytest.mark.parametrize("where", ["a fact", "a segment", "a row of its own", "the schema"])
async def test_a_planted_pickle_is_not_run(facts: Facts, where: str, column: str) -> None:
    """T23: the row chooses how it is read, and no row may choose that."""
    sprung = facts.root / "sprung"
    trap = sqlite3.Binary(pickle.dumps(Trap(sprung)))
    pickle.loads(bytes(trap)).close()
    assert sprung.exists(), "the trap works"
    sprung.unlink()
    chosen = {"a fact": "fact/upper bound", "a segment": "tail/%", "schema": "schema", "a row of its own": "-"}
    like = chosen.get(where, "schema")
    if where == "a row of its own":
        columns = "(trap, 0, 1, trap)" if column == "key" else "('fact/mine', 1, 4, trap)"
        facts.sql(
            f"INSERT INTO Cache(key, raw, mode, value) SELECT {columns.replace('trap', '?1')[1:-1]}",
            trap,
        )
    elif column == "key":
        facts.sql(
            "UPDATE Cache SET key = ?1, raw = 0 WHERE rowid = (SELECT MIN(rowid) FROM Cache WHERE key LIKE ?2)",
            trap,
            like,
        )
    else:
        facts.sql("UPDATE Cache SET mode = 4, value = ?1 WHERE key LIKE ?2", trap, like)
    life = facts.opened()
    await read(life)
    await life.get("mine")
    await life.get("upper bound")
    await life.put("mine", b"x")
    await life.aclose()
    assert not sprung.exists()
    await goes_on(facts)
    assert not sprung.exists()
    assert len(facts.set_aside) == 1
    assert len(facts.reports) == 1


@pytest.mark.parametrize("is_read_first", [True, False], ids=["read first", "written first"])
@pytest.mark.parametrize("mode", [1, 2, 3, 4])
async def test_a_planted_file_name_is_not_followed(facts: Facts, mode: int, is_read_first: bool) -> None:
    """diskcache joins it unchecked: it would be read, and removed when the row is written."""
    victim = facts.root / "victim"
    victim.write_bytes(pickle.dumps(b"secret"))
    facts.sql("UPDATE Cache SET mode = ?, filename = '../victim', value = NULL WHERE key = 'fact/upper bound'", mode)
    life = facts.opened()
    if is_read_first:
        assert await life.get("upper bound") is None
    await life.put("upper bound", b"new")
    assert await life.get("upper bound") == b"new"
    await life.put("upper bound", b"")
    await life.aclose()
    assert pickle.loads(victim.read_bytes()) == b"secret"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("disk_min_file_size", "x"),
        ("disk_fetch", "x"),
        ("disk_unknown", 1),
        ("eviction_policy", "least-recently-used"),
        ("size_limit", 1),
        ("cull_limit", 1000),
        ("statistics", 1),
        ("sqlite_nonsense; DROP TABLE Cache", 1),
        ("sqlite_query_only", 1),
        ("_sql", "x"),
        ("get", "x"),
    ],
    ids=lambda value: str(value),
)
async def test_planted_settings_do_no_harm(facts: Facts, key: str, value: object) -> None:
    """diskcache sets attributes and pragmas from a table of the database. It goes on with it or without."""
    facts.sql("INSERT OR REPLACE INTO Settings VALUES (?, ?)", key, value)
    found, fact = await goes_on(facts)
    assert found in (USES, [])
    assert fact in (VALUE, None)


@pytest.mark.parametrize("schema", [b"2", b"", b"99"])
async def test_another_version_starts_over(facts: Facts, schema: bytes) -> None:
    """Rows that mean something else are not read; they are kept aside for the version that can."""
    facts.sql("UPDATE Cache SET value = ? WHERE key = 'schema'", schema)
    assert await goes_on(facts) == ([], None)
    assert len(facts.set_aside) == 1
    assert "version" in facts.reports[0]


def _removed(facts: Facts) -> None:
    facts.database.unlink()


def _emptied(facts: Facts) -> None:
    facts.database.write_bytes(b"")


def _text(facts: Facts) -> None:
    facts.database.write_text("this is not a database" * 1000)


def _no_table(facts: Facts) -> None:
    facts.sql("DROP TABLE Cache")


def _no_settings(facts: Facts) -> None:
    facts.sql("DROP TABLE Settings")


def _other_columns(facts: Facts) -> None:
    facts.sql("DROP TABLE Cache")
    facts.sql("CREATE TABLE Cache (key BLOB, raw INTEGER)")


def _old_copy(facts: Facts) -> None:
    facts.sql("DELETE FROM Cache WHERE key LIKE 'fact/%'")


def _stray_wal(facts: Facts) -> None:
    (facts.folder / "cache.db-wal").write_bytes(b"\xff" * 5000)


def _folder_gone(facts: Facts) -> None:
    for path in facts.folder.iterdir():
        path.unlink()
    facts.folder.rmdir()


@pytest.mark.parametrize(
    "damage",
    [_removed, _emptied, _text, _no_table, _no_settings, _other_columns, _old_copy, _stray_wal, _folder_gone],
    ids=lambda damage: damage.__name__.strip("_"),
)
async def test_damage_as_a_whole(facts: Facts, damage: Callable[[Facts], None]) -> None:
    """T40: nothing raises, and what is found is right or nothing."""
    damage(facts)
    found, fact = await goes_on(facts)
    assert found in (USES, [])
    assert fact in (VALUE, None)


@pytest.mark.parametrize("seed", range(40))
async def test_damage_at_random(facts: Facts, seed: int) -> None:
    """T40: cut off, overwritten or flipped anywhere. Every use that is found is one that was remembered."""
    chance = random.Random(seed)
    content = bytearray(facts.database.read_bytes())
    at = chance.randrange(len(content))
    match seed % 4:
        case 0:
            del content[at:]
        case 1:
            content[at : at + 4096] = chance.randbytes(4096)
        case 2:
            content[at] ^= 1 << chance.randrange(8)
        case 3:
            for _ in range(200):
                content[chance.randrange(len(content))] = chance.randrange(256)
    facts.database.write_bytes(content)
    found, fact = await goes_on(facts)
    assert set(found) <= set(USES)
    assert [use.counter for use in found] == sorted({use.counter for use in found})
    assert fact in (VALUE, None)


async def test_damage_while_it_runs(facts: Facts) -> None:
    """The file is overwritten beneath an open database: it starts over, at the latest when it is opened again."""
    life = facts.opened()
    assert await read(life) == USES
    facts.database.write_bytes(b"\x00" * 100_000)
    for n in range(20):
        await life.remember([Use(USES[n].digest, 1, 20_000 + n)], [])
        await life.put(f"fact {n}", b"x" * 60_000)
    await read(life)
    await life.aclose()
    await goes_on(facts)


async def test_old_damage_does_not_pile_up(facts: Facts) -> None:
    """The last few are kept for inspection."""
    for _ in range(6):
        facts.database.write_text("not a database, and longer than nothing" * 100)
        await goes_on(facts)
    assert len(facts.set_aside) == 3


async def test_a_fact_that_is_too_long_is_not_kept(facts: Facts) -> None:
    """At most 64 KiB; said, not raised."""
    life = facts.opened()
    await life.put("upper bound", bytes(65_537))
    assert await life.get("upper bound") == VALUE
    await life.aclose()
    assert len(facts.reports) == 1
