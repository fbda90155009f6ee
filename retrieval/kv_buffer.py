"""Growing storage for K and V of all layers of a run of tokens, as they are or as int8.

Owns the memory; knows nothing of segments, sequences or attention. Written by the engine thread alone;
readers of the first `length` tokens are safe on any thread, since those are never changed. Host memory is mapped
for each buffer by itself: what is freed goes back to the system at once, whatever lies around it on the heap. Long rows
lie on huge pages where the system has them: a search reads single keys far apart, and the address of each has to be
looked up.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

from retrieval.geometry import Geometry

MIN_MAPPED_BYTES = 64 * 1024  # smaller ones are the heap's
MIN_HUGE_ROW_BYTES = 8 * 1024**2  # of a head, above which its end may lie on a huge page (2 MB) that is hardly used
MAX_SLACK = 0.02  # of its bytes, that a sealed buffer may hold beyond them


class KvBuffer:
    """K and V `[num_layers, num_kv_heads, capacity, head_dim]`, the first `length` tokens valid.

    As int8 each token and head has a float32 scale `[num_layers, num_kv_heads, capacity]` for its key and one
    for its value (absolute maximum / 127). Appending goes layer by layer inside one forward pass and becomes
    valid at `commit`, so that a pass that fails leaves nothing behind. Memory beyond what was written is
    reserved, not touched.
    """

    def __init__(self, geometry: Geometry, capacity: int, device: torch.device, pin: bool = False) -> None:
        self.geometry = geometry
        self.device = device
        self.length = 0
        self._touched = 0  # tokens ever valid
        self._pin = pin
        self._allocate(max(1, capacity))

    def _allocate(self, capacity: int) -> None:
        g = self.geometry
        self._mappings: list[tuple[mmap.mmap, int]] = []  # of the tensors; bytes of a head's row
        shape = (g.num_layers, g.num_kv_heads, capacity, g.head_dim)
        self.keys = self._empty(shape, g.kv_dtype)
        self.values = self._empty(shape, g.kv_dtype)
        self.key_scales = self._scales(shape[:3])
        self.value_scales = self._scales(shape[:3])

    def _scales(self, shape: tuple[int, ...]) -> Tensor | None:
        if not self.geometry.is_quantized:
            return None
        return self._empty(shape, torch.float32)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if self.device.type != "cpu" or self._pin or num_bytes < MIN_MAPPED_BYTES:
            return torch.empty(shape, dtype=dtype, device=self.device, pin_memory=self._pin)
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # unmapped with the tensor
        row_bytes = math.prod(shape[2:]) * dtype.itemsize
        if row_bytes >= MIN_HUGE_ROW_BYTES:
            with contextlib.suppress(AttributeError, OSError):  # a system without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        self._mappings.append((pages, row_bytes))
        return torch.frombuffer(pages, dtype=dtype).view(shape)

    def _tensors(self) -> list[Tensor]:
        return [t for t in (self.keys, self.values, self.key_scales, self.value_scales) if t is not None]

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return int(self.keys.shape[2])

    @property
    def is_pinned(self) -> bool:
        """In page-locked host memory, which a GPU reads while it computes."""
        return self._pin

    @property
    def nbytes(self) -> int:
        """Bytes of K, V and scales of the valid tokens."""
        return self.length * self.geometry.kv_bytes_per_token

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` tokens after the valid ones, doubling when it has to grow."""
        if self.length + num_new <= self.capacity:
            return
        old = self._tensors()
        self._allocate(max(self.length + num_new, 2 * self.capacity))
        for source, target in zip(old, self._tensors(), strict=True):
            _copy(target[:, :, : self.length], source[:, :, : self.length])

    def write(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Put `[num_kv_heads, num_new, head_dim]` after the valid tokens of one layer; `reserve` came before."""
        new = slice(self.length, self.length + keys.shape[1])
        if self.key_scales is None or self.value_scales is None:
            self.keys[layer_idx, :, new] = keys
            self.values[layer_idx, :, new] = values
        else:
            self.keys[layer_idx, :, new], self.key_scales[layer_idx, :, new] = quantize(keys)
            self.values[layer_idx, :, new], self.value_scales[layer_idx, :, new] = quantize(values)

    def read_keys(self, layer_idx: int, begin: int, end: int) -> Tensor:
        """Keys `[num_kv_heads, end - begin, head_dim]` in the model's dtype; a view unless quantized."""
        keys = self.keys[layer_idx, :, begin:end]
        return keys if self.key_scales is None else self._widen(keys, self.key_scales[layer_idx, :, begin:end])

    def read_values(self, layer_idx: int, begin: int, end: int) -> Tensor:
        """Values, as `read_keys`."""
        values = self.values[layer_idx, :, begin:end]
        return values if self.value_scales is None else self._widen(values, self.value_scales[layer_idx, :, begin:end])

    def _widen(self, codes: Tensor, scales: Tensor) -> Tensor:
        return (codes * scales[..., None]).to(self.geometry.dtype)

    def commit(self, num_new: int) -> None:
        """Declare `num_new` tokens written in all layers."""
        self.length += num_new
        self._touched = max(self._touched, self.length)

    def copy_range(self, source: KvBuffer, begin: int, end: int) -> None:
        """Append tokens `[begin, end)` of another buffer of the same geometry."""
        self.reserve(end - begin)
        for theirs, ours in zip(source._tensors(), self._tensors(), strict=True):
            _copy(ours[:, :, self.length : self.length + end - begin], theirs[:, :, begin:end])
        self.commit(end - begin)

    def sealed(self) -> KvBuffer:
        """The valid tokens in host memory, in a buffer that will not grow and holds hardly a byte more: this one, or
        a copy where its pages would hold too much besides."""
        self._give_back()
        if self.device.type == "cpu" and (self.capacity == self.length or self._slack_bytes <= MAX_SLACK * self.nbytes):
            return self
        exact = KvBuffer(self.geometry, self.length, torch.device("cpu"), pin=self._pin or self.device.type == "cuda")
        exact.copy_range(self, 0, self.length)
        return exact

    def _give_back(self) -> None:
        """The pages behind every head's last valid token."""
        page = mmap.PAGESIZE
        for pages, row_bytes in self._mappings:
            for row in range(0, len(pages), row_bytes):
                first = -(-(row + self.length * (row_bytes // self.capacity)) // page) * page
                behind = (row + row_bytes) // page * page
                if first < behind:
                    pages.madvise(mmap.MADV_DONTNEED, first, behind - first)
        if self._mappings:
            self._touched = self.length

    @property
    def _slack_bytes(self) -> int:
        """What lies on pages that were touched, and is not valid: at most what was written and taken back, and a page
        at each end of every head's rows. Pinned memory is not counted: it is whole anyway, and dear to copy."""
        if self._pin:
            return 0
        num_rows = sum(t.shape[0] * t.shape[1] for t in self._tensors())
        return (self._touched - self.length) * self.geometry.kv_bytes_per_token + 2 * num_rows * mmap.PAGESIZE


def _copy(target: Tensor, source: Tensor) -> None:
    """On the caller's thread alone where both are in host memory: torch would wake a pool of threads for it."""
    if target.device.type == source.device.type == "cpu":
        target.view(torch.uint8).numpy()[...] = source.view(torch.uint8).numpy()
    else:
        target.copy_(source)


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[..., head_dim]` as int8 and their float32 scales `[...]`; a row of zeros has scale 0."""
    wide = rows.float()
    scales = wide.abs().amax(dim=-1) / 127.0
    codes = torch.round(wide / scales.clamp_min(1e-30)[..., None]).to(torch.int8)
    return codes, scales
