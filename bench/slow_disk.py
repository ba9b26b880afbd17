"""A disk that is slow for one process: the kernel's own throttle of block devices. For root on Linux, else it says so."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.servers import Missing

_V2 = Path("/sys/fs/cgroup")


@contextmanager
def throttled(pids: Sequence[int], path: Path, bytes_per_s: int) -> Iterator[None]:
    """Let these processes read from the disk that holds `path` at no more than this rate.

    By io.max of a control group (version 2), or blkio.throttle of one of version 1 that is mounted for it. Raises
    Missing where neither can be had.
    """
    disk = _disk_of(path)
    try:
        if "io" in (_V2 / "cgroup.controllers").read_text().split():
            root, limit, rule = _V2, "io.max", f"{disk} rbps={bytes_per_s}"
            (root / "cgroup.subtree_control").write_text("+io")
            group = _put_in(root, limit, rule, pids)
            mounted = None
        else:
            raise FileNotFoundError("no io controller of version 2")
    except OSError:
        root = mounted = Path(tempfile.mkdtemp(prefix="bench-blkio-"))
        if os.system(f"mount -t cgroup -o blkio blkio {root} 2>/dev/null"):
            root.rmdir()
            raise Missing("a slow disk: neither io.max nor blkio.throttle can be had (root?)") from None
        group = _put_in(root, "blkio.throttle.read_bps_device", f"{disk} {bytes_per_s}", pids)
    try:
        yield
    finally:
        for pid in pids:
            (root / "cgroup.procs").write_text(str(pid))
        group.rmdir()
        if mounted is not None:
            os.system(f"umount {mounted}")
            mounted.rmdir()


def forget(paths: Sequence[Path]) -> None:
    """Have the kernel drop these files from memory."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _put_in(root: Path, limit: str, rule: str, pids: Sequence[int]) -> Path:
    group = root / f"bench-{os.getpid()}"
    group.mkdir()
    (group / limit).write_text(rule)
    for pid in pids:
        (group / "cgroup.procs").write_text(str(pid))
    return group


def _disk_of(path: Path) -> str:
    """major:minor of the whole disk, which is where the kernel throttles. Raises Missing for what has no disk."""
    device = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not block.exists():
        raise Missing(f"a slow disk: {path} is on no block device")
    if (block / "partition").exists():
        block = block.resolve().parent
    return (block / "dev").read_text().strip()
