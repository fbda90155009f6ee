"""A forward pass of decode rows on a CPU, in float32 and by few calls.

One token of a small model is all dispatch: most calls compute for less time than it takes to make their result and the
views of it. So memory and views are made once for each number of rows, every call writes in place, a product takes the
norm or the gate before it along, and the heads' dimensions are ordered so that rotating is one product of complex
numbers. The same numbers as `FusedModel`'s own pass, up to rounding. Engine thread only, under inference mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrieval.attention import NewRows, Step, attend_decodes
from retrieval.geometry import Geometry
from server.engine.fused_layer import FusedLayer, Weights
from server.engine.linear import make_linear, rows_of

KEPT_ROWS = 16  # rooms of up to so many rows are kept, and one of more: together they would grow with their square


class DecodePass:
    """`forward` of one token per sequence; it computes in memory of its own, which the next call uses anew."""

    def __init__(self, weights: Weights, geometry: Geometry, epsilon: float) -> None:
        self._embedding = weights.embedding  # [vocab_size, hidden]
        self._head = make_linear(weights.head, weights.head_bias, weights.norm, epsilon)
        self._layers = [_Layer(layer, geometry, epsilon) for layer in weights.layers]
        self._gate_up_size = len(weights.layers[0].gate_up)
        self._geometry, self._epsilon = geometry, epsilon
        self._rows_of = rows_of()
        self._rooms: dict[int, _Room] = {}

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """tokens int64 `[num_rows]`, cos and sin float32 `[num_rows, 1, head_dim / 2]`; logits float32
        `[num_rows, vocab_size]`."""
        num_rows = len(step.decodes)
        room = self._rooms.get(num_rows) or self._make_room(num_rows)
        turn = torch.complex(cos, sin)
        room.hidden.copy_(torch.index_select(self._embedding, 0, tokens))
        for layer_idx, layer in enumerate(self._layers):
            step.announce()
            self._project(layer, room, turn)
            window, out = layer.sliding_window, room.attended
            attend_decodes(room.queries, room.new, layer_idx, layer.scale, window, step, out)
            layer.out.apply(room.attended_rows, room.hidden_rows, True)
            layer.gate_up.apply(room.hidden_rows, room.gate_up_rows)
            layer.down.apply(room.gate_up_rows, room.hidden_rows, True)
        logits = torch.empty(num_rows, len(self._embedding))
        self._head.apply(room.hidden_rows, self._rows_of(logits))
        return logits

    def _make_room(self, num_rows: int) -> _Room:
        for other in [n for n in self._rooms if n > KEPT_ROWS]:
            del self._rooms[other]
        self._rooms[num_rows] = _Room(num_rows, self._embedding.shape[1], self._gate_up_size, self._geometry)
        return self._rooms[num_rows]

    def _project(self, layer: _Layer, room: _Room, turn: Tensor) -> None:
        """Fills the room's queries, keys and values; turn complex `[num_rows, 1, head_dim / 2]`."""
        layer.qkv.apply(room.hidden_rows, room.projected_rows)
        if layer.head_norms is not None:
            heads = room.straight
            squares = torch.linalg.vector_norm(heads, dim=-1, keepdim=True).square_()
            heads.mul_(squares.div_(heads.shape[-1]).add_(self._epsilon).rsqrt_()).mul_(layer.head_norms)
        torch.mul(room.complex, turn, out=room.turned)
        room.halves.copy_(room.turned_halves)


class _Layer:
    """One layer's weights as the pass multiplies by them."""

    def __init__(self, layer: FusedLayer, geometry: Geometry, epsilon: float) -> None:
        g = geometry
        order = _turning_order(g, len(layer.qkv))
        bias = None if layer.qkv_bias is None else layer.qkv_bias[order]
        self.qkv = make_linear(layer.qkv[order], bias, layer.input_norm, epsilon)
        self.out = make_linear(layer.out, layer.out_bias)
        self.gate_up = make_linear(layer.gate_up, None, layer.post_norm, epsilon)
        self.down = make_linear(layer.down, is_gated=True)
        self.scale, self.sliding_window = layer.scale, layer.sliding_window
        self.head_norms: Tensor | None = None  # [num_q_heads + num_kv_heads, head_dim]
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = torch.cat((layer.q_norm.expand(g.num_q_heads, -1), layer.k_norm.expand(g.num_kv_heads, -1)))
            self.head_norms = norms.float().flatten()[order[: norms.numel()]].view_as(norms)


def _turning_order(geometry: Geometry, num_outputs: int) -> Tensor:
    """Of the projection's outputs: in the heads that are rotated, each dimension of the first half and then the one of
    the second half with which it turns."""
    order = torch.arange(num_outputs)
    num_rotated = (geometry.num_q_heads + geometry.num_kv_heads) * geometry.head_dim
    pairs = order[:num_rotated].view(-1, 2, geometry.head_dim // 2).transpose(1, 2)
    return torch.cat((pairs.flatten(), order[num_rotated:]))


class _Room:
    """What a pass over `num_rows` rows computes in, and views of it; `_rows` are those that products take."""

    def __init__(self, num_rows: int, hidden_size: int, gate_up_size: int, geometry: Geometry) -> None:
        g, half, rows = geometry, geometry.head_dim // 2, rows_of()
        num_rotated = g.num_q_heads + g.num_kv_heads
        self.hidden = torch.empty(num_rows, hidden_size)
        projected = torch.empty(num_rows, (num_rotated + g.num_kv_heads) * g.head_dim)
        heads = projected.view(num_rows, -1, g.head_dim)
        self.straight = heads[:, :num_rotated]
        self.complex = torch.view_as_complex(self.straight.view(num_rows, -1, half, 2))
        self.turned = torch.empty(num_rows, num_rotated, half, dtype=torch.complex64)
        self.turned_halves = torch.view_as_real(self.turned).transpose(-1, -2)
        rotated = torch.empty(num_rows, num_rotated, g.head_dim, dtype=g.dtype)
        self.halves, self.queries = rotated.view(num_rows, -1, 2, half), rotated[:, : g.num_q_heads]
        self.new = NewRows(rotated[:, g.num_q_heads :], heads[:, num_rotated:])
        self.attended = torch.empty(num_rows, g.num_q_heads, g.head_dim)
        self.hidden_rows, self.projected_rows = rows(self.hidden), rows(projected)
        self.attended_rows = rows(self.attended.view(num_rows, -1))
        self.gate_up_rows = rows(torch.empty(num_rows, gate_up_size))
