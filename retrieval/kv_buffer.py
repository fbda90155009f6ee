"""Growing storage for K and V of all layers of a run of tokens.

Owns the memory; knows nothing of segments, sequences or attention. Written by the engine thread alone;
readers of the first `length` tokens are safe on any thread, since those are never changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrieval.geometry import Geometry


class KvBuffer:
    """K and V `[num_layers, num_kv_heads, capacity, head_dim]`, the first `length` tokens valid.

    Appending goes layer by layer inside one forward pass and becomes valid at `commit`, so that a pass
    that fails leaves nothing behind. Memory beyond what was written is reserved, not touched.
    """

    def __init__(self, geometry: Geometry, capacity: int, device: torch.device, pin: bool = False) -> None:
        self.geometry = geometry
        self.device = device
        self.length = 0
        self._pin = pin
        self.keys, self.values = self._allocate(max(1, capacity)), self._allocate(max(1, capacity))

    def _allocate(self, capacity: int) -> Tensor:
        shape = (self.geometry.num_layers, self.geometry.num_kv_heads, capacity, self.geometry.head_dim)
        return torch.empty(shape, dtype=self.geometry.dtype, device=self.device, pin_memory=self._pin)

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of K and V of the valid tokens."""
        return self.length * self.geometry.kv_bytes_per_token

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` tokens after the valid ones, doubling when it has to grow."""
        if self.length + num_new <= self.capacity:
            return
        capacity = max(self.length + num_new, 2 * self.capacity)
        for name in ("keys", "values"):
            old, new = getattr(self, name), self._allocate(capacity)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def write(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Put `[num_kv_heads, num_new, head_dim]` after the valid tokens of one layer; `reserve` came before."""
        end = self.length + keys.shape[1]
        self.keys[layer_idx, :, self.length : end] = keys
        self.values[layer_idx, :, self.length : end] = values

    def commit(self, num_new: int) -> None:
        """Declare `num_new` tokens written in all layers."""
        self.length += num_new

    def copy_range(self, source: KvBuffer, begin: int, end: int) -> None:
        """Append tokens `[begin, end)` of another buffer."""
        self.reserve(end - begin)
        target = slice(self.length, self.length + end - begin)
        self.keys[:, :, target] = source.keys[:, :, begin:end]
        self.values[:, :, target] = source.values[:, :, begin:end]
        self.length += end - begin
