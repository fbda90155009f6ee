"""The indexes of a whole segment, all layers and heads, in the two forms a decoder can use.

Immutable once made; read on any thread.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrieval.balance import balance
from retrieval.geometry import Geometry
from retrieval.index import KeyIndex
from retrieval.kv_buffer import KvBuffer

BALANCE_TOKENS = 32_768  # from here on, the stretches of a head weigh about a tenth of its codes at most
ENCODE_TOKENS = 4096  # encoded at a time


class SegmentIndex(ABC):
    """Covers a segment's positions from its field `begin` on; the sink tokens before it are always attended exactly."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all layers' indexes."""

    @abstractmethod
    def search(self, layer_idx: int, kv_head: int, query: Tensor, k: int, end: int) -> Tensor:
        """Positions int64 in the segment of the best keys in `[begin, end)` for one query `[head_dim]`."""


@dataclass(frozen=True, slots=True)
class HeadIndexes(SegmentIndex):
    """One index of the contract per layer and KV head, over the keys from `begin` on."""

    begin: int
    layers: list[list[KeyIndex]]
    has_own_keys: bool = False  # made from those of a quantized buffer, which are in no form that an index reads

    @property
    def nbytes(self) -> int:
        """Bytes of all indexes, and of keys that are kept for them alone."""
        heads = [head for layer in self.layers for head in layer]
        return sum(head.nbytes + (head.keys.nbytes if self.has_own_keys else 0) for head in heads)

    def head(self, layer_idx: int, kv_head: int) -> KeyIndex:
        """The index of one layer and KV head; its position 0 is the segment's `begin`."""
        return self.layers[layer_idx][kv_head]

    def search(self, layer_idx: int, kv_head: int, query: Tensor, k: int, end: int) -> Tensor:
        """See `SegmentIndex.search`."""
        positions, _ = self.layers[layer_idx][kv_head].search(query[None], k, end - self.begin)
        return positions[0][positions[0] >= 0] + self.begin


@dataclass(frozen=True, slots=True)
class CodesMaker:
    """How the core's codes are made and searched: its module, the budget of a search, bits and rotation."""

    core: Any
    budget: Any  # _core.Budget
    bits: int = 2
    seed: int = 0

    def encode(self, kv: KvBuffer, layer_idx: int, end: int, known: Any = None, queries: Tensor | None = None) -> Any:
        """`_core.LayerCodes` of one layer's keys before `end`.

        known: such codes of the first keys, which are copied instead of made again. queries `[num_q_heads, n,
        head_dim]`: what was asked of these keys, to balance the codes for.
        """
        geometry = kv.geometry
        if known is not None:
            codes = self.core.LayerCodes.load(known.save())
        else:
            maps = None if queries is None else balance(kv.read_keys(layer_idx, 0, end), queries.cpu(), self.bits)
            codes = self.core.LayerCodes(geometry.num_kv_heads, geometry.head_dim, self.bits, self.seed, *(maps or ()))
        self.extend(codes, kv, layer_idx, end)
        return codes

    def extend(self, codes: Any, kv: KvBuffer, layer_idx: int, end: int) -> None:
        """Encode the keys behind those held, a slice at a time: encoding needs as much scratch as it makes codes."""
        for begin in range(codes.num_keys, end, ENCODE_TOKENS):
            stop = min(begin + ENCODE_TOKENS, end)
            codes.append(kv.read_keys(layer_idx, begin, stop))

    def most_bytes(self, geometry: Geometry, num_tokens: int, was_decoded: bool) -> int:
        """What the codes of all layers take at most; those of decoded tokens have no stretches of their own."""
        shape = geometry.num_kv_heads, geometry.head_dim, self.bits, num_tokens
        return geometry.num_layers * int(self.core.LayerCodes.most_bytes(*shape, is_stretched=not was_decoded))

    def index(self, begin: int, layers: list[Any], kv: KvBuffer) -> CodesIndex:
        """The index of a segment whose layers are encoded."""
        return CodesIndex(begin, layers, kv, self)


class OnlineCodes:
    """Codes of a tail that is still being read, appended chunk by chunk, so that they are ready when it is sealed."""

    def __init__(self, maker: CodesMaker, num_layers: int, num_expected_tokens: int = 0) -> None:
        """num_expected_tokens: of the whole tail; in a long one, stretches of its own are worth their bytes."""
        self._maker = maker
        self._is_long = num_expected_tokens >= BALANCE_TOKENS
        self._layers: list[Any] = [None] * num_layers  # LayerCodes, made by the first `extend` of each layer
        self.seconds = 0.0  # spent encoding

    @property
    def nbytes(self) -> int:
        """Bytes of the codes made so far."""
        return sum(int(codes.nbytes) for codes in self._layers if codes is not None)

    def extend(self, layer_idx: int, kv: KvBuffer, end: int, queries: Tensor | None = None) -> None:
        """Encode the keys of one layer up to `end`, those of earlier chunks being encoded already.

        queries `[num_q_heads, n, head_dim]`: the chunk's own.
        """
        started, codes = time.perf_counter(), self._layers[layer_idx]
        if codes is None:
            asked = queries if self._is_long else None
            self._layers[layer_idx] = self._maker.encode(kv, layer_idx, end, queries=asked)
        else:
            self._maker.extend(codes, kv, layer_idx, end)
        self.seconds += time.perf_counter() - started

    def finish(self, begin: int, kv: KvBuffer) -> CodesIndex | None:
        """The segment's index; None unless every layer holds exactly the segment's keys.

        A pass that failed half-way may have left keys that were never committed: such codes are not used.
        """
        if all(codes is not None and codes.num_keys == kv.length for codes in self._layers):
            return self._maker.index(begin, self._layers, kv)
        return None


@dataclass(frozen=True, slots=True)
class CodesIndex(SegmentIndex):
    """The core's codes, one object per layer for all KV heads; code i belongs to the segment's key i."""

    begin: int
    layers: list[Any]
    kv: KvBuffer
    maker: CodesMaker

    @property
    def nbytes(self) -> int:
        """Bytes of codes and factors."""
        return sum(int(codes.nbytes) for codes in self.layers)

    def codes(self, layer_idx: int) -> Any:
        """`_core.LayerCodes` of one layer."""
        return self.layers[layer_idx]

    def search(self, layer_idx: int, kv_head: int, query: Tensor, k: int, end: int) -> Tensor:
        """See `SegmentIndex.search`."""
        positions, scores = torch.full((1, k), -1, dtype=torch.int64), torch.empty(1, k)
        scales = [None if t is None else t[layer_idx] for t in (self.kv.key_scales, self.kv.value_scales)]
        keys, values = self.kv.keys[layer_idx], self.kv.values[layer_idx]
        part = self.maker.core.Part(keys, values, self.begin, end, self.layers[layer_idx], *scales)
        self.maker.core.search(query[None].contiguous(), part, k, positions, scores, self.maker.budget, kv_head)
        return positions[0][positions[0] >= 0]
