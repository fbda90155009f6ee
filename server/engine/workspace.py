"""Memory for the tensors of one forward pass, mapped once and kept: a pass asks neither the heap nor the system.

The heap is no place for them: among blocks of megabytes that come and go, small ones that stay leave holes that the
next pass does not fit into, and a process that computes the same all day grows. Mapping each by itself instead costs
more than what is computed in it. Engine thread only.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

ALIGNMENT = 64


class Room:
    """Where a pass puts its tensors. This one has no memory of its own: whoever gets None lets torch allocate."""

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A tensor of any content, void once an earlier `mark` is released or a pass begins; None: make one."""
        return None

    def mark(self) -> int:
        """For `release`."""
        return 0

    def release(self, mark: int) -> None:
        """Whatever was taken since the mark is void."""


HEAP = Room()


class Workspace(Room):
    """Memory that is kept from pass to pass. What does not fit is allocated, and fits in the next pass."""

    def __init__(self) -> None:
        self._pages = torch.empty(0, dtype=torch.uint8)
        self._used = self.needed_bytes = 0  # by the present pass; by the one that took most

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._pages.numel()

    def begin(self) -> None:
        """A new pass: everything taken before is void."""
        self.reserve(self.needed_bytes)
        self._used = 0

    def reserve(self, num_bytes: int) -> None:
        """Hold at least so many bytes, all of them resident from now on. Not while anything taken is in use."""
        if num_bytes <= self.nbytes:
            return
        self._pages = torch.empty(0, dtype=torch.uint8)  # the old ones go first
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # unmapped with the tensor
        with suppress(AttributeError, OSError):  # a system that has none
            pages.madvise(mmap.MADV_HUGEPAGE)
        self._pages = torch.frombuffer(pages, dtype=torch.uint8)
        self._pages.zero_()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """See `Room.take`."""
        num_bytes = math.prod(shape) * dtype.itemsize
        begin, self._used = self._used, self._used + -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self.needed_bytes = max(self.needed_bytes, self._used)
        if self._used > self.nbytes:
            return None
        return self._pages[begin : begin + num_bytes].view(dtype).view(shape)

    def mark(self) -> int:
        """See `Room.mark`."""
        return self._used

    def release(self, mark: int) -> None:
        """See `Room.release`."""
        self._used = mark
