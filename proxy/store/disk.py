"""The store as a whole: opened with the lock held, and let go of in the opposite order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from proxy.ports import Clock
from proxy.store.blobs import DiskBlobs
from proxy.store.charges import DiskCharges
from proxy.store.checked_file import Ground
from proxy.store.facts import DiskFacts
from proxy.store.filesystem import FileSystem
from proxy.store.layout import Folders, open_folders, open_root
from proxy.store.lock import PATIENCE_S, StoreLock, acquire
from proxy.store.notes import DiskNotes
from proxy.store.quarantine import Quarantine
from proxy.store.records import DiskRecords
from proxy.store.upkeep import Upkeep
from proxy.store.workers import Workers


class DiskStore:
    """Everything at rest below one folder: `blobs`, `records`, `facts`. Made by `open`, ended by `aclose`."""

    def __init__(
        self, fs: FileSystem, folders: Folders, workers: Workers, lock: StoreLock, report: Callable[[str], None]
    ) -> None:
        self.upkeep = Upkeep(fs, folders, workers)
        self.quarantine = Quarantine(fs, folders.quarantine, workers.tell, self.upkeep.took)
        ground = Ground(fs, folders, workers, self.quarantine, self.upkeep)
        self.path = folders.path
        self.blobs = DiskBlobs(ground)
        self.records = DiskRecords(ground)
        self.charges = DiskCharges(ground)
        self.notes = DiskNotes(ground)
        self.facts = DiskFacts(folders.path, report, self.upkeep)
        self._fs = fs
        self._folders = folders
        self._workers = workers
        self._lock = lock

    @classmethod
    async def open(
        cls,
        root: Path,
        *,
        clock: Clock,
        report: Callable[[str], None],
        fs: FileSystem | None = None,
        patience_s: float = PATIENCE_S,
    ) -> DiskStore:
        """The store below `root`, made where missing. Reads nothing that grows with the store: a start is not a scan.

        Waits up to `patience_s` for another server to let go of it. `report` is called on this loop with a sentence for
        each thing that was put aside. Raises Unavailable when the store is in use, newer than this program, not ours
        alone, or when the disk fails.
        """
        fs = fs or FileSystem()
        workers = Workers(report)
        folders: Folders | None = None
        lock: StoreLock | None = None
        try:
            folders = await workers.run("reads", open_root, fs, root)
            lock = await acquire(fs, folders, workers, clock=clock, patience_s=patience_s)
            await workers.run("reads", open_folders, fs, folders, workers.tell)
            return cls(fs, folders, workers, lock, report)
        except BaseException:
            await workers.aclose()
            if lock is not None:
                lock.release()
            if folders is not None:
                folders.close(fs)
            raise

    async def aclose(self) -> None:
        """Finish what runs, write what is pending, let the next server in. Open blobs and ingests stay readable."""
        await self._workers.aclose()
        await self.facts.aclose()
        self._folders.close(self._fs)
        self._lock.release()
