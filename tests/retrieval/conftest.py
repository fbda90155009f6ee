"""Makes contexts with known keys and values, and a plain attention to hold every fast path against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from retrieval.context import Context, Run, StaticSet
from retrieval.decode import Decoder, DecodeRow, DecodeStats, NativeDecoder, TorchDecoder
from retrieval.geometry import Geometry
from retrieval.index import build
from retrieval.kv_buffer import KvBuffer
from retrieval.segment_index import HeadIndexes
from retrieval.segments import PathEntry, Segment, SegmentStore, TokenIds

CPU = torch.device("cpu")
Decode = Callable[..., Tensor]
LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "neon")


def geometry_of(
    num_layers: int = 2,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Geometry:
    return Geometry(num_layers, num_q_heads, num_kv_heads, head_dim, dtype, (None,) * num_layers)


@dataclass
class World:
    """One store, one stream of random numbers, and contexts made from them."""

    geometry: Geometry = field(default_factory=geometry_of)
    static: StaticSet = field(default_factory=lambda: StaticSet(num_sink_tokens=4, window_size=8, seal_tokens=16))
    seed: int = 0
    store: SegmentStore = field(default_factory=SegmentStore)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.scale = self.geometry.head_dim**-0.5

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.geometry.dtype)

    def tokens(self, count: int) -> TokenIds:
        return torch.randint(0, 1000, (count,), generator=self.random).numpy().astype(np.int32)

    def kv(self, num_tokens: int) -> KvBuffer:
        buffer = KvBuffer(self.geometry, num_tokens, CPU)
        self.extend(buffer, num_tokens)
        return buffer

    def extend(self, buffer: KvBuffer, num_new: int, commit: bool = True) -> None:
        """Random K and V behind what the buffer holds."""
        buffer.reserve(num_new)
        for layer_idx in range(self.geometry.num_layers):
            shape = (self.geometry.num_kv_heads, num_new, self.geometry.head_dim)
            buffer.write(layer_idx, self.randn(*shape), self.randn(*shape))
        if commit:
            buffer.commit(num_new)

    def context(self, lengths: Sequence[int] = (), limits: Sequence[int] = (), num_tail: int = 0) -> Context:
        """A path of segments of `lengths`, of each of which `limits` tokens are seen (default: all), and a tail."""
        path: list[PathEntry] = []
        for length, limit in zip(lengths, limits or lengths, strict=True):
            segment = self.store.add("", path[-1] if path else None, self.tokens(length), self.kv(length))
            path.append(PathEntry(segment, limit))
        tail = KvBuffer(self.geometry, num_tail + 1, CPU)
        context = Context(self.geometry, self.static, self.store, tuple(path), tail, "", CPU)
        if num_tail:
            self.extend(tail, num_tail)
        return context

    def index(self, segment: Segment, kind: str = "flat") -> None:
        """Put an index over all keys of the segment but those of the sink."""
        begin = max(0, self.static.num_sink_tokens - segment.start)
        none = torch.empty(0, self.geometry.head_dim, dtype=self.geometry.dtype)
        heads = [[keys[begin : segment.num_tokens] for keys in layer] for layer in segment.kv.keys]
        segment.index = HeadIndexes(begin, [[build(kind, keys, none) for keys in layer] for layer in heads])
        segment.index_state = "ready"

    def all_kv(self, context: Context, layer_idx: int, num_new: int = 0) -> tuple[Tensor, Tensor]:
        """K and V `[num_kv_heads, num_tokens + num_new, head_dim]` of a context, put together by hand."""
        parts = [(e.segment.kv, e.limit) for e in context.path] + [(context.tail, context.tail.length + num_new)]
        keys = torch.cat([kv.keys[layer_idx, :, :end] for kv, end in parts], dim=1)
        values = torch.cat([kv.values[layer_idx, :, :end] for kv, end in parts], dim=1)
        return keys, values


def plain_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """`[num_q_heads, n, d]` over `[num_kv_heads, m, d]`; mask bool, broadcast to `[num_q_heads, n, m]`. In float64."""
    group = queries.shape[0] // keys.shape[0]
    k, v = keys.double().repeat_interleave(group, 0), values.double().repeat_interleave(group, 0)
    scores = queries.double() @ k.transpose(1, 2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ v).float()


def decode_with(kind: str) -> Decode:
    """Attention of one token `[num_q_heads, d]` over runs, by the decoder of that kind."""

    def attend(
        queries: Tensor,
        context: Context,
        runs: list[Run],
        layer_idx: int,
        num_retrieved: int,
        stats: DecodeStats | None = None,
    ) -> Tensor:
        decoder: Decoder = TorchDecoder(num_retrieved)
        if kind == "native":
            core = pytest.importorskip("retrieval._core")
            decoder = NativeDecoder(num_retrieved, core, core.Budget(k=num_retrieved))
        rows, scale = [DecodeRow(context, runs)], queries.shape[-1] ** -0.5
        return decoder.attend(queries[None], rows, layer_idx, scale, stats or DecodeStats())[0]

    return attend


@pytest.fixture(params=["torch", "native"])
def decode(request: pytest.FixtureRequest) -> Decode:
    """`decode(queries, context, runs, layer_idx, num_retrieved, stats)`, by torch and by the C++ core."""
    return decode_with(request.param)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine and the core have, in use."""
    core = pytest.importorskip("retrieval._core")
    before = core.simd_level()
    try:
        core.set_simd_level(request.param)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    yield request.param
    core.set_simd_level(before)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only makes them wait, worst on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_world() -> Callable[..., World]:
    """The class itself: `make_world(geometry=..., static=..., seed=...)`."""
    return World


@pytest.fixture
def world() -> World:
    """A world of the default sizes."""
    return World()


@pytest.fixture
def make_geometry() -> Callable[..., Geometry]:
    """Geometries with small defaults."""
    return geometry_of


@pytest.fixture
def oracle() -> Callable[..., Tensor]:
    """Plain attention in float64."""
    return plain_attention
