"""Growing K/V storage: what was committed stays, what was not leaves nothing behind."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retrieval.geometry import Geometry
from retrieval.kv_buffer import KvBuffer

CPU = torch.device("cpu")


def test_geometry_counts_bytes_of_both_k_and_v(make_geometry: Any) -> None:
    geometry: Geometry = make_geometry(num_layers=3, num_q_heads=8, num_kv_heads=2, head_dim=16, dtype=torch.bfloat16)
    assert geometry.group_size == 4
    assert geometry.kv_bytes_per_token == 3 * 2 * 16 * 2 * 2


def test_written_tokens_count_only_once_committed(world: Any) -> None:
    buffer = world.kv(3)
    world.extend(buffer, 2, commit=False)
    assert (buffer.length, buffer.nbytes) == (3, 3 * world.geometry.kv_bytes_per_token)
    buffer.commit(2)
    assert (buffer.length, buffer.nbytes) == (5, 5 * world.geometry.kv_bytes_per_token)


def test_a_pass_that_failed_half_way_is_overwritten(world: Any) -> None:
    buffer = world.kv(3)
    committed = buffer.keys[:, :, :3].clone()
    world.extend(buffer, 2, commit=False)
    world.extend(buffer, 4)
    fresh = buffer.keys[:, :, 3:7].clone()
    assert buffer.length == 7
    assert torch.equal(buffer.keys[:, :, :3], committed)
    assert not torch.equal(fresh[:, :, :2], torch.zeros_like(fresh[:, :, :2]))


def test_growing_keeps_what_was_committed_and_doubles(world: Any) -> None:
    buffer = world.kv(8)
    keys, values = buffer.keys[:, :, :8].clone(), buffer.values[:, :, :8].clone()
    buffer.reserve(1)
    assert buffer.capacity == 16
    buffer.reserve(100)
    assert buffer.capacity == 108
    assert torch.equal(buffer.keys[:, :, :8], keys)
    assert torch.equal(buffer.values[:, :, :8], values)


def test_reserving_what_fits_moves_nothing(world: Any) -> None:
    buffer = KvBuffer(world.geometry, 10, CPU)
    address = buffer.keys.data_ptr()
    buffer.reserve(10)
    assert buffer.keys.data_ptr() == address


def test_a_reader_from_before_the_growth_still_sees_its_tokens(world: Any) -> None:
    buffer = world.kv(4)
    view = buffer.keys[1, :, :4]
    expected = view.clone()
    world.extend(buffer, 50)
    assert torch.equal(view, expected)


def test_write_without_room_is_refused(world: Any) -> None:
    buffer = KvBuffer(world.geometry, 2, CPU)
    new = world.randn(world.geometry.num_kv_heads, 3, world.geometry.head_dim)
    with pytest.raises(RuntimeError):
        buffer.write(0, new, new)


def test_copy_range_appends_the_tokens_asked_for(world: Any) -> None:
    source, target = world.kv(10), world.kv(2)
    target.copy_range(source, 3, 9)
    assert target.length == 8
    assert torch.equal(target.keys[:, :, 2:8], source.keys[:, :, 3:9])
    assert torch.equal(target.values[:, :, 2:8], source.values[:, :, 3:9])


def test_an_empty_buffer_has_no_bytes_and_can_grow(world: Any) -> None:
    buffer = KvBuffer(world.geometry, 0, CPU)
    assert buffer.nbytes == 0
    buffer.copy_range(world.kv(5), 0, 5)
    assert buffer.length == 5


def test_int8_keeps_every_row_within_half_a_step_of_its_scale(make_geometry: Any) -> None:
    geometry = make_geometry(num_layers=1, num_q_heads=2, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    geometry = replace(geometry, is_quantized=True)
    assert geometry.kv_bytes_per_token == 2 * 2 * (16 + 4)
    buffer = KvBuffer(geometry, 1, CPU)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 50, 16, generator=generator) * torch.logspace(-3, 3, 50)[:, None]
    values = torch.randn(2, 50, 16, generator=generator)
    values[:, 7] = 0.0
    for begin in (0, 20):
        end = begin + 20 + 10 * (begin > 0)
        buffer.reserve(end - begin)
        buffer.write(0, keys[:, begin:end], values[:, begin:end])
        buffer.commit(end - begin)
    for stored, given in ((buffer.read_keys(0, 0, 50), keys), (buffer.read_values(0, 0, 50), values)):
        half_step = given.abs().amax(dim=-1, keepdim=True) / 127 / 2
        assert bool(((stored - given).abs() <= half_step * 1.001).all())
    copy = KvBuffer(geometry, 1, CPU)
    copy.copy_range(buffer, 10, 30)
    assert torch.equal(copy.read_keys(0, 0, 20), buffer.read_keys(0, 10, 30))


def test_a_sealed_buffer_holds_what_is_valid_and_hardly_more(world: Any) -> None:
    buffer = KvBuffer(world.geometry, 3000, CPU)
    world.extend(buffer, 1000)
    keys = buffer.keys[:, :, :900].clone()
    buffer.length = 900
    sealed = buffer.sealed()
    assert (sealed.length, sealed.capacity) == (900, 900)
    assert torch.equal(sealed.keys, keys)


def test_a_buffer_that_holds_hardly_more_is_sealed_as_it_is(make_world: Any, make_geometry: Any) -> None:
    world = make_world(geometry=make_geometry(num_layers=1, num_kv_heads=1, head_dim=64))
    buffer = KvBuffer(world.geometry, 6000, CPU)
    world.extend(buffer, 5000)
    assert buffer.sealed() is buffer
    exact = world.kv(10)
    assert exact.sealed() is exact


@pytest.mark.parametrize("is_quantized", [False, True])
def test_copying_is_bitwise(make_world: Any, make_geometry: Any, is_quantized: bool) -> None:
    geometry = replace(make_geometry(dtype=torch.bfloat16), is_quantized=is_quantized)
    world = make_world(geometry=geometry)
    source, target = world.kv(50), world.kv(3)
    target.copy_range(source, 7, 40)
    for layer_idx in range(geometry.num_layers):
        assert torch.equal(target.read_keys(layer_idx, 3, 36), source.read_keys(layer_idx, 7, 40))
        assert torch.equal(target.read_values(layer_idx, 3, 36), source.read_values(layer_idx, 7, 40))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_host_memory_goes_back_when_the_last_reader_lets_go(make_world: Any, make_geometry: Any) -> None:
    world = make_world(geometry=make_geometry(head_dim=64))
    before = resident_bytes()
    buffer = KvBuffer(world.geometry, 32_000, CPU)
    assert resident_bytes() - before < 1 << 20, "what is not written is not there"
    buffer.keys.zero_()
    buffer.values.zero_()
    buffer.commit(32_000)
    rows = buffer.keys[1, 0, :10]
    assert resident_bytes() - before > 0.9 * buffer.nbytes
    size = buffer.nbytes
    del buffer
    assert rows.sum() == 0
    del rows
    assert resident_bytes() - before < 0.1 * size


@pytest.mark.parametrize("least_huge", [0, 1 << 40])
def test_a_sealed_buffer_gives_back_what_lies_behind_its_rows(
    make_world: Any, make_geometry: Any, monkeypatch: pytest.MonkeyPatch, least_huge: int
) -> None:
    monkeypatch.setattr("retrieval.kv_buffer.MIN_HUGE_ROW_BYTES", least_huge)
    world = make_world(geometry=make_geometry(head_dim=64))
    before = resident_bytes()
    buffer = KvBuffer(world.geometry, 32_000, CPU)
    buffer.keys.normal_()
    buffer.values.normal_()
    buffer.commit(32_000)
    whole = resident_bytes() - before
    buffer.length = 7_777
    keys, values = buffer.keys[:, :, :7_777].clone(), buffer.values[:, :, :7_777].clone()
    sealed = buffer.sealed()
    assert sealed is buffer
    assert resident_bytes() - before < 0.3 * whole + keys.nbytes + values.nbytes
    assert torch.equal(buffer.keys[:, :, :7_777], keys)
    assert torch.equal(buffer.values[:, :, :7_777], values)
    world.extend(buffer, 10)
    assert buffer.keys[:, :, 8_000:].count_nonzero() == 0, "pages that were given back are empty"
