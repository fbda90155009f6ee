"""Builds the indexes of sealed segments on a background thread and swaps them in when all are done.

The one place that knows both segments and indexes. A build that fails leaves the segment exact.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from retrieval import index as indexes
from retrieval.context import Context
from retrieval.geometry import Geometry
from retrieval.kv_buffer import KvBuffer
from retrieval.methods.retrieval import QuerySample
from retrieval.segment_index import CodesIndex, CodesMaker, HeadIndexes, OnlineCodes, SegmentIndex
from retrieval.segments import Segment

logger = logging.getLogger(__name__)

OnBuilt = Callable[[str, float, int], None]  # kind, seconds, keys


class IndexBuilder:
    """A queue of segments to index; `wait` and `close` are for the owner's thread."""

    def __init__(
        self,
        kind: str,
        options: dict[str, Any],
        num_sink_tokens: int,
        on_built: OnBuilt,
        codes: CodesMaker | None = None,
    ) -> None:
        """codes: makes the core's layer codes instead of one index per head (kind rabitq, native decoder)."""
        self._kind, self._options, self._num_sink_tokens = kind, options, num_sink_tokens
        self._codes = codes
        self._on_built = on_built
        self._unfinished: dict[int, list[Any]] = {}  # of builds under way, their indexes so far, all with `nbytes`
        self._closed = threading.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="index-builder")

    @property
    def staging_bytes(self) -> int:
        """Bytes of indexes that are being built."""
        return sum(int(made.nbytes) for build in list(self._unfinished.values()) for made in list(build))

    @property
    def kind(self) -> str:
        """The kind of index built."""
        return self._kind

    def most_bytes(self, geometry: Geometry, num_tokens: int, was_decoded: bool = False) -> int:
        """What the index of a segment of that many tokens takes at most; was_decoded: none of them is the prompt's."""
        if self._codes is not None:
            return self._codes.most_bytes(geometry, num_tokens, was_decoded)
        make = indexes.kind_class(self._kind)
        head_bytes = int(make.most_bytes(num_tokens, geometry.head_dim, geometry.dtype.itemsize, **self._options))
        if geometry.is_quantized:
            head_bytes += num_tokens * geometry.head_dim * geometry.dtype.itemsize
        return geometry.num_layers * geometry.num_kv_heads * head_bytes

    def watch(self, context: Context) -> None:
        """Build while the prompt is read, where the kind can: the index is then ready when the prompt ends."""
        if self._codes is not None:
            expected = context.num_expected_tokens - context.tail_start
            context.online_codes = OnlineCodes(self._codes, context.geometry.num_layers, expected)

    def submit(self, segment: Segment, sample: QuerySample | None, online: OnlineCodes | None = None) -> None:
        """Index a segment, at once from `online` codes that cover it, else in the background.

        A segment that has an index or is being indexed is left alone.
        """
        if segment.index_state != "none":
            return
        finished = online.finish(self._begin(segment), segment.kv) if online is not None else None
        if online is not None and finished is not None:
            segment.index, segment.index_state = finished, "ready"
            self._on_built(self._kind, online.seconds, segment.num_tokens)
            return
        segment.index_state = "building"
        self._executor.submit(self._build, segment, sample or QuerySample())

    def merged(self, chain: Sequence[Segment], kv: KvBuffer) -> SegmentIndex | None:
        """The index of a chain of segments whose K and V `kv` holds, on the caller's thread; None: builder closed."""
        begin = self._begin(chain[0])
        if self._codes is None:
            return self._build_heads(kv, begin, QuerySample())
        return self._build_codes(kv, begin, chain[0].index)

    def wait(self) -> None:
        """Block until everything submitted so far is built."""
        self._executor.submit(lambda: None).result()

    def close(self) -> None:
        """Drop what is queued; return when the build under way has noticed."""
        self._closed.set()
        self._executor.shutdown(wait=True)  # queued builds run too: each sees at once that it is not wanted

    def _build(self, segment: Segment, sample: QuerySample) -> None:
        started, kv, begin = time.perf_counter(), segment.kv, self._begin(segment)
        try:
            built = self._build_codes(kv, begin) if self._codes else self._build_heads(kv, begin, sample)
        except Exception:
            segment.index_state = "failed"
            logger.exception("index build failed; the segment stays exact")
            return
        if built is None:
            segment.index_state = "none"
            return
        segment.index, segment.index_state = built, "ready"
        self._on_built(self._kind, time.perf_counter() - started, segment.num_tokens)

    def _build_codes(self, kv: KvBuffer, begin: int, first: SegmentIndex | None = None) -> SegmentIndex | None:
        """Codes of every layer, those of `first` kept for its tokens; None when the builder was closed meanwhile."""
        assert self._codes is not None
        with self._unfinished_build() as layers:
            for layer_idx in range(kv.geometry.num_layers):
                if self._closed.is_set():
                    return None
                known = first.codes(layer_idx) if isinstance(first, CodesIndex) else None
                layers.append(self._codes.encode(kv, layer_idx, kv.length, known))
            return self._codes.index(begin, layers, kv)

    @contextmanager
    def _unfinished_build(self) -> Iterator[list[Any]]:
        """A list whose bytes are counted while a build fills it."""
        made: list[Any] = []
        self._unfinished[id(made)] = made
        try:
            yield made
        finally:
            del self._unfinished[id(made)]

    def _build_heads(self, kv: KvBuffer, begin: int, sample: QuerySample) -> SegmentIndex | None:
        """An index per layer and KV head; None when the builder was closed meanwhile."""
        geometry, num_heads = kv.geometry, kv.geometry.num_kv_heads
        with self._unfinished_build() as heads:
            for layer_idx in range(geometry.num_layers):
                layer_keys = kv.read_keys(layer_idx, begin, kv.length)
                for kv_head in range(num_heads):
                    if self._closed.is_set():
                        return None
                    queries = sample.queries(layer_idx, kv_head, geometry.head_dim)
                    heads.append(indexes.build(self._kind, layer_keys[kv_head], queries, **self._options))
            layers = [heads[i : i + num_heads] for i in range(0, len(heads), num_heads)]
            return HeadIndexes(begin, layers, has_own_keys=geometry.is_quantized)

    def _begin(self, segment: Segment) -> int:
        return max(0, self._num_sink_tokens - segment.start)
