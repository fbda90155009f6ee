"""The indexes of a segment as one file beside its keys: written and read by kind, options and segment.

Any thread. A file that was written for another kind or other options is no damage: the index is built anew.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval import index as indexes
from retrieval.index import IndexInputError, KeyIndex
from retrieval.kv_buffer import KvBuffer
from retrieval.segment_index import CodesIndex, CodesMaker, HeadIndexes, SegmentIndex
from retrieval.tensor_file import TensorFileReader, TensorSource, write_tensor_file


@dataclass(frozen=True, slots=True)
class IndexFiles:
    """How the indexes of this server are built; only files that were built so are read."""

    kind: str
    options: dict[str, Any]
    num_sink_tokens: int
    codes: CodesMaker | None = None

    def write(self, path: Path, digest: bytes, index: SegmentIndex) -> int:
        """Write a segment's index; returns the file's bytes. `digest` is the segment's."""
        if isinstance(index, CodesIndex):
            tensors = _sources_of_codes(index.layers)
        else:
            heads = self._pack_heads(index, path.parent)
            tensors = [_source(name, len(data), [data]) for name, data in heads.items()]
        return write_tensor_file(path, {"index": self._identity(), "segment": digest.hex()}, tensors)

    def read(self, path: Path, digest: bytes, start: int, kv: KvBuffer) -> SegmentIndex | None:
        """The index of the segment at position `start` whose K and V are `kv`; None if it was built otherwise.

        Raises `TensorFileError` on a damaged file.
        """
        begin = max(0, self.num_sink_tokens - start)
        with TensorFileReader(path) as file:
            if (file.description.get("index"), file.description.get("segment")) != (self._identity(), digest.hex()):
                return None
            try:
                return self._load_codes(file, begin, kv) if self.codes else self._load_heads(file, path, begin, kv)
            except (ValueError, IndexInputError) as error:
                raise file.damaged(f"its index does not fit its segment ({error})") from error

    def _identity(self) -> dict[str, Any]:
        codes = None if self.codes is None else [self.codes.bits, self.codes.seed, _codes_format(self.codes.core)]
        said = {"kind": self.kind, "options": self.options, "num_sink_tokens": self.num_sink_tokens, "codes": codes}
        identity: dict[str, Any] = json.loads(json.dumps(said))  # as it comes back from a file
        return identity

    def _load_codes(self, file: TensorFileReader, begin: int, kv: KvBuffer) -> SegmentIndex:
        assert self.codes is not None
        geometry, layers = kv.geometry, []
        for layer_idx in range(geometry.num_layers):
            codes = self.codes.core.LayerCodes.load(_read(file, str(layer_idx)))
            shape = (codes.num_keys, codes.num_kv_heads, codes.head_dim)
            if shape != (kv.length, geometry.num_kv_heads, geometry.head_dim):
                raise ValueError(f"codes of {shape} in layer {layer_idx}")
            layers.append(codes)
        return self.codes.index(begin, layers, kv)

    def _pack_heads(self, index: SegmentIndex, folder: Path) -> dict[str, bytes]:
        """Every index saves itself to a file of its own; here their bytes become one."""
        assert isinstance(index, HeadIndexes)
        packed = {}
        with tempfile.TemporaryDirectory(dir=folder, suffix=".tmp") as scratch:
            for layer_idx, heads in enumerate(index.layers):
                for kv_head, head in enumerate(heads):
                    head.save(Path(scratch) / "index")
                    packed[f"{layer_idx}.{kv_head}"] = (Path(scratch) / "index").read_bytes()
        return packed

    def _load_heads(self, file: TensorFileReader, path: Path, begin: int, kv: KvBuffer) -> SegmentIndex:
        kind, geometry = indexes.kind_class(self.kind), kv.geometry
        layers: list[list[KeyIndex]] = []
        with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as scratch:
            for layer_idx in range(geometry.num_layers):
                keys = kv.read_keys(layer_idx, begin, kv.length)
                layers.append([])
                for kv_head in range(geometry.num_kv_heads):
                    one = Path(scratch) / "index"
                    one.write_bytes(_read(file, f"{layer_idx}.{kv_head}"))
                    layers[-1].append(kind.load(one, keys[kv_head]))
        return HeadIndexes(begin, layers, has_own_keys=geometry.is_quantized)


def _codes_format(core: Any) -> str:
    """The version of the core's own format, which its bytes begin with."""
    return str(core.LayerCodes(1, 8).save()[:8].hex())


def _source(name: str, num_bytes: int, pieces: Iterable[bytes]) -> TensorSource:
    return TensorSource(name, "U8", (num_bytes,), num_bytes, 1, (pieces,))


def _sources_of_codes(layers: list[Any]) -> list[TensorSource]:
    """One layer is packed at a time, for its length first: packing is cheap, and memory is accounted for."""
    sizes = [len(codes.save()) for codes in layers]
    return [_source(str(i), sizes[i], (codes.save() for codes in [layer])) for i, layer in enumerate(layers)]


def _read(file: TensorFileReader, name: str) -> bytes:
    if name not in file.names():
        raise file.damaged(f"it holds no {name}")
    out = bytearray(file.num_bytes(name))
    file.check(name, "U8", [len(out)], 1)
    file.read_block(name, 0, memoryview(out))
    return bytes(out)
