"""Merges the adjacent segments of a growing context in the background, as a log-structured tree does.

Sizes along a path fall geometrically, so a chat of n tokens is a path of O(log n) segments and each token is copied
O(log n) times. K, V and index of the merged segment are made on a thread of its own from immutable ones; all else runs
on the engine thread, which swaps the result in between two steps. Both exist meanwhile: the second copy's bytes are
reserved before it is begun, and where they are not to be had the segments stay as they are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from retrieval.kv_buffer import KvBuffer
from retrieval.segment_index import SegmentIndex
from retrieval.segments import PathEntry, PathHold, Segment, SegmentStore

logger = logging.getLogger(__name__)

SHRINK = 2  # after a merge each segment is at least so many times as long as the next
SMALLEST_SHARE = 8  # a segment so many times shorter than what follows it is not worth copying that for

IndexOf = Callable[[Sequence[Segment], KvBuffer], SegmentIndex | None]  # of a chain, whose K and V the buffer holds
OnCompacted = Callable[[int, int, float], None]  # segments merged, tokens, seconds


class CompactorClosedError(Exception):
    """The server ends; the copy under way is not wanted any more."""


def count_to_merge(lengths: Sequence[int]) -> int:
    """How many of the last segments of a path to merge into one, given their lengths; 0 for none."""
    count, total = 1, lengths[-1]
    for length in reversed(lengths[:-1]):
        if length >= SHRINK * total or length * SMALLEST_SHARE < total:
            break
        count, total = count + 1, total + length
    return count if count > 1 else 0


@dataclass(frozen=True, slots=True)
class _Job:
    """A merge under way; its hold keeps the chain alive."""

    chain: tuple[Segment, ...]
    hold: PathHold
    num_bytes: int  # reserved
    result: Future[tuple[KvBuffer, SegmentIndex | None, float]]


class Compactor:
    """Told of every new segment by `consider`; `settle` begins and ends merges between two steps."""

    def __init__(
        self,
        store: SegmentStore,
        min_tokens: int,
        reserve: Callable[[int], int | None],
        release: Callable[[int], None],
        on_compacted: OnCompacted,
        index_of: IndexOf | None = None,
    ) -> None:
        """reserve: takes the budget for a context of so many tokens and returns the bytes; None: not to be had."""
        self._store, self._min_tokens = store, min_tokens
        self._reserve, self._release = reserve, release
        self._on_compacted, self._index_of = on_compacted, index_of
        self._tips: list[Segment] = []  # new since they were last looked at
        self._jobs: list[_Job] = []
        self._copy: KvBuffer | None = None  # being filled; set by the compactor's thread
        self._closed = threading.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compactor")

    @property
    def num_pending(self) -> int:
        """Merges begun and not swapped in."""
        return len(self._jobs)

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved for the merges under way."""
        return sum(job.num_bytes for job in self._jobs)

    @property
    def staging_bytes(self) -> int:
        """Bytes of merged segments that are not swapped in yet."""
        made = [job.result.result() for job in self._jobs if job.result.done() and job.result.exception() is None]
        copy = self._copy
        total = copy.nbytes if copy is not None else 0
        return total + sum(kv.nbytes + (index.nbytes if index is not None else 0) for kv, index, _ in made)

    def consider(self, segment: Segment) -> None:
        """A segment was sealed: merge it with what it continues, when that is due."""
        if segment.num_tokens >= self._min_tokens:
            self._tips.append(segment)

    def settle(self) -> None:
        """Swap in what is finished, begin what is due. Between two steps only."""
        for job in [job for job in self._jobs if job.result.done()]:
            self._jobs.remove(job)
            self._finish(job)
        self._tips = [tip for tip in self._tips if not self._begin(tip)]

    def wait(self) -> None:
        """Block until the merges begun so far are computed."""
        self._executor.submit(lambda: None).result()

    def close(self) -> None:
        """Give up what is under way; returns when its thread has noticed."""
        self._closed.set()
        self._executor.shutdown(wait=True)
        self.settle()

    def _begin(self, tip: Segment) -> bool:
        """Start merging the path that ends at `tip`; False: look again, something of it is being worked on."""
        if self._closed.is_set() or self._store.get(tip.digest) is not tip:
            return True
        chain = _chain_to(tip, self._min_tokens)
        count = count_to_merge([s.num_tokens for s in chain])
        busy = {id(s) for job in self._jobs for s in job.chain}
        if any(s.index_state == "building" or id(s) in busy for s in chain[len(chain) - count :]):
            return False
        while count > 1 and not self._start(chain[len(chain) - count :]):
            count -= 1
        return True

    def _start(self, chain: tuple[Segment, ...]) -> bool:
        hold = PathHold(self._store, tuple(PathEntry(s, s.num_tokens) for s in chain))
        num_bytes = self._reserve(sum(s.num_tokens for s in chain))
        if num_bytes is None:
            hold.release()
            return False
        self._jobs.append(_Job(chain, hold, num_bytes, self._executor.submit(self._merge, chain)))
        return True

    def _finish(self, job: _Job) -> None:
        error = job.result.exception()
        if error is None:
            kv, index, seconds = job.result.result()
            merged = self._store.replace(job.chain, kv, index)
            self._tips.append(merged)
            self._on_compacted(len(job.chain), merged.num_tokens, seconds)
        elif not isinstance(error, CompactorClosedError):
            logger.error("segments stay unmerged", exc_info=error)
        job.hold.release()
        self._release(job.num_bytes)

    def _merge(self, chain: tuple[Segment, ...]) -> tuple[KvBuffer, SegmentIndex | None, float]:
        """On the compactor's thread: K, V and index of the whole chain."""
        started, first = time.perf_counter(), chain[0].kv
        kv = KvBuffer(first.geometry, sum(s.num_tokens for s in chain), torch.device("cpu"), pin=first.is_pinned)
        self._copy = kv
        try:
            for segment in chain:
                if self._closed.is_set():
                    raise CompactorClosedError
                kv.copy_range(segment.kv, 0, segment.num_tokens)
            index = self._index_of(chain, kv) if self._index_of is not None else None
            if self._closed.is_set():
                raise CompactorClosedError
        finally:
            self._copy = None
        return kv, index, time.perf_counter() - started


def _chain_to(tip: Segment, min_tokens: int) -> tuple[Segment, ...]:
    """The segments up to `tip` of which each follows the whole of the one before, and none is short."""
    chain, segment = [tip], tip
    while segment.parent is not None and segment.parent_limit == segment.parent.num_tokens >= min_tokens:
        segment = segment.parent
        chain.append(segment)
    return tuple(reversed(chain))
