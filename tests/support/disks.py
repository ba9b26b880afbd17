"""A file system of one's own: ext4 in a file, on a loop device. It can go read-only, or lose its power, and come back."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.process import program, run

#: EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH: nothing more reaches the disk, the journal neither.
_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2


def as_root() -> None:
    """Fail, and do not skip, where this is not root: what was not tried was not shown."""
    assert os.geteuid() == 0, "this test mounts, traces or gives away files: run it as root, on a machine of its own"


class LoopDisk:
    """ext4, mounted at `mount` while it is entered. Needs root and loop devices, and fails without them."""

    def __init__(self, scratch: Path, mebibytes: int = 96) -> None:
        """The image and the mount point are made in `scratch`."""
        self.image, self.mount = scratch / "disk-0.img", scratch / "disk"
        self._n_bytes = mebibytes << 20
        self._n_lives = 0

    def __enter__(self) -> Self:
        as_root()
        assert Path("/dev/loop-control").exists(), "this machine has no loop devices: modprobe loop, as root"
        with self.image.open("wb") as file:
            file.truncate(self._n_bytes)
        run([program("mkfs.ext4"), "-q", "-F", str(self.image)])
        self.mount.mkdir()
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def attach(self) -> None:
        """Mount it (again).

        From a copy of what is on it: where somebody else has a mount namespace from before, the same image would come up
        as it went down there, without power or read-only.
        """
        self._n_lives += 1
        before, self.image = self.image, self.image.with_name(f"disk-{self._n_lives}.img")
        run([program("cp"), "--sparse=always", str(before), str(self.image)])
        before.unlink()
        run([program("mount"), "-o", "loop", str(self.image), str(self.mount)])

    def detach(self) -> None:
        """Unmount it; nobody may have anything open on it."""
        run([program("umount"), str(self.mount)])

    def gives_up(self) -> None:
        """It goes read-only as after an error of its own: whatever is open stays open, and every write says EROFS.

        An operator's `remount,ro` would be refused as busy beneath a running server; this is what really happens, and
        it lasts until the disk is detached.
        """
        run([program("mount"), "-o", "remount,abort", str(self.mount)])

    def cut(self) -> None:
        """The power goes. To be detached and attached before anything else."""
        at = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(at, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(at)
