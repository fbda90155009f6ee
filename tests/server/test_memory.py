"""What the process holds, as the system says."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time

from server import memory
from server.memory import Trimmer


def test_the_peak_is_remembered_until_it_is_forgotten() -> None:
    if not memory.forget_peak():
        return  # a system that does not allow it
    size = 64 << 20
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.write(b"x" * size)
    pages.close()
    assert memory.peak_bytes() >= memory.resident_bytes() + size // 2
    memory.forget_peak()
    assert memory.peak_bytes() < memory.resident_bytes() + size // 2


def test_trimming_gives_freed_blocks_back_although_later_ones_live() -> None:
    blocks = [bytes(50_000) for _ in range(2000)]
    kept = blocks[::100]
    full = memory.resident_bytes()
    del blocks
    trimmer = Trimmer(interval_seconds=0.01, change_bytes=-1)  # at every look
    trimmer.start()
    deadline = time.monotonic() + 10
    while memory.resident_bytes() > full - 50 * 1_000_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    trimmer.close()
    assert memory.resident_bytes() <= full - 50 * 1_000_000
    assert len(kept) == 20


BLOCKS_BETWEEN = """
from server import memory
memory.map_large_blocks()
blocks, kept = [], []
for _ in range(20):
    blocks.append(bytearray(b"x") * (4 << 20))
    kept.append(bytes(50_000))
full = memory.resident_bytes()
del blocks
print(full - memory.resident_bytes())
"""


def test_large_blocks_go_back_when_they_are_freed_whatever_lies_between() -> None:
    """In a process of its own: holes that other tests have left would take some of them."""
    shown = subprocess.run([sys.executable, "-c", BLOCKS_BETWEEN], capture_output=True, text=True, check=True)
    assert int(shown.stdout) >= 18 * (4 << 20)


def test_the_heap_grows_by_what_lies_on_it() -> None:
    heap = memory.Heap()
    memory.trim()
    before = heap.resident_bytes()
    blocks = [bytearray(b"x") * 100_000 for _ in range(300)]
    assert 0.9 * 30_000_000 <= heap.resident_bytes() - before <= 1.1 * 30_000_000
    del blocks
    memory.trim()
    assert heap.resident_bytes() - before <= 0.1 * 30_000_000


def test_mapped_memory_is_not_the_heaps() -> None:
    heap, size = memory.Heap(), 64 << 20
    before = heap.resident_bytes()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        block = b"x" * (1 << 20)  # all at once might lie in a hole that other tests have left on the heap
        for _ in range(size // len(block)):
            pages.write(block)
        assert heap.resident_bytes() - before < size // 2
