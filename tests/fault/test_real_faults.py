"""The disk of the real process fails: single system calls by strace, a file system gone read-only, one filled by others.

reliability.md T36, T37 and T41. The whole loop over calls, errors and n is `python -m tests.support.failing`, in `make
soak`; here is a part of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.disks import LoopDisk
from tests.support.failing import NO_WRITING, READS, WRITES, Failing, Fault, failing, run_all
from tests.support.process import eventually

#: Every call, each with another error; but for those that nothing needs once all folders are there and read.
_SOME = [
    Fault(calls, "EIO" if calls in READS else (*NO_WRITING, "EIO")[n % 4], is_lasting)
    for n, calls in enumerate([*WRITES, *READS])
    for is_lasting in (False, True)
    if calls not in ("mkdirat", "pread64", "getdents64")
]


@pytest.mark.timeout(300)
async def test_a_call_that_fails_is_nothing_that_a_client_sees(tmp_path: Path) -> None:
    """ENOSPC, EDQUOT, EROFS, EIO: hits are hits, misses stream through, no byte is wrong; well again by itself."""
    async with failing(tmp_path) as made:
        unharmed = [str(fault) for fault in _SOME if not await made.round(fault, 1)]
        assert not unharmed, "nothing failed: the fault is not where the server is any more"
    made.process.assert_log_is_clean()


async def test_it_starts_where_nothing_can_be_written(tmp_path: Path) -> None:
    """Promise 8: a full or read-only disk is no reason not to start; and it is well when the disk is."""
    async with failing(tmp_path) as made:
        assert await made.start_with(Fault(",".join(WRITES), "EROFS", is_lasting=True), 1)


async def test_a_file_system_gone_read_only_goes_on_serving(tmp_path: Path) -> None:
    """T41, for real: ext4 gives up beneath the running server. After a repair everything that was kept is there."""
    with LoopDisk(tmp_path) as disk:
        async with failing(tmp_path / "server", disk.mount / "store") as made:
            disk.gives_up()
            for _ in range(3):
                await made.serves("read-only")
            assert _is_degraded(made)
            assert made.process.admin("/readyz")["status"] == "degraded", "and 200: hits are served"
            made.process.stop()
            disk.detach()
            disk.attach()
            made.process.start()
            await made.serves("mounted again")
            await made.is_well("mounted again")
            made.process.stop()


async def test_a_disk_that_others_fill_is_left_its_room(tmp_path: Path) -> None:
    """Promise 5: cold blobs go until `min_free` is restored; on a disk that is full to the last byte all are served."""
    with LoopDisk(tmp_path, 32) as disk:
        async with failing(tmp_path / "server", disk.mount / "store") as made:
            used = made.status()["used_bytes"]
            # Their file leaves half of the mebibyte that must stay free.
            _fill(disk, _free(disk) - (512 << 10))
            eventually(lambda: _free(disk) >= 1 << 20, "min_free is restored")
            assert made.status()["used_bytes"] < used
            # Whatever it frees they take, until nothing of its is left to go.
            eventually(lambda: _is_pressed(disk, made), "it says that nothing new is kept")
            for _ in range(3):
                await made.serves("full", spares_hits=False)
            (disk.mount / "theirs").unlink()
            eventually(lambda: made.status()["state"] == "ok", "it keeps what is new again")
            await made.is_well("others have gone")
            made.process.stop()


def _free(disk: LoopDisk) -> int:
    found = os.statvfs(disk.mount)
    return found.f_bavail * found.f_frsize


def _fill(disk: LoopDisk, n_bytes: int) -> None:
    """Take so many bytes, or all there are."""
    with (disk.mount / "theirs").open("ab", buffering=0) as file:
        piece = n_bytes
        while piece >= 4096 and n_bytes > 0:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, piece)
                n_bytes -= piece
            except OSError:
                piece //= 2  # not so much in one piece


def _is_pressed(disk: LoopDisk, made: Failing) -> bool:
    _fill(disk, 64 << 20)
    return _is_degraded(made)


def _is_degraded(made: Failing) -> bool:
    return bool(made.status()["state"].startswith("degraded"))


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("in_a_start", [False, True], ids=["while it runs", "in a start"])
async def test_every_call_fails_with_every_error(tmp_path: Path, in_a_start: bool) -> None:
    """SQLite's method on the real process: n = 1, 2, 3 … until a round completes."""
    assert await run_all(tmp_path, [], in_a_start=in_a_start)
