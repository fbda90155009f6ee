"""Live recall: what the index found for one real query, against an exact search over the same keys.

Runs on a thread of its own, on a small sample of decode steps, and rests long enough in between to take little of a
core; only immutable segments are read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from retrieval.context import Run

logger = logging.getLogger(__name__)

BLOCK_KEYS = 4096  # widened at once: all of them would take their memory anew each time
LARGEST_SHARE = 0.01  # of one thread's time, that checks take


@dataclass(frozen=True, slots=True)
class Quality:
    """Over one query: share of the exact top k found, and softmax mass found over that of the exact top k."""

    recall: float
    captured_mass: float


def measure(query: Tensor, keys: Tensor, positions: Tensor, k: int, scale: float) -> Quality:
    """query `[head_dim]`, keys `[num_keys, head_dim]`, positions int64 of the keys found (-1 = none)."""
    logits = _inner_products(query.float(), keys).mul_(scale)
    exact = logits.topk(min(k, len(keys)))
    found = positions[positions >= 0]
    weights = torch.exp(logits - exact.values[0])
    recall = torch.isin(exact.indices, found).float().mean()
    return Quality(float(recall), float((weights[found].sum() / weights[exact.indices].sum()).clamp(max=1.0)))


def _inner_products(query: Tensor, keys: Tensor) -> Tensor:
    """float32 `[num_keys]`; query float32."""
    products, wide = torch.empty(len(keys)), torch.empty(min(BLOCK_KEYS, len(keys)), keys.shape[1])
    for begin in range(0, len(keys), BLOCK_KEYS):
        block = keys[begin : begin + BLOCK_KEYS]
        torch.mv(wide[: len(block)].copy_(block), query, out=products[begin : begin + len(block)])
    return products


class LiveProbe:
    """Checks at most one query at a time; a step that comes while one is under way is not sampled."""

    def __init__(self, k: int, scale: float, on_measured: Callable[[float, float], None]) -> None:
        self._k, self._scale, self._on_measured = k, scale, on_measured
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="live-recall")
        self._pending: Future[None] | None = None
        self._rests_until = 0.0  # by time.monotonic

    @property
    def is_busy(self) -> bool:
        """A check is under way."""
        return self._pending is not None and not self._pending.done()

    @property
    def is_ready(self) -> bool:
        """A check may begin: the last one is done, and long enough ago."""
        return not self.is_busy and time.monotonic() >= self._rests_until

    def submit(self, query: Tensor, run: Run, layer_idx: int, kv_head: int) -> None:
        """Check one query `[head_dim]` of a KV head's group against an indexed run."""
        self._pending = self._executor.submit(self._check, query.cpu().clone(), run, layer_idx, kv_head)

    def rehearse(self, query: Tensor, run: Run, layer_idx: int, kv_head: int) -> None:
        """Do on its thread what a check does, wait for it, tell nobody."""
        self._executor.submit(self._measure, query.cpu().clone(), run, layer_idx, kv_head).result()

    def close(self) -> None:
        """Wait for the check under way."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _check(self, query: Tensor, run: Run, layer_idx: int, kv_head: int) -> None:
        started = time.monotonic()
        try:
            quality = self._measure(query, run, layer_idx, kv_head)
            if quality is not None:
                self._on_measured(quality.recall, quality.captured_mass)
        except Exception:
            logger.exception("a live recall check failed")
        finally:
            now = time.monotonic()
            self._rests_until = now + (now - started) / LARGEST_SHARE

    def _measure(self, query: Tensor, run: Run, layer_idx: int, kv_head: int) -> Quality | None:
        assert run.indexed is not None
        index = run.indexed.index
        if index is None:
            return None  # evicted since the step
        found = index.search(layer_idx, kv_head, query, self._k, run.end) - index.begin
        keys = run.kv.read_keys(layer_idx, index.begin, run.end)[kv_head]
        return measure(query, keys, found, self._k, self._scale)
