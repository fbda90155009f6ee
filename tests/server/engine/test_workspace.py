"""Memory of a forward pass: taken in order, void afterwards, and grown to what a pass has asked for."""

from __future__ import annotations

import torch

from server.engine.workspace import Room, Workspace


def test_what_is_taken_does_not_overlap_and_has_its_shape() -> None:
    space = Workspace()
    space.reserve(1 << 16)
    space.begin()
    first, second = space.take((3, 5), torch.float32), space.take((7,), torch.bfloat16)
    assert first is not None
    assert second is not None
    first.fill_(1.0)
    second.fill_(2.0)
    assert first.shape == (3, 5)
    assert second.dtype == torch.bfloat16
    assert bool((first == 1.0).all())
    assert bool((second == 2.0).all())


def test_released_memory_is_taken_again() -> None:
    space = Workspace()
    space.reserve(4096)
    space.begin()
    kept = space.take((64,), torch.uint8)
    mark = space.mark()
    first = space.take((4000,), torch.uint8)
    space.release(mark)
    second = space.take((4000,), torch.uint8)
    assert kept is not None
    assert first is not None
    assert second is not None
    assert second.data_ptr() == first.data_ptr() == kept.data_ptr() + 64


def test_what_did_not_fit_fits_into_the_next_pass() -> None:
    space = Workspace()
    space.begin()
    assert space.take((100,), torch.float32) is None
    assert space.take((100,), torch.float32) is None
    assert space.nbytes == 0
    space.begin()
    assert space.take((100,), torch.float32) is not None
    assert space.take((100,), torch.float32) is not None
    assert space.take((1,), torch.float32) is None
    assert 800 <= space.nbytes < 1000


def test_a_room_without_memory_lets_torch_allocate() -> None:
    room = Room()
    assert room.take((2,), torch.float32) is None
    assert torch.neg(torch.ones(2), out=room.take((2,), torch.float32)).tolist() == [-1.0, -1.0]
