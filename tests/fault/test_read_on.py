"""A stored file that cannot be read on in the middle of a hit: the rest comes from upstream, at that offset."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.web.lanes import Disk
from tests.support import images
from tests.support.appliance import appliance
from tests.support.registry import ScriptedRegistry, Twist

IMAGE = images.image(7, (3 << 20,))
LAYER = max((blob.content for blob in IMAGE.blobs), key=len)
DIGEST = Digest.of(LAYER)
TARGET = f"/v2/library/alpine/blobs/{DIGEST}"


class Failing(Disk):
    """Every read of the file at or beyond `at` fails, as long as there is an `at`."""

    at: int | None = None

    def _check(self, offset: int, n_bytes: int) -> int:
        if self.at is not None and offset >= self.at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return n_bytes if self.at is None else min(n_bytes, self.at - offset)

    def sendfile(self, out: int, fd: int, offset: int, n_bytes: int) -> int:
        return super().sendfile(out, fd, offset, self._check(offset, n_bytes))

    def read(self, fd: int, offset: int, n_bytes: int) -> bytes:
        return super().read(fd, offset, self._check(offset, n_bytes))


@pytest.mark.parametrize("is_reachable", [True, False], ids=["upstream answers", "upstream is down"])
async def test_a_disk_that_fails_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_reachable: bool
) -> None:
    """The client gets every byte right, or a short end; and the file is replaced, not thrown away."""
    async with ScriptedRegistry() as registry, appliance(registry, tmp_path) as served:
        registry.put("library/alpine", IMAGE, "1")
        assert (await served.get("/v2/library/alpine/manifests/1")).status == 200
        assert (await served.get(TARGET)).body == LAYER
        await served.quiet()
        if not is_reachable:
            registry.rewrite(Twist(status=503))
        disk = Failing()
        disk.at = 1_000_000
        monkeypatch.setattr(served.sender, "_disk", disk)

        plain = served.engine.blobs.instead

        async def well_again(*args: object, **words: object) -> object:
            disk.at = None
            return await plain(*args, **words)  # type: ignore[arg-type]

        monkeypatch.setattr(served.engine.blobs, "instead", well_again)
        answer = await served.get(TARGET)
        if is_reachable:
            assert (answer.end, answer.body) == ("whole", LAYER)
        else:
            assert answer.end == "short" and LAYER.startswith(answer.body)
        await served.quiet()
        assert await served.engine.stored(DIGEST) == LAYER
        assert served.answered[-1].n_bytes == (len(LAYER) if is_reachable else 0)
