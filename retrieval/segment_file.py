"""One segment as a file: K and V of all layers, its token ids, and what tells which tokens came before.

Any thread. Knows nothing of directories, quotas or which file is wanted when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrieval.geometry import Geometry
from retrieval.kv_buffer import KvBuffer
from retrieval.segments import TokenIds
from retrieval.tensor_file import TensorFileError, TensorFileReader, TensorSource, count_bytes, write_tensor_file

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8"}


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """What a file says of its segment, K and V apart."""

    digest: bytes  # of the segment
    start: int
    above: bytes  # digest of the salt and the tokens before `start`: no salt is stored in clear
    token_ids: TokenIds

    @property
    def end(self) -> int:
        """Absolute position after the last token."""
        return self.start + len(self.token_ids)


class PrefixDigests:
    """Digests of ever longer prefixes of one prompt, with its salt; positions must not go back."""

    def __init__(self, salt: str, token_ids: TokenIds) -> None:
        encoded = salt.encode()
        self._digest = hashlib.blake2b(len(encoded).to_bytes(8, "little") + encoded, digest_size=20, person=b"prefix")
        self._ids, self._end = token_ids.astype("<i4"), 0

    def at(self, end: int) -> bytes:
        """Of the first `end` tokens."""
        assert end >= self._end
        self._digest.update(self._ids[self._end : end].tobytes())
        self._end = end
        return self._digest.copy().digest()


def write_segment(path: Path, record: SegmentRecord, kv: KvBuffer, model: str) -> int:
    """Write a segment's file; returns its bytes. `model`: fingerprint of what K and V were computed with."""
    return write_tensor_file(path, *_contents(record, kv, model))


def segment_bytes(record: SegmentRecord, kv: KvBuffer, model: str) -> int:
    """Bytes of the file that `write_segment` would write."""
    return count_bytes(*_contents(record, kv, model))


def _contents(record: SegmentRecord, kv: KvBuffer, model: str) -> tuple[dict[str, Any], list[TensorSource]]:
    description = {
        "model": model,
        "digest": record.digest.hex(),
        "start": record.start,
        "above": record.above.hex(),
    }
    ids = np.ascontiguousarray(record.token_ids, dtype="<i4")
    tokens = TensorSource("token_ids", "I32", ids.shape, ids.nbytes, 1, [[ids.data.cast("B")]])
    sources = [_source(name, tensor, len(ids)) for name, tensor in _named(kv)]
    return description, [tokens, *sources]


def read_record(path: Path, model: str) -> SegmentRecord:
    """The description and token ids of a file, checked; raises `TensorFileError`. K and V are not read."""
    with TensorFileReader(path) as file:
        return _record(file, path, model)


def read_segment(path: Path, model: str, geometry: Geometry, pin: bool = False) -> tuple[SegmentRecord, KvBuffer]:
    """All of a file, every block checked after it was read; raises `TensorFileError`."""
    with TensorFileReader(path) as file:
        record = _record(file, path, model)
        num_tokens = len(record.token_ids)
        kv = KvBuffer(geometry, num_tokens, torch.device("cpu"), pin)
        for name, tensor in _named(kv):
            file.check(name, DTYPE_NAMES[tensor.dtype], tensor.shape, geometry.num_layers)
            for layer_idx in range(geometry.num_layers):
                file.read_block(name, layer_idx, _bytes_of(tensor[layer_idx]))
        kv.commit(num_tokens)
        return record, kv


def _record(file: TensorFileReader, path: Path, model: str) -> SegmentRecord:
    said: dict[str, Any] = file.description
    if said.get("model") != model:
        raise TensorFileError(path, "model", "was written by another model")
    ids = np.empty(file.num_bytes("token_ids") // 4 if "token_ids" in file.names() else 0, dtype="<i4")
    file.check("token_ids", "I32", ids.shape, 1)
    file.read_block("token_ids", 0, ids.data.cast("B"))
    digest, above = bytes.fromhex(said["digest"]), bytes.fromhex(said["above"])
    return SegmentRecord(digest, said["start"], above, ids.astype(np.int32))


def _named(kv: KvBuffer) -> Iterator[tuple[str, Tensor]]:
    yield "keys", kv.keys
    yield "values", kv.values
    if kv.key_scales is not None and kv.value_scales is not None:
        yield "key_scales", kv.key_scales
        yield "value_scales", kv.value_scales


def _source(name: str, tensor: Tensor, num_tokens: int) -> TensorSource:
    """The first tokens of `[num_layers, num_kv_heads, capacity, ...]`, one block per layer, uncopied."""
    shape = (*tensor.shape[:2], num_tokens, *tensor.shape[3:])
    num_bytes = int(np.prod(shape)) * tensor.itemsize
    blocks = [[_bytes_of(head[:num_tokens]) for head in layer] for layer in tensor]
    return TensorSource(name, DTYPE_NAMES[tensor.dtype], shape, num_bytes, len(blocks), blocks)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(torch.uint8).numpy().data.cast("B")
