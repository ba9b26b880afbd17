"""What every ports.Records promises. A class of tests; `tests/contract/test_records.py` says over which."""

from __future__ import annotations

import pytest

from proxy.errors import InvalidName, InvalidTag
from proxy.oci.descriptor import Descriptor, Platform
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.ports import Holding, LinkRecord, Records, TagRecord

HERE = Holding("platform", "registry.test:5000", "team/app/web")
PLAIN = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", Digest.of(b"layer"), 5)
RICH = Descriptor(
    "application/vnd.oci.image.manifest.v1+json",
    Digest.of(b"manifest", "sha512"),
    8,
    platform=Platform("linux", "arm64", "v8"),
    artifact_type="application/vnd.test",
    annotations={"org.test": "ünïcode\n\u2028", "": ""},
    urls=("https://elsewhere.test/layer",),
)
LINK = LinkRecord(
    RICH,
    names=(PLAIN, RICH),
    subject=Digest.of(b"subject"),
    artifact_type="application/x",
    annotations={"a": "b"},
    tags=("1", "latest"),
)


class RecordsSuite:
    """Needs a fixture `records`."""

    async def test_what_is_not_there_is_none(self, records: Records) -> None:
        """Absent is None and empty, not an error."""
        assert await records.tag(HERE, Tag("latest")) is None
        assert list(await records.links(HERE)) == []
        assert [each async for each in records.scan()] == []

    @pytest.mark.parametrize("tag", ["latest", "_", "A" * 128, "v1.2.3-rc.1_x", "con", "0..0"])
    async def test_a_tag_is_had_back_whole(self, records: Records, tag: str) -> None:
        """INV-6: descriptor, validated-at and source, exactly."""
        record = TagRecord(tag, RICH, 1_800_000_000.123456, "https://mirror.test/v2/")
        await records.put_tag(HERE, record)
        assert await records.tag(HERE, Tag(tag)) == record

    async def test_a_later_tag_replaces_the_earlier(self, records: Records) -> None:
        """One record for each tag; case matters (distribution-spec § Pulling manifests)."""
        await records.put_tag(HERE, TagRecord("v1", PLAIN, 1.0))
        await records.put_tag(HERE, TagRecord("V1", PLAIN, 2.0))
        await records.put_tag(HERE, TagRecord("v1", RICH, 3.0))
        assert await records.tag(HERE, Tag("v1")) == TagRecord("v1", RICH, 3.0)
        assert await records.tag(HERE, Tag("V1")) == TagRecord("V1", PLAIN, 2.0)

    @pytest.mark.parametrize(
        "record", [LINK, LinkRecord(PLAIN), LinkRecord(PLAIN, is_manifest=False)], ids=["rich", "bare", "blob"]
    )
    async def test_a_link_is_had_back_whole(self, records: Records, record: LinkRecord) -> None:
        """What a manifest names, with media types, sizes and all that a rule may ask about."""
        await records.put_link(HERE, record)
        await records.put_link(HERE, record)
        assert list(await records.links(HERE)) == [record]

    async def test_a_manifest_and_a_blob_of_one_digest_are_two_links(self, records: Records) -> None:
        """A digest can be linked as both; manifests come first."""
        await records.put_link(HERE, LinkRecord(PLAIN, is_manifest=False))
        await records.put_link(HERE, LinkRecord(PLAIN))
        assert [link.is_manifest for link in await records.links(HERE)] == [True, False]

    @pytest.mark.parametrize(
        "other",
        [
            Holding("other", HERE.host, HERE.repository),
            Holding(HERE.project, "registry.test", HERE.repository),
            Holding(HERE.project, "registry.test-5000", HERE.repository),
            Holding(HERE.project, HERE.host, "team/app"),
            Holding(HERE.project, HERE.host, "team/app/web/inner"),
            Holding(HERE.project, HERE.host, "tags"),
        ],
        ids=["project", "host without port", "host with a dash", "above", "below", "like a folder of ours"],
    )
    async def test_holdings_do_not_see_each_other(self, records: Records, other: Holding) -> None:
        """INV-8: a link opens its own holding and no other, however alike they look."""
        await records.put_link(HERE, LINK)
        await records.put_tag(HERE, TagRecord("v1", PLAIN, 1.0))
        assert list(await records.links(other)) == []
        assert await records.tag(other, Tag("v1")) is None
        await records.put_tag(other, TagRecord("v1", RICH, 2.0))
        assert await records.tag(HERE, Tag("v1")) == TagRecord("v1", PLAIN, 1.0)

    async def test_what_is_removed_is_gone_and_nothing_else(self, records: Records) -> None:
        """Absent ones are fine."""
        await records.put_tag(HERE, TagRecord("v1", PLAIN, 1.0))
        await records.put_tag(HERE, TagRecord("v2", PLAIN, 1.0))
        await records.put_link(HERE, LINK)
        await records.put_link(HERE, LinkRecord(PLAIN, is_manifest=False))
        await records.remove(HERE, tags=[Tag("v1"), Tag("v9")], links=[PLAIN.digest, Digest.of(b"never")])
        assert await records.tag(HERE, Tag("v1")) is None
        assert await records.tag(HERE, Tag("v2")) is not None
        assert list(await records.links(HERE)) == [LINK]
        await records.remove(Holding("nobody", "nowhere.test", "x"), tags=[Tag("v1")], links=[PLAIN.digest])

    async def test_a_scan_sees_every_holding_once(self, records: Records) -> None:
        """With all it holds; a repository within another's name included. Emptied ones are not there."""
        holdings = [
            Holding("default", "docker.io", "library/alpine"),
            Holding("default", "docker.io", "library/alpine/inner"),
            Holding("default", "[::1]:5000", "a"),
            Holding("platform", "docker.io", "library/alpine"),
            Holding("platform", "docker.io", "/".join("a" * 127)),
        ]
        for n, holding in enumerate(holdings):
            await records.put_tag(holding, TagRecord("v1", PLAIN, float(n)))
        await records.put_link(holdings[0], LINK)
        emptied = Holding("default", "docker.io", "was")
        await records.put_tag(emptied, TagRecord("v1", PLAIN, 1.0))
        await records.remove(emptied, tags=[Tag("v1")])
        found = {holding: (list(tags), list(links)) async for holding, tags, links in records.scan()}
        assert found == {
            holding: ([TagRecord("v1", PLAIN, float(n))], [LINK] if n == 0 else [])
            for n, holding in enumerate(holdings)
        }

    async def test_names_that_are_none_are_refused(self, records: Records) -> None:
        """CVE-2024-3727: the last line in front of the file system holds by itself."""
        with pytest.raises(InvalidTag):
            await records.put_tag(HERE, TagRecord("../v1", PLAIN, 1.0))


class StrictNamesSuite:
    """For implementations whose names become paths."""

    @pytest.mark.parametrize(
        "holding",
        [
            Holding("..", "docker.io", "a"),
            Holding("", "docker.io", "a"),
            Holding("p", "..", "a"),
            Holding("p", "docker.io/..", "a"),
            Holding("p", "docker.io", ".."),
            Holding("p", "docker.io", "a/../b"),
            Holding("p", "docker.io", "/a"),
            Holding("p", "docker.io", "a\n"),
            Holding("p", "docker.io", "_tags"),
        ],
        ids=str,
    )
    async def test_holdings_that_are_none_are_refused(self, records: Records, holding: Holding) -> None:
        """CVE-2024-3727: no word becomes a path without having been looked at."""
        with pytest.raises(InvalidName):
            await records.put_tag(holding, TagRecord("v1", PLAIN, 1.0))
        with pytest.raises(InvalidName):
            await records.links(holding)
