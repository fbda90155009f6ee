"""The process' own memory, as the system sees it. Linux with glibc; elsewhere nothing is done and 0 is said."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

M_ARENA_MAX = -8  # of mallopt(3)


def resident_bytes() -> int:
    """Resident memory of this process."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * mmap.PAGESIZE if path.is_file() else 0


def limit_arenas(num_arenas: int = 2) -> None:
    """Let all threads share few heaps: what one frees another takes, instead of each keeping its own peak."""
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_ARENA_MAX, num_arenas)


def trim() -> None:
    """Give the free pages of the heaps back to the system; takes milliseconds."""
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _libc() -> Any:
    return ctypes.CDLL(None)
