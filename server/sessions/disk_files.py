"""The folder of one model's files on disk: names, the lock, and writes that are whole or not there.

Owns how failures of the disk are told: counted by reason, logged once by reason. Any thread.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from retrieval.tensor_file import TensorFileError
from server.engine.recorder import Recorder

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SPARE_BYTES = 64 * 2**20  # left free on the file system for everybody else
SUFFIXES = ("segment", "index", "keep")


class DiskLockedError(OSError):
    """Another server uses the directory."""


def lock_directory(directory: Path) -> IO[str]:
    """Make the directory and hold its lock until the file returned is closed, at the latest when the process ends."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = (directory / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise DiskLockedError(f"{directory} (--kv-disk-path) is in use by another server") from error
    return lock


class DiskFiles:
    """Files `DIGEST.segment`, `.index` and `.keep` of one folder; `.tmp` behind a name that is being written."""

    def __init__(self, folder: Path, recorder: Recorder) -> None:
        self.folder, self._recorder = folder, recorder
        self._logged: set[str] = set()
        self._logged_guard = threading.Lock()

    def path(self, digest: bytes, suffix: str) -> Path:
        """Where that file is, or would be."""
        return self.folder / f"{digest.hex()}.{suffix}"

    def tidy(self) -> None:
        """Make the folder; remove what a killed server left half-written, and what belongs to no segment."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in list(self.folder.iterdir()):
            is_orphan = path.suffix in (".index", ".keep") and not path.with_suffix(".segment").exists()
            if path.suffix == ".tmp" or is_orphan:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for other in self.folder.parent.iterdir():
            if other.is_dir() and other != self.folder:
                self.failed("kv_disk_model", f"{other} holds the cache of another model; it is left alone")

    def segments(self) -> Iterator[Path]:
        """All files of K and V."""
        yield from sorted(self.folder.glob("*.segment"))

    def write(self, digest: bytes, suffix: str, write: Callable[[Path], int]) -> int | None:
        """Beside, on the disk for sure, then renamed: what has its real name is whole. None: it could not be."""
        path = self.path(digest, suffix)
        beside = path.with_name(path.name + ".tmp")
        try:
            written = write(beside)
            beside.rename(path)
            self._sync()
        except OSError as error:
            beside.unlink(missing_ok=True)
            self.failed("kv_disk_full" if error.errno in FULL else "kv_disk_write_failed", error)
            return None
        return written

    def _sync(self) -> None:
        """Names too are on the disk only after this."""
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def mark(self, digest: bytes, is_kept: bool) -> None:
        """Make or remove the file that keeps a segment from the quota."""
        try:
            if is_kept:
                self.path(digest, "keep").touch(mode=0o600)
            else:
                self.path(digest, "keep").unlink(missing_ok=True)
        except OSError as error:
            self.failed("kv_disk_write_failed", error)

    def touch(self, digest: bytes, last_used: float) -> None:
        """Set the time of last use (wall clock), for after a restart."""
        try:
            os.utime(self.path(digest, "segment"), (last_used, last_used))
        except OSError as error:
            self.failed("kv_disk_unreadable", error)

    def remove(self, digest: bytes, suffixes: tuple[str, ...] = SUFFIXES) -> None:
        """Delete a segment's files; who is reading one is not disturbed."""
        for suffix in suffixes:
            try:
                self.path(digest, suffix).unlink(missing_ok=True)
            except OSError as error:
                self.failed("kv_disk_write_failed", error)

    def free_bytes(self) -> int:
        """What the file system has left for us."""
        try:
            return max(0, shutil.disk_usage(self.folder).free - SPARE_BYTES)
        except OSError as error:
            self.failed("kv_disk_write_failed", error)
            return 0

    def unusable(self, error: TensorFileError) -> None:
        """Count and log a file that cannot be used."""
        self.failed(f"kv_disk_{error.reason}", error)

    def failed(self, reason: str, what: object) -> None:
        """Count a failure; say what failed, the first time that something fails so."""
        with self._logged_guard:
            is_new = reason not in self._logged
            self._logged.add(reason)
        if is_new:
            logger.warning("%s: %s (further ones are only counted)", reason, what)
        self._recorder.degraded(reason)
