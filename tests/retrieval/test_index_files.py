"""A segment's indexes as one file: as good as built anew, or not used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrieval import native
from retrieval.builder import IndexBuilder
from retrieval.geometry import Geometry
from retrieval.index_files import IndexFiles
from retrieval.kv_buffer import KvBuffer
from retrieval.segment_index import CodesMaker, SegmentIndex
from retrieval.tensor_file import TensorFileError

GEOMETRY = Geometry(2, 4, 2, 16, torch.float32, (None, None))
DIGEST = b"d" * 20
SINK = 4


def make_kv(num_tokens: int) -> KvBuffer:
    kv = KvBuffer(GEOMETRY, num_tokens + 7, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for layer_idx in range(GEOMETRY.num_layers):
        rows = torch.randn(2, GEOMETRY.num_kv_heads, num_tokens, GEOMETRY.head_dim, generator=generator)
        kv.write(layer_idx, rows[0], rows[1])
    kv.commit(num_tokens)
    return kv


def make_files(kind: str, **options: int) -> IndexFiles:
    core = native.core()
    codes = CodesMaker(core, core.Budget(k=8), **options) if kind == "codes" and core is not None else None
    return IndexFiles("rabitq" if kind == "codes" else kind, options, SINK, codes)


def build(files: IndexFiles, kv: KvBuffer) -> SegmentIndex:
    import numpy as np

    from retrieval.segments import Segment

    builder = IndexBuilder(files.kind, files.options, SINK, lambda *_: None, files.codes)
    segment = Segment(DIGEST, None, 0, 0, np.zeros(kv.length, dtype=np.int32), kv, "")
    builder.submit(segment, None)
    builder.wait()
    builder.close()
    assert isinstance(segment.index, SegmentIndex)
    return segment.index


@pytest.mark.parametrize("kind", ["codes", "flat", "hnsw", "rabitq"])
def test_an_index_finds_what_it_found(tmp_path: Path, kind: str) -> None:
    if kind in ("codes", "rabitq") and native.core() is None:
        pytest.skip("needs the C++ core")
    files, kv, path = make_files(kind), make_kv(300), tmp_path / "index"
    index = build(files, kv)
    assert files.write(path, DIGEST, index) == path.stat().st_size
    again = files.read(path, DIGEST, 0, kv)
    assert again is not None
    assert again.begin == SINK
    assert again.nbytes == index.nbytes
    if kind == "codes":
        assert [codes.save() for codes in again.layers] == [codes.save() for codes in index.layers]
    for layer_idx in range(GEOMETRY.num_layers):
        for kv_head in range(GEOMETRY.num_kv_heads):
            query = torch.randn(GEOMETRY.head_dim, generator=torch.Generator().manual_seed(layer_idx))
            expected = index.search(layer_idx, kv_head, query, 8, 250)
            assert again.search(layer_idx, kv_head, query, 8, 250).tolist() == expected.tolist()
    assert list(tmp_path.iterdir()) == [path], "nothing else is left behind"


def test_an_index_built_otherwise_is_not_used(tmp_path: Path) -> None:
    files, kv, path = make_files("flat"), make_kv(50), tmp_path / "index"
    files.write(path, DIGEST, build(files, kv))
    assert IndexFiles("hnsw", {}, SINK).read(path, DIGEST, 0, kv) is None
    assert IndexFiles("flat", {}, SINK + 1).read(path, DIGEST, 0, kv) is None
    assert files.read(path, b"e" * 20, 0, kv) is None


@pytest.mark.parametrize("kind", ["codes", "flat"])
def test_a_damaged_index_and_one_of_other_keys_is_an_error(tmp_path: Path, kind: str) -> None:
    if kind == "codes" and native.core() is None:
        pytest.skip("needs the C++ core")
    files, kv, path = make_files(kind), make_kv(50), tmp_path / "index"
    files.write(path, DIGEST, build(files, kv))
    with pytest.raises(TensorFileError):
        files.read(path, DIGEST, 0, make_kv(60))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(TensorFileError) as caught:
        files.read(path, DIGEST, 0, kv)
    assert caught.value.reason == "damaged"
