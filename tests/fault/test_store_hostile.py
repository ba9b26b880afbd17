"""Things planted in the store's folder (reliability.md T24), and a folder that is not ours.

Whatever is in the place of a file of ours goes to quarantine; what it points at is untouched; the store goes on.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from proxy.errors import Unavailable
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest, Verifier
from proxy.oci.names import Tag
from proxy.ports import Holding, LinkRecord, TagRecord, Use
from proxy.store.disk import DiskStore
from proxy.store.layout import LAYOUT
from tests.support.clock import ManualClock
from tests.support.disks import as_root

BODY = b"ours"
DIGEST = Digest.of(BODY)
HOLDING = Holding("platform", "registry.test:5000", "team/web")
TAG = TagRecord("v1", Descriptor("m", DIGEST, 4), 1.0)
LINK = LinkRecord(Descriptor("m", DIGEST, 4))
CANARY = b"somebody else's, and to stay as it is"

SHARD = f"blobs/sha256/{DIGEST.hex[:2]}"
BLOB = f"{SHARD}/{DIGEST.hex}"
RECORDS = "records/platform/registry.test%3A5000/team/web"


# -- what can be planted -----------------------------------------------------------------------------------------------


def symlink(at: Path, outside: Path) -> None:
    """To a file that is not ours."""
    at.symlink_to(outside / "canary")


def symlink_to_folder(at: Path, outside: Path) -> None:
    """To a folder that is not ours."""
    at.symlink_to(outside)


def dangling(at: Path, outside: Path) -> None:
    """To nothing yet: following it would make a file there."""
    at.symlink_to(outside / "not there")


def hard_link(at: Path, outside: Path) -> None:
    """A second name of a file that is not ours."""
    at.hardlink_to(outside / "canary")


def fifo(at: Path, outside: Path) -> None:
    """Opening it waits for a writer that never comes."""
    os.mkfifo(at)


def folder(at: Path, outside: Path) -> None:
    """With something in it, so that a rename does not simply replace it."""
    at.mkdir()
    (at / "inside").write_bytes(CANARY)


def unix_socket(at: Path, outside: Path) -> None:
    """Cannot be opened at all."""
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(at.parent)  # a socket's path has little room
        try:
            made.bind(at.name)
        finally:
            os.chdir(here)


FOR_FILES = [symlink, dangling, hard_link, fifo, folder, unix_socket]
FOR_FOLDERS = [symlink, symlink_to_folder, dangling, hard_link, fifo]


@dataclass
class Scene:
    """A store with one of everything, and a folder beside it that must not be touched."""

    root: Path
    outside: Path
    reports: list[str] = field(default_factory=list)

    @classmethod
    def made(cls, tmp_path: Path) -> Scene:
        """Nothing in it yet."""
        scene = cls(tmp_path / "store", tmp_path / "outside")
        scene.outside.mkdir()
        (scene.outside / "canary").write_bytes(CANARY)
        return scene

    async def opened(self) -> DiskStore:
        """The store, at once."""
        return await DiskStore.open(self.root, clock=ManualClock(), report=self.reports.append, patience_s=0)

    @property
    def ours(self) -> Path:
        """The folder of the store itself."""
        return self.root / "breakwater"

    def plant(self, where: str, what: Callable[[Path, Path], None]) -> None:
        """In the place of what is there."""
        at = self.ours / where
        at.parent.mkdir(parents=True, exist_ok=True)
        if at.exists():
            at.rename(self.outside / f"was-{at.name}")
        what(at, self.outside)

    def untouched(self) -> bool:
        """Whether everything outside is as it was, and nothing was added."""
        canary = self.outside / "canary"
        added = [path.name for path in self.outside.iterdir() if not path.name.startswith("was-")]
        return canary.read_bytes() == CANARY and canary.stat().st_mode & 0o777 == 0o644 and added == ["canary"]


async def put_all(store: DiskStore) -> None:
    """One of everything."""
    ingest = await store.blobs.ingest(DIGEST, Verifier(DIGEST))
    await ingest.write(BODY)
    await ingest.commit()
    ingest.close()
    await store.records.put_tag(HOLDING, TAG)
    await store.records.put_link(HOLDING, LINK)
    await store.facts.remember([Use(DIGEST, 4, 1)], [])


async def has_all(store: DiskStore) -> bool:
    """Whether all of it is there and right."""
    blob = await store.blobs.open(DIGEST)
    if blob is None:
        return False
    body = os.pread(blob.fd, 100, 0)
    blob.close()
    uses = [use async for batch in store.facts.uses() for use in batch]
    tag = await store.records.tag(HOLDING, Tag("v1"))
    return body == BODY and tag == TAG and list(await store.records.links(HOLDING)) == [LINK] and len(uses) == 1


@pytest.mark.parametrize("when", ["while it runs", "before it starts"])
@pytest.mark.parametrize(
    ("where", "what"),
    [
        (where, what)
        for where in (BLOB, f"{RECORDS}/_tags/v1", f"{RECORDS}/_manifests/sha256/{DIGEST.hex}")
        for what in FOR_FILES
    ]
    + [
        (where, what)
        for where in ("blobs/sha256", SHARD, "records/platform", f"{RECORDS}/_tags")
        for what in FOR_FOLDERS
    ]
    + [("ingest/" + f"sha256-{DIGEST.hex}.01234567", what) for what in FOR_FILES],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
async def test_what_is_planted_is_set_aside(
    tmp_path: Path, where: str, what: Callable[[Path, Path], None], when: str
) -> None:
    """T24: refused or quarantined, the target untouched, nothing waits, and all can be had anew."""
    where = where.replace("…", DIGEST.hex)
    scene = Scene.made(tmp_path)
    store = await scene.opened()
    await put_all(store)
    if when == "before it starts":
        await store.aclose()
        scene.plant(where, what)
        store = await scene.opened()
    else:
        scene.plant(where, what)
    assert await has_all(store) is where.startswith("ingest/")
    assert [blob.size async for batch in store.blobs.scan() for blob in batch] in ([], [len(BODY)])
    assert len([each async for each in store.records.scan()]) <= 1
    await store.blobs.resume_ingest(DIGEST, Verifier(DIGEST))
    await store.blobs.sweep_ingest()
    await put_all(store)
    assert await has_all(store)
    await store.blobs.delete([DIGEST])
    assert scene.untouched()
    assert len(list((scene.ours / "quarantine").iterdir())) == 1
    assert any("quarantine/" in report for report in scene.reports)
    await store.aclose()


@pytest.mark.parametrize("what", FOR_FILES, ids=lambda what: what.__name__)
@pytest.mark.parametrize("where", [BLOB, f"{RECORDS}/_tags/v1"])
async def test_what_is_planted_is_written_past(tmp_path: Path, where: str, what: Callable[[Path, Path], None]) -> None:
    """T24: also when nobody looked there before writing."""
    scene = Scene.made(tmp_path)
    store = await scene.opened()
    scene.plant(where, what)
    await put_all(store)
    assert await has_all(store)
    assert scene.untouched()
    await store.aclose()


@pytest.mark.parametrize(
    "where",
    [
        "blobs/README",
        "blobs/md5",
        "blobs/sha256/zz",
        f"{SHARD}/{DIGEST.hex}.part",
        f"{SHARD}/{'0' * 64}",
        "blobs/sha256/.x",
    ],
)
async def test_unknown_names_under_blobs_are_never_fatal(tmp_path: Path, where: str) -> None:
    """A file of somebody's is quarantined and said, and no reason not to start; lost+found is no file of somebody's."""
    scene = Scene.made(tmp_path)
    store = await scene.opened()
    await put_all(store)
    (scene.ours / where).write_bytes(CANARY)
    (scene.ours / "blobs" / "lost+found").mkdir()
    (scene.ours / "blobs" / "sha256" / "lost+found").mkdir()
    assert [blob.digest async for batch in store.blobs.scan() for blob in batch] == [DIGEST]
    assert len(scene.reports) == 1
    assert not (scene.ours / where).exists()
    assert (scene.ours / "blobs" / "lost+found").is_dir()
    await store.aclose()


@pytest.mark.parametrize(
    "where", ["records/.x", "records/platform/up per", f"{RECORDS}/_others", f"{RECORDS}/Caps", f"{RECORDS}/_tags/-x"]
)
async def test_unknown_names_under_records_cost_nothing_else(tmp_path: Path, where: str) -> None:
    """A name that cannot be a record's is quarantined; every record stays."""
    scene = Scene.made(tmp_path)
    store = await scene.opened()
    await put_all(store)
    (scene.ours / where).write_bytes(CANARY)
    found = [each async for each in store.records.scan()]
    assert found == [(HOLDING, [TAG], [LINK])]
    assert not (scene.ours / where).exists()
    await store.aclose()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b" ",
        lambda content: content[:-10] + bytes([content[-10] ^ 1]) + content[-9:],
        lambda content: content.replace(b"record 1", b"record 2"),
        lambda content: b"\x80\x04cos\nsystem\n",
        lambda content: bytes(len(content)),
        lambda content: b"[" * 5000,
    ],
    ids=["empty", "short", "long", "a flipped bit", "another version", "a pickle", "zeros", "nested"],
)
async def test_a_damaged_record_costs_that_record_alone(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """reliability.md §3: it is absent, kept for inspection, and said."""
    scene = Scene.made(tmp_path)
    store = await scene.opened()
    await put_all(store)
    await store.records.put_tag(HOLDING, TagRecord("v2", TAG.descriptor, 2.0))
    at = scene.ours / RECORDS / "_tags" / "v1"
    at.write_bytes(damage(at.read_bytes()))
    assert await store.records.tag(HOLDING, Tag("v1")) is None
    assert await store.records.tag(HOLDING, Tag("v2")) is not None
    assert list(await store.records.links(HOLDING)) == [LINK]
    assert len(scene.reports) == 1
    assert len(list((scene.ours / "quarantine").iterdir())) == 1
    await store.aclose()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (f"{RECORDS}/_tags/v1", f"{RECORDS}/_tags/v2"),
        (f"{RECORDS}/_tags/v1", "records/other/registry.test%3A5000/team/web/_tags/v2"),
        (
            f"{RECORDS}/_manifests/sha256/{DIGEST.hex}",
            f"records/other/registry.test%3A5000/team/web/_manifests/sha256/{DIGEST.hex}",
        ),
        (f"{RECORDS}/_manifests/sha256/{DIGEST.hex}", f"{RECORDS}/_blobs/sha256/{DIGEST.hex}"),
        (f"{RECORDS}/_manifests/sha256/{DIGEST.hex}", f"{RECORDS}/_manifests/sha256/{'0' * 64}"),
    ],
    ids=["another tag", "another project's tag", "another project's link", "another kind", "another digest"],
)
async def test_a_record_is_good_in_its_own_place_only(tmp_path: Path, source: str, target: str) -> None:
    """INV-8: a link is a right, and copying its file does not give it."""
    scene = Scene.made(tmp_path)
    store = await scene.opened()
    await put_all(store)
    at = scene.ours / target
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_bytes((scene.ours / source).read_bytes())
    found = {holding: (list(tags), list(links)) async for holding, tags, links in store.records.scan()}
    assert found == {HOLDING: ([TAG], [LINK])}
    assert not at.exists()
    await store.aclose()


async def test_quarantine_stays_small(tmp_path: Path) -> None:
    """What is set aside is outside the ledger, so it is bounded; the newest is kept."""
    scene = Scene.made(tmp_path)
    store = await scene.opened()
    for n in range(80):
        body = b"%d" % n
        digest = Digest.of(body)
        ingest = await store.blobs.ingest(digest, Verifier(digest))
        await ingest.write(body)
        await ingest.commit()
        ingest.close()
        await store.blobs.quarantine(digest, "does not hash to its name")
        assert await store.blobs.open(digest) is None
    kept = [path.name for path in (scene.ours / "quarantine").iterdir()]
    assert len(kept) == 64
    assert any(name.startswith(digest.hex) for name in kept)
    assert "does not hash to its name" in scene.reports[-1]
    await store.aclose()


# -- the folder itself -------------------------------------------------------------------------------------------------


async def test_a_volume_that_is_open_to_all_is_fine(tmp_path: Path) -> None:
    """Volumes often are 0777; what counts is the folder that we make in it."""
    tmp_path.chmod(0o777)
    scene = Scene(tmp_path, tmp_path)
    store = await scene.opened()
    assert scene.ours.stat().st_mode & 0o777 == 0o700
    await store.aclose()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
async def test_a_folder_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    """Whoever could write there could have written anything; the sentence says what to do."""
    scene = Scene.made(tmp_path)
    scene.ours.mkdir(parents=True)
    scene.ours.chmod(mode)
    with pytest.raises(Unavailable, match=f"open to others .mode {mode:o}.*mode 700, or absent"):
        await scene.opened()


async def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Its owner can change what is in it at any time."""
    as_root()
    scene = Scene.made(tmp_path)
    scene.ours.mkdir(parents=True, mode=0o700)
    os.chown(scene.ours, 65534, 65534)
    with pytest.raises(Unavailable, match="belongs to somebody else"):
        await scene.opened()


@pytest.mark.parametrize("what", FOR_FOLDERS, ids=lambda what: what.__name__)
async def test_our_folder_is_no_link(tmp_path: Path, what: Callable[[Path, Path], None]) -> None:
    """Nothing is followed, made or waited for."""
    scene = Scene.made(tmp_path)
    scene.plant("", what)
    with pytest.raises(Unavailable, match="remove it"):
        await scene.opened()
    assert scene.untouched()


@pytest.mark.parametrize("what", FOR_FILES, ids=lambda what: what.__name__)
@pytest.mark.parametrize("where", ["layout.json", "facts/cache.db", "facts/cache.db-wal"])
async def test_planted_files_of_the_start_are_set_aside(
    tmp_path: Path, where: str, what: Callable[[Path, Path], None]
) -> None:
    """T24 (index): it starts, every blob and record is there, and nothing was followed."""
    scene = Scene.made(tmp_path)
    store = await scene.opened()
    await put_all(store)
    await store.aclose()
    scene.plant(where, what)
    store = await scene.opened()
    assert [use async for batch in store.facts.uses() for use in batch] in ([], [Use(DIGEST, 4, 1)])
    await store.facts.remember([Use(DIGEST, 4, 1)], [])
    assert await has_all(store)
    assert scene.untouched()
    await store.aclose()


@pytest.mark.parametrize("what", FOR_FILES, ids=lambda what: what.__name__)
async def test_a_planted_lock_is_refused(tmp_path: Path, what: Callable[[Path, Path], None]) -> None:
    """Without a lock nothing is safe, so this one is said and not repaired."""
    scene = Scene.made(tmp_path)
    await (await scene.opened()).aclose()
    scene.plant("lock", what)
    with pytest.raises(Unavailable, match="lock"):
        await scene.opened()
    assert scene.untouched()


@pytest.mark.parametrize("name", ["blobs", "ingest", "records", "facts", "quarantine"])
async def test_planted_folders_of_the_start_are_set_aside_or_refused(tmp_path: Path, name: str) -> None:
    """Whichever it is, nothing is written through the link."""
    scene = Scene.made(tmp_path)
    await (await scene.opened()).aclose()
    scene.plant(name, symlink_to_folder)
    try:
        store = await scene.opened()
    except Unavailable as error:
        assert name == "quarantine"
        assert "remove it" in str(error)
    else:
        await put_all(store)
        assert await has_all(store)
        await store.aclose()
    assert scene.untouched()


# -- the layout's number -----------------------------------------------------------------------------------------------


async def test_a_newer_layout_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """The sentence names both numbers, and nothing was changed."""
    scene = Scene.made(tmp_path)
    await (await scene.opened()).aclose()
    (scene.ours / "layout.json").write_text('{"layout": 7}')
    with pytest.raises(Unavailable, match=rf"layout 7.*layouts up to {LAYOUT}"):
        await scene.opened()
    assert (scene.ours / "layout.json").read_text() == '{"layout": 7}'


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layout": "1"}', '{"layout": 0}', "[" * 60000, "\x80"])
async def test_a_damaged_layout_file_is_written_anew(tmp_path: Path, text: str) -> None:
    """A damaged file never makes it fail to start (product.md, promise 8)."""
    scene = Scene.made(tmp_path)
    store = await scene.opened()
    await put_all(store)
    await store.aclose()
    (scene.ours / "layout.json").write_text(text)
    store = await scene.opened()
    assert await has_all(store)
    await store.aclose()
    assert f'"layout": {LAYOUT}' in (scene.ours / "layout.json").read_text()
