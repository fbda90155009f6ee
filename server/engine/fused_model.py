"""A forward pass of the Llama family with few dispatches: fused projections, no module calls, no mask.

Made from a loaded transformers model, whose weights it shares or concatenates; the same numbers as its own
forward up to rounding. Exists because a small model's decode step is all dispatch: transformers' forward costs
a few milliseconds whatever the context. A model it does not know runs through transformers.

Decode steps of a small model on a CPU have a pass of their own (decode_pass.py): a product with a handful of rows is
several times faster there than oneDNN's in bfloat16, which pays only for large ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval.attention import Step, attend_packed
from retrieval.geometry import Geometry
from server.engine.decode_pass import DecodePass
from server.engine.fused_layer import FusedLayer, Weights
from server.engine.workspace import HEAP, Room, Workspace

KNOWN_MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LAYER_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_CHILDREN = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
MAX_SMALL_PARAMETERS = 64_000_000  # without the core, a float32 copy of 256 MB
WIDE = torch.empty(0)  # the decode pass is in float32
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others' frequencies hang on the length
MIN_ROOM_ROWS = 64  # tensors of fewer rows are so small that the heap serves them best


class FusedModel:
    """`forward` takes what the packed step needs and returns logits."""

    def __init__(self, model: Any, geometry: Geometry) -> None:
        self._geometry = geometry
        self._rotary = model.model.rotary_emb
        self._has_fixed_frequencies = getattr(self._rotary, "rope_type", "") in FIXED_ROPE_TYPES
        self._frequencies = self._rotary.inv_freq.float()  # [head_dim / 2]
        self._epsilon = float(model.config.rms_norm_eps)
        windows = geometry.sliding_windows
        layers = [_fuse(layer, window) for layer, window in zip(model.model.layers, windows, strict=True)]
        embedding: Tensor = model.model.embed_tokens.weight.detach()
        is_tied = model.lm_head.weight is model.model.embed_tokens.weight
        head = embedding if is_tied else model.lm_head.weight.detach()
        self._weights = Weights(embedding, layers, model.model.norm.weight.detach(), head, model.lm_head.bias)
        self._decode_pass = DecodePass(self._weights, geometry, self._epsilon) if _is_small(model) else None
        self._workspace = Workspace()
        self._most_rows = 0  # of a pass in the workspace

    def forward(self, tokens: Tensor, positions: Tensor, wanted: list[int], step: Step) -> Tensor:
        """tokens and positions int64 `[num_tokens]`, wanted rows; logits float32 `[num_wanted, vocab_size]`.

        Where there is a pass for decodes, their rows go through it together and each prefill through this one by
        itself: products round differently in other shapes, and what a sequence computes should not depend on what
        else is in the batch.
        """
        if self._decode_pass is None or not step.prefills:
            return self._run_part(tokens, positions, wanted, step)
        logits = []
        for part, rows in step.split():
            inside = [row - rows.start for row in wanted if rows.start <= row < rows.stop]
            logits.append(self._run_part(tokens[rows], positions[rows], inside, part))
        return torch.cat(logits)

    def _run_part(self, tokens: Tensor, positions: Tensor, wanted: list[int], part: Step) -> Tensor:
        if self._decode_pass is None or not part.decodes:
            return self._run(tokens, positions, wanted, part).float()
        cos, sin = self._waves(WIDE, positions)
        logits = self._decode_pass.forward(tokens, cos, sin, part)
        return logits if len(wanted) == len(part.decodes) else logits[wanted]

    def reserve(self, num_rows: int) -> None:
        """Hold what passes of so many rows take, from what the longest one so far has taken: it grows by the rows."""
        if self._most_rows:
            self._workspace.reserve(-(-self._workspace.needed_bytes * num_rows // self._most_rows))

    def _run(self, tokens: Tensor, positions: Tensor, wanted: list[int], step: Step) -> Tensor:
        room, weights = self._room(len(tokens)), self._weights
        embedding = weights.embedding
        hidden = torch.index_select(
            embedding, 0, tokens, out=room.take((len(tokens), embedding.shape[1]), embedding.dtype)
        )
        cos, sin = self._rotation(hidden, positions)
        for layer_idx, layer in enumerate(weights.layers):
            mark = room.mark()
            hidden.add_(self._attend(layer, layer_idx, hidden, cos, sin, step, room))
            room.release(mark)
            hidden.add_(self._feed_forward(layer, hidden, room))
            room.release(mark)
        if len(wanted) != len(hidden):
            hidden = hidden[torch.tensor(wanted, device=hidden.device, dtype=torch.int64)]
        return functional.linear(rms_norm(hidden, weights.norm, self._epsilon), weights.head, weights.head_bias)

    def _room(self, num_tokens: int) -> Room:
        if num_tokens < MIN_ROOM_ROWS or self._weights.embedding.device.type != "cpu":
            return HEAP
        self._most_rows = max(self._most_rows, num_tokens)
        self._workspace.begin()
        return self._workspace

    def _rotation(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[num_tokens, 1, head_dim]` in the dtype of `hidden`."""
        cos, sin = (wave.repeat(1, 1, 2) for wave in self._waves(hidden, positions))
        return cos, sin

    def _waves(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of the first half, `[num_tokens, 1, head_dim / 2]`; the second is alike."""
        if not self._has_fixed_frequencies:
            cos, sin = self._rotary(hidden[None], position_ids=positions[None])
            half = self._geometry.head_dim // 2
            return cos[0, :, None, :half], sin[0, :, None, :half]
        angles, scaling = positions[:, None, None] * self._frequencies, self._rotary.attention_scaling
        waves = (angles.cos(), angles.sin()) if scaling == 1.0 else (angles.cos() * scaling, angles.sin() * scaling)
        return waves[0].to(hidden.dtype), waves[1].to(hidden.dtype)

    def _attend(
        self, layer: FusedLayer, layer_idx: int, hidden: Tensor, cos: Tensor, sin: Tensor, step: Step, room: Room
    ) -> Tensor:
        g = self._geometry
        step.announce()
        normed = rms_norm(hidden, layer.input_norm, self._epsilon, room)
        heads = linear(normed, layer.qkv, layer.qkv_bias, room).view(len(hidden), -1, g.head_dim)
        rotated, values = heads[:, : g.num_q_heads + g.num_kv_heads], heads[:, g.num_q_heads + g.num_kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            queries = rms_norm(rotated[:, : g.num_q_heads], layer.q_norm, self._epsilon, room)
            keys = rms_norm(rotated[:, g.num_q_heads :], layer.k_norm, self._epsilon, room)
            rotated = torch.cat((queries, keys), dim=1, out=room.take(tuple(rotated.shape), rotated.dtype))
        rotated = rotate(rotated, cos, sin, room)
        queries, keys = cast(rotated[:, : g.num_q_heads], g.dtype, room), rotated[:, g.num_q_heads :]
        out = room.take(tuple(queries.shape), g.dtype)
        attended = attend_packed(queries, keys, values, layer_idx, layer.scale, layer.sliding_window, step, out)
        return linear(attended.view(len(hidden), -1).to(hidden.dtype), layer.out, layer.out_bias, room)

    def _feed_forward(self, layer: FusedLayer, hidden: Tensor, room: Room) -> Tensor:
        normed = rms_norm(hidden, layer.post_norm, self._epsilon, room)
        gate, up = linear(normed, layer.gate_up, None, room).chunk(2, dim=-1)
        gated = functional.silu(gate, inplace=True)
        return linear(torch.mul(gated, up, out=room.take(tuple(up.shape), up.dtype)), layer.down, None, room)


def _is_small(model: Any) -> bool:
    """A model on a CPU whose decode steps are worth a pass of their own."""
    num_parameters: int = sum(p.numel() for p in model.parameters())
    return model.lm_head.weight.device.type == "cpu" and num_parameters <= MAX_SMALL_PARAMETERS


def fuse(model: Any, geometry: Geometry) -> FusedModel | None:
    """The fused forward of a model of a known family with plain linear layers; None for any other."""
    if type(model).__name__ not in KNOWN_MODELS or model.config.hidden_act != "silu":
        return None
    layers = list(model.model.layers)
    if not all(_is_plain(layer) for layer in layers) or type(model.lm_head) is not nn.Linear:
        return None
    return FusedModel(model, geometry)


def _is_plain(layer: Any) -> bool:
    """Nothing in the layer but what `FusedLayer` holds: no quantized linears, no adapters, no extra norms."""
    linears = [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    linears += [getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    has_known_children = {name for name, _ in layer.named_children()} <= LAYER_CHILDREN and {
        name for name, _ in layer.self_attn.named_children()
    } <= ATTENTION_CHILDREN
    has_mlp_bias = any(linear.bias is not None for linear in linears[:3])
    return has_known_children and not has_mlp_bias and all(type(linear) is nn.Linear for linear in linears)


def _fuse(layer: Any, sliding_window: int | None) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    has_bias = attention.q_proj.bias is not None
    return FusedLayer(
        input_norm=layer.input_layernorm.weight,
        qkv=torch.cat([p.weight for p in projections]),
        qkv_bias=torch.cat([p.bias for p in projections]) if has_bias else None,
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight,
        scale=float(attention.scaling),
        sliding_window=sliding_window,
    )


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, room: Room = HEAP) -> Tensor:
    """`functional.linear` of `[num_tokens, in_features]`, in the room's memory."""
    out = room.take((len(rows), len(weight)), rows.dtype)
    if out is None:
        return functional.linear(rows, weight, bias)
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def cast(tensor: Tensor, dtype: torch.dtype, room: Room = HEAP) -> Tensor:
    """A dense copy, or in the heap's case the tensor itself where it is dense and of that dtype already."""
    out = room.take(tuple(tensor.shape), dtype)
    return tensor.to(dtype).contiguous() if out is None else out.copy_(tensor)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float, room: Room = HEAP) -> Tensor:
    """Root mean square layer norm in float32, rounded to the input's dtype before the weight is applied."""
    if hidden.dtype == torch.float32:
        return torch.rms_norm(hidden, weight.shape, weight, epsilon)
    normed = room.take(tuple(hidden.shape), hidden.dtype)
    mark = room.mark()
    wide = cast(hidden, torch.float32, room)
    square = torch.square(wide, out=room.take(tuple(hidden.shape), torch.float32))
    wide.mul_(torch.rsqrt(square.mean(-1, keepdim=True).add_(epsilon)))
    room.release(mark)
    normed = wide.to(hidden.dtype) if normed is None else normed.copy_(wide)
    return normed.mul_(weight)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, room: Room = HEAP) -> Tensor:
    """Rotary embedding of `[num_tokens, heads, head_dim]`, halves paired as in transformers' Llama."""
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.mul(heads, cos, out=room.take(tuple(heads.shape), heads.dtype))
    turned = room.take(tuple(heads.shape), heads.dtype)
    if turned is None:
        turned = torch.cat((-second, first), dim=-1)
    else:
        begin, end = turned.chunk(2, dim=-1)
        torch.neg(second, out=begin)
        end.copy_(first)
    return torch.addcmul(rotated, turned, sin, out=rotated)
