"""The process' own memory, as the system sees it. Linux with glibc; elsewhere nothing is done and 0 is said."""

from __future__ import annotations

import ctypes
import mmap
import threading
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
NUM_TRIES = 8  # to look at a heap that shrinks meanwhile


def resident_bytes() -> int:
    """Resident memory of this process."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * mmap.PAGESIZE if path.is_file() else 0


def forget_peak() -> bool:
    """Let `peak_bytes` begin anew; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """The most that was resident since `forget_peak`."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def limit_arenas(num_arenas: int = 1) -> None:
    """Let all threads share one heap: what one frees another takes, instead of each keeping its own peak. And only the
    first heap gives its last free pages back when it is trimmed."""
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_ARENA_MAX, num_arenas)


def map_large_blocks(num_bytes: int = 1 << 20) -> None:
    """Let the heaps hold smaller blocks only; larger ones are mapped each by itself and go back when they are freed.

    By itself glibc keeps to that until it sees such a block freed, then puts the next ones up to 32 MiB on the heap.
    There small ones that stay cut the holes that large ones leave, and the heap grows for as long as the process lives.
    """
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, num_bytes)
        libc.mallopt(M_TRIM_THRESHOLD, 4 * num_bytes)


def trim() -> None:
    """Give the free pages of the heaps back to the system; takes milliseconds."""
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class Heap:
    """Where malloc puts all but large blocks: Python's own ones, texts, lists, arrays and tables of whatever owner. Of
    what is freed there, the pages stay until they are trimmed, and those that something still lies on stay longer."""

    def __init__(self) -> None:
        self._libc = _libc()
        self._begin = _heap_begin() if hasattr(self._libc, "mincore") else 0
        if self._begin:
            self._libc.sbrk.restype = ctypes.c_void_p
            self._libc.sbrk.argtypes = [ctypes.c_ssize_t]
            self._libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]

    def resident_bytes(self) -> int:
        """Its pages that are resident; takes less than a millisecond for a gigabyte."""
        if not self._begin:
            return 0
        for _ in range(NUM_TRIES):
            end: int = self._libc.sbrk(0)
            num_pages = -(-(end - self._begin) // mmap.PAGESIZE)
            flags = ctypes.create_string_buffer(num_pages)
            if self._libc.mincore(self._begin, num_pages * mmap.PAGESIZE, flags) == 0:
                return (num_pages - flags.raw.count(b"\0")) * mmap.PAGESIZE
        return 0


def _heap_begin() -> int:
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    return next((int(line.partition("-")[0], 16) for line in lines if line.endswith("[heap]")), 0)


class Trimmer:
    """A thread that trims the heaps while the size of the process changes and some looks longer: what was in use at one
    look may be free at the next. In a process with nothing to do it only reads a number."""

    def __init__(self, interval_seconds: float = 0.5, change_bytes: int = 1 << 20, num_looks: int = 4) -> None:
        self._interval, self._change, self._num_looks = interval_seconds, change_bytes, num_looks
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trimmer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End the thread, if it was started."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        seen_bytes, num_left = resident_bytes(), self._num_looks
        while not self._ended.wait(self._interval):
            is_changed = abs(resident_bytes() - seen_bytes) > self._change
            num_left = self._num_looks if is_changed else num_left - 1
            if num_left > 0:
                trim()
            seen_bytes = resident_bytes()


def _libc() -> Any:
    return ctypes.CDLL(None)
