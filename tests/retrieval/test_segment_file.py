"""Segments and indexes as files: what is read is what was written, or it is an error that says why."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from retrieval import tensor_file
from retrieval.geometry import Geometry
from retrieval.kv_buffer import KvBuffer
from retrieval.segment_file import PrefixDigests, SegmentRecord, read_record, read_segment, write_segment
from retrieval.tensor_file import TensorFileError, TensorFileReader

GEOMETRIES = {
    "bfloat16": Geometry(2, 4, 2, 8, torch.bfloat16, (None, None)),
    "float32": Geometry(2, 4, 2, 8, torch.float32, (None, None)),
    "int8": Geometry(2, 4, 2, 8, torch.bfloat16, (None, None), is_quantized=True),
}


def make_kv(geometry: Geometry, num_tokens: int, capacity: int | None = None) -> KvBuffer:
    kv = KvBuffer(geometry, capacity or num_tokens, torch.device("cpu"))
    generator = torch.Generator().manual_seed(num_tokens)
    for layer_idx in range(geometry.num_layers):
        rows = torch.randn(2, geometry.num_kv_heads, num_tokens, geometry.head_dim, generator=generator)
        kv.write(layer_idx, rows[0], rows[1])
    kv.commit(num_tokens)
    return kv


def make_record(num_tokens: int = 20, start: int = 5) -> SegmentRecord:
    return SegmentRecord(b"d" * 20, start, b"above", np.arange(num_tokens, dtype=np.int32))


def is_same(a: KvBuffer, b: KvBuffer) -> bool:
    return a.length == b.length and all(
        torch.equal(a.read_keys(i, 0, a.length), b.read_keys(i, 0, b.length))
        and torch.equal(a.read_values(i, 0, a.length), b.read_values(i, 0, b.length))
        for i in range(a.geometry.num_layers)
    )


@pytest.mark.parametrize("kind", GEOMETRIES)
@pytest.mark.parametrize("capacity", [20, 64])
def test_a_segment_comes_back_as_it_was(tmp_path: Path, kind: str, capacity: int) -> None:
    geometry, path = GEOMETRIES[kind], tmp_path / "segment"
    kv, record = make_kv(geometry, 20, capacity), make_record()
    assert write_segment(path, record, kv, "model") == path.stat().st_size
    again, read = read_segment(path, "model", geometry)
    assert is_same(read, kv)
    assert (again.digest, again.start, again.above, again.end) == (record.digest, 5, b"above", 25)
    assert again.token_ids.tolist() == record.token_ids.tolist() == read_record(path, "model").token_ids.tolist()
    assert path.stat().st_mode & 0o077 == 0, "for its owner alone"


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    path, kv = tmp_path / "segment.safetensors", make_kv(GEOMETRIES["bfloat16"], 20, 64)
    write_segment(path, make_record(), kv, "model")
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("keys"), kv.keys[:, :, :20])
        assert json.loads(file.metadata()["description"])["model"] == "model"


def test_another_model_and_another_format_are_told_apart_from_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry, path = GEOMETRIES["float32"], tmp_path / "segment"
    write_segment(path, make_record(), make_kv(geometry, 20), "model")
    with pytest.raises(TensorFileError) as caught:
        read_segment(path, "other", geometry)
    assert caught.value.reason == "model"
    monkeypatch.setattr(tensor_file, "FORMAT_VERSION", 2)
    with pytest.raises(TensorFileError) as caught:
        read_segment(path, "model", geometry)
    assert caught.value.reason == "format"
    with pytest.raises(TensorFileError) as caught:
        read_segment(tmp_path / "nothing", "model", geometry)
    assert caught.value.reason == "unreadable"


def test_a_file_is_verified_without_knowing_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    write_segment(path, make_record(), make_kv(GEOMETRIES["int8"], 20), "model")
    with TensorFileReader(path) as file:
        file.verify()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with TensorFileReader(path) as file, pytest.raises(TensorFileError, match="checksum"):
        file.verify()


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_another_geometry_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "segment"
    write_segment(path, make_record(), make_kv(GEOMETRIES[kind], 20), "model")
    for other in set(GEOMETRIES) - {kind}:
        with pytest.raises(TensorFileError):
            read_segment(path, "model", GEOMETRIES[other])


@pytest.mark.parametrize("seed", range(4))
def test_no_flipped_bit_and_no_missing_byte_goes_unseen(tmp_path: Path, seed: int) -> None:
    """Every file differs in one bit or lacks its end or has bytes too many; the header is hit as often as the data."""
    geometry, path, chance = GEOMETRIES["int8"], tmp_path / "segment", random.Random(seed)
    kv = make_kv(geometry, 20)
    write_segment(path, make_record(), kv, "model")
    whole = path.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    num_seen = 0
    for i in range(100):
        damaged = bytearray(whole)
        if i % 4 == 3:
            damaged = damaged[: chance.randrange(len(whole))] if i % 8 == 3 else damaged + b"x" * chance.randint(1, 9)
        else:
            at = chance.randrange(*((0, header_bytes) if i % 2 else (header_bytes, len(whole))))
            damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            record, read = read_segment(path, "model", geometry)
        except TensorFileError:
            num_seen += 1
        else:  # a blank of the padding
            assert is_same(read, kv), i
            assert record.token_ids.tolist() == list(range(20)), i
    assert num_seen >= 95


def test_a_write_that_the_disk_takes_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, path, kv = GEOMETRIES["float32"], tmp_path / "segment", make_kv(GEOMETRIES["float32"], 20)

    class Slow:
        def __init__(self, file) -> None:
            self._file = file

        def write(self, data) -> int:
            return self._file.write(bytes(data)[:7])

        def __getattr__(self, name: str):
            return getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

    real = tensor_file.os.fdopen
    monkeypatch.setattr(tensor_file.os, "fdopen", lambda *args, **options: Slow(real(*args, **options)))
    write_segment(path, make_record(), kv, "model")
    assert is_same(read_segment(path, "model", geometry)[1], kv)


def test_prefix_digests_tell_salts_and_tokens_apart() -> None:
    ids = np.arange(10, dtype=np.int32)
    digests = PrefixDigests("salt", ids)
    first, same, longer = digests.at(4), digests.at(4), digests.at(10)
    assert first == same == PrefixDigests("salt", ids[:4]).at(4)
    assert longer == PrefixDigests("salt", ids).at(10)
    others = {PrefixDigests("other", ids).at(4), PrefixDigests("salt", ids + 1).at(4), PrefixDigests("", ids).at(4)}
    assert len({first, longer, *others}) == 5
