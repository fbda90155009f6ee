"""A forward pass of decode rows in float32 on a CPU, by as few and as cheap calls as torch allows.

One token of a small model is all dispatch: most calls compute for less time than it takes to make their result and the
views of it. So memory and views are made once for each number of rows, every call writes in place, and the weights of
norms are part of the products that follow them. The same numbers as `FusedModel`'s own pass, up to rounding. Engine
thread only, under inference mode.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.attention import NewRows, Step, attend_decodes
from retrieval.geometry import Geometry
from server.engine.fused_layer import FusedLayer, Weights


class DecodePass:
    """`forward` of one token per sequence; it computes in memory of its own, which the next call uses anew."""

    def __init__(self, weights: Weights, geometry: Geometry, epsilon: float) -> None:
        """weights: float32."""
        self.embedding = weights.embedding  # [vocab_size, hidden]
        self._norm, self._head, self._head_bias = weights.norm, weights.head, weights.head_bias
        self._layers = [_Layer(layer, geometry) for layer in weights.layers]
        self._geometry, self._epsilon = geometry, torch.tensor(epsilon)
        self._rooms: dict[int, _Room] = {}

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """tokens int64 `[num_rows]`, cos and sin `[num_rows, 1, head_dim / 2]`; logits `[num_rows, vocab_size]`."""
        num_rows = len(step.decodes)
        room = self._rooms.get(num_rows) or self._make_room(num_rows)
        hidden = room.hidden
        torch.index_select(self.embedding, 0, tokens, out=hidden)
        for layer_idx, layer in enumerate(self._layers):
            step.announce()
            self._project(layer, room, cos, sin)
            attended = attend_decodes(room.queries, room.new, layer_idx, layer.scale, layer.sliding_window, step)
            hidden.addmm_(attended.view(num_rows, -1), layer.out)
            if layer.out_bias is not None:
                hidden.add_(layer.out_bias)
            self._normalize(hidden, room.scale, room.normed)
            torch.mm(room.normed, layer.gate_up, out=room.gate_up)
            hidden.addmm_(functional.silu(room.gate, inplace=True).mul_(room.up), layer.down)
        self._normalize(hidden, room.scale, room.normed)
        return functional.linear(room.normed.mul_(self._norm), self._head, self._head_bias)

    def _make_room(self, num_rows: int) -> _Room:
        layer, hidden_size = self._layers[0], self.embedding.shape[1]
        room = _Room(num_rows, hidden_size, layer.gate_up.shape[1], self._geometry)
        self._rooms[num_rows] = room
        return room

    def _project(self, layer: _Layer, room: _Room, cos: Tensor, sin: Tensor) -> None:
        """Fills the room's queries, keys and values."""
        self._normalize(room.hidden, room.scale, room.normed)
        if layer.qkv_bias is None:
            torch.mm(room.normed, layer.qkv, out=room.projected)
        else:
            torch.addmm(layer.qkv_bias, room.normed, layer.qkv, out=room.projected)
        if layer.head_norms is not None:
            self._normalize(room.straight, room.head_scale, room.straight)
            room.straight.mul_(layer.head_norms)
        torch.mul(room.halves, cos, out=room.rotated_halves)
        room.rotated_first.addcmul_(room.second, sin, value=-1)
        room.rotated_second.addcmul_(room.first, sin)
        room.queries.copy_(room.rotated_queries)

    def _normalize(self, rows: Tensor, scale: Tensor, out: Tensor) -> None:
        """rows / sqrt(mean of their squares + epsilon), along the last dimension."""
        torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=scale)
        torch.addcmul(self._epsilon, scale, scale, value=1 / rows.shape[-1], out=scale)
        torch.mul(rows, scale.rsqrt_(), out=out)


class _Layer:
    """One layer's weights as the pass multiplies by them, `[in, out]`."""

    def __init__(self, layer: FusedLayer, geometry: Geometry) -> None:
        self.qkv, self.qkv_bias = (layer.qkv * layer.input_norm).t(), layer.qkv_bias
        self.out, self.out_bias = layer.out.t(), layer.out_bias
        self.gate_up, self.down = (layer.gate_up * layer.post_norm).t(), layer.down.t()
        self.scale, self.sliding_window = layer.scale, layer.sliding_window
        self.head_norms: Tensor | None = None  # [num_q_heads + num_kv_heads, head_dim]
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = (layer.q_norm.expand(geometry.num_q_heads, -1), layer.k_norm.expand(geometry.num_kv_heads, -1))
            self.head_norms = torch.cat(norms)


class _Room:
    """What a pass over `num_rows` rows computes in, and views of it."""

    def __init__(self, num_rows: int, hidden_size: int, gate_up_size: int, geometry: Geometry) -> None:
        g, half = geometry, geometry.head_dim // 2
        num_rotated = g.num_q_heads + g.num_kv_heads
        self.hidden, self.normed = torch.empty(2, num_rows, hidden_size)
        self.scale, self.head_scale = torch.empty(num_rows, 1), torch.empty(num_rows, num_rotated, 1)
        self.projected = torch.empty(num_rows, (num_rotated + g.num_kv_heads) * g.head_dim)
        heads = self.projected.view(num_rows, -1, g.head_dim)
        self.straight = heads[:, :num_rotated]
        self.first, self.second = self.straight[..., :half], self.straight[..., half:]
        self.halves = self.straight.view(num_rows, -1, half)
        rotated = torch.empty(num_rows, num_rotated, g.head_dim)
        self.rotated_first, self.rotated_second = rotated[..., :half], rotated[..., half:]
        self.rotated_halves, self.rotated_queries = rotated.view(num_rows, -1, half), rotated[:, : g.num_q_heads]
        self.new = NewRows(rotated[:, g.num_q_heads :], heads[:, num_rotated:])
        self.queries = torch.empty(num_rows, g.num_q_heads, g.head_dim, dtype=g.dtype)
        self.gate_up = torch.empty(num_rows, gate_up_size)
        self.gate, self.up = self.gate_up.chunk(2, dim=-1)
