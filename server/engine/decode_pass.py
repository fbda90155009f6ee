"""A forward pass of decode rows in float32 on a CPU, by as few and as cheap calls as torch allows.

One token of a small model is all dispatch: most calls compute for less time than it takes to make their result and the
views of it. So memory and views are made once for each number of rows, every call writes in place, and what can be is
part of the weights: those of the norms, and an order of the heads' dimensions in which rotating is one product of
complex numbers. The same numbers as `FusedModel`'s own pass, up to rounding. Engine thread only, under inference mode.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.attention import NewRows, Step, attend_decodes
from retrieval.geometry import Geometry
from server.engine.fused_layer import FusedLayer, Weights

KEPT_ROWS = 16  # rooms of up to so many rows are kept, and one of more: together they would grow with their square


class DecodePass:
    """`forward` of one token per sequence; it computes in memory of its own, which the next call uses anew."""

    def __init__(self, weights: Weights, geometry: Geometry, epsilon: float) -> None:
        """weights: float32."""
        self.embedding = weights.embedding  # [vocab_size, hidden]
        self._norm = weights.norm * math.sqrt(len(weights.norm))
        self._head, self._head_bias = weights.head, weights.head_bias
        self._layers = [_Layer(layer, geometry) for layer in weights.layers]
        self._geometry, self._epsilon = geometry, epsilon
        self._rooms: dict[int, _Room] = {}

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """tokens int64 `[num_rows]`, cos and sin `[num_rows, 1, head_dim / 2]`; logits `[num_rows, vocab_size]`."""
        num_rows = len(step.decodes)
        room = self._rooms.get(num_rows) or self._make_room(num_rows)
        hidden, turn = room.hidden, torch.complex(cos, sin)
        torch.index_select(self.embedding, 0, tokens, out=hidden)
        for layer_idx, layer in enumerate(self._layers):
            step.announce()
            self._project(layer, room, turn)
            window, out = layer.sliding_window, room.attended
            attend_decodes(room.queries, room.new, layer_idx, layer.scale, window, step, out)
            hidden.addmm_(room.attended_row, layer.out)
            if layer.out_bias is not None:
                hidden.add_(layer.out_bias)
            torch.mm(room.normalized(), layer.gate_up, out=room.gate_up)
            hidden.addmm_(functional.silu(room.gate, inplace=True).mul_(room.up), layer.down)
        return functional.linear(room.normalized().mul_(self._norm), self._head, self._head_bias)

    def _make_room(self, num_rows: int) -> _Room:
        for other in [n for n in self._rooms if n > KEPT_ROWS]:
            del self._rooms[other]
        sizes = self.embedding.shape[1], self._layers[0].gate_up.shape[1]
        self._rooms[num_rows] = _Room(num_rows, *sizes, self._geometry, self._epsilon)
        return self._rooms[num_rows]

    def _project(self, layer: _Layer, room: _Room, turn: Tensor) -> None:
        """Fills the room's queries, keys and values; turn complex `[num_rows, 1, head_dim / 2]`."""
        if layer.qkv_bias is None:
            torch.mm(room.normalized(), layer.qkv, out=room.projected)
        else:
            torch.addmm(layer.qkv_bias, room.normalized(), layer.qkv, out=room.projected)
        if layer.head_norms is not None:
            heads = room.straight
            squares = torch.linalg.vector_norm(heads, dim=-1, keepdim=True).square_()
            heads.mul_(squares.div_(heads.shape[-1]).add_(self._epsilon).rsqrt_()).mul_(layer.head_norms)
        torch.mul(room.complex, turn, out=room.turned)
        room.halves.copy_(room.turned_halves)


class _Layer:
    """One layer's weights as the pass multiplies by them, `[in, out]`."""

    def __init__(self, layer: FusedLayer, geometry: Geometry) -> None:
        g, root = geometry, math.sqrt(len(layer.input_norm))  # what `_Room.normalized` leaves out
        order = _turning_order(g, len(layer.qkv))
        self.qkv = (layer.qkv * layer.input_norm * root)[order].t()
        self.qkv_bias = None if layer.qkv_bias is None else layer.qkv_bias[order]
        self.out, self.out_bias = layer.out.t(), layer.out_bias
        self.gate_up, self.down = (layer.gate_up * layer.post_norm * root).t(), layer.down.t()
        self.scale, self.sliding_window = layer.scale, layer.sliding_window
        self.head_norms: Tensor | None = None  # [num_q_heads + num_kv_heads, head_dim]
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = torch.cat((layer.q_norm.expand(g.num_q_heads, -1), layer.k_norm.expand(g.num_kv_heads, -1)))
            self.head_norms = norms.flatten()[order[: norms.numel()]].view_as(norms)


def _turning_order(geometry: Geometry, num_outputs: int) -> Tensor:
    """Of the projection's outputs: in the heads that are rotated, each dimension of the first half and then the one of
    the second half with which it turns."""
    order = torch.arange(num_outputs)
    num_rotated = (geometry.num_q_heads + geometry.num_kv_heads) * geometry.head_dim
    pairs = order[:num_rotated].view(-1, 2, geometry.head_dim // 2).transpose(1, 2)
    return torch.cat((pairs.flatten(), order[num_rotated:]))


class _Room:
    """What a pass over `num_rows` rows computes in, and views of it."""

    def __init__(self, num_rows: int, hidden_size: int, gate_up_size: int, geometry: Geometry, epsilon: float) -> None:
        g, half = geometry, geometry.head_dim // 2
        num_rotated = g.num_q_heads + g.num_kv_heads
        # One column more, so that the norm of a row has the epsilon in it; a cache line, so that rows begin with one.
        self._padded = torch.zeros(num_rows, hidden_size + 16)
        self._padded[:, hidden_size] = math.sqrt(epsilon * hidden_size)
        self.hidden, self._normed = self._padded[:, :hidden_size], torch.empty(num_rows, hidden_size)
        self._length = torch.empty(num_rows, 1)
        self.projected = torch.empty(num_rows, (num_rotated + g.num_kv_heads) * g.head_dim)
        heads = self.projected.view(num_rows, -1, g.head_dim)
        self.straight = heads[:, :num_rotated]
        self.complex = torch.view_as_complex(self.straight.view(num_rows, -1, half, 2))
        self.turned = torch.empty(num_rows, num_rotated, half, dtype=torch.complex64)
        self.turned_halves = torch.view_as_real(self.turned).transpose(-1, -2)
        rotated = torch.empty(num_rows, num_rotated, g.head_dim, dtype=g.dtype)
        self.halves, self.queries = rotated.view(num_rows, -1, 2, half), rotated[:, : g.num_q_heads]
        self.new = NewRows(rotated[:, g.num_q_heads :], heads[:, num_rotated:])
        self.attended = torch.empty(num_rows, g.num_q_heads, g.head_dim)
        self.attended_row = self.attended.view(num_rows, -1)
        self.gate_up = torch.empty(num_rows, gate_up_size)
        self.gate, self.up = self.gate_up.chunk(2, dim=-1)

    def normalized(self) -> Tensor:
        """hidden / sqrt(sum of its squares + hidden_size * epsilon), of use until the next call."""
        torch.linalg.vector_norm(self._padded, dim=-1, keepdim=True, out=self._length)
        return torch.div(self.hidden, self._length, out=self._normed)
