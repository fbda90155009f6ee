"""The pass of decode rows against the forward of prefills over the same weights, in batches of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrieval.context import Context, StaticSet, open_context
from retrieval.decode import TorchDecoder
from retrieval.methods import make_method
from retrieval.segments import SegmentStore
from server.engine.config import EngineConfig
from server.engine.decode_pass import KEPT_ROWS
from server.engine.model_runner import ModelRunner, Work

NUM_PROMPT = 9
TOLERANCE = 1e-4  # of logits of about 10: float32, summed in another order


@pytest.fixture(params=["llama", "qwen2", "qwen3", "mistral"])
def runner(request: Any, tiny_model: Callable[[str], Path]) -> ModelRunner:
    config = EngineConfig(str(tiny_model(request.param)))
    return ModelRunner(config, make_method("full", num_retrieved=1), TorchDecoder(1))


def contexts(runner: ModelRunner, num: int) -> list[Context]:
    """Of a different prompt each, which has been read."""
    made = []
    for i in range(num):
        tokens = torch.arange(i, i + NUM_PROMPT).numpy()
        options = {"salt": "", "capacity": 64, "device": runner.device, "reuse": False}
        made.append(open_context(runner.geometry, StaticSet(), SegmentStore(), tokens, **options))
        runner.run([Work(made[-1], tokens.tolist(), False, 0)])
    return made


def decode(runner: ModelRunner, rows: list[Context], token: int) -> Tensor:
    return runner.run([Work(context, [token + i], True, 1) for i, context in enumerate(rows)]).logits


@torch.inference_mode()
def test_a_decode_equals_a_prefill_of_one_token(runner: ModelRunner) -> None:
    assert runner._fused is not None
    assert runner._fused._decode_pass is not None
    for num in (1, 3, 2):
        decoded, read = contexts(runner, num), contexts(runner, num)
        for step in range(3):
            found = decode(runner, decoded, 20 + step)
            expected = [runner.run([Work(c, [20 + step + i], False, 1)]).logits for i, c in enumerate(read)]
            torch.testing.assert_close(found, torch.cat(expected), atol=TOLERANCE, rtol=TOLERANCE)
        for ours, theirs in zip(decoded, read, strict=True):
            keys = [c.tail.keys[:, :, : c.tail.length] for c in (ours, theirs)]
            torch.testing.assert_close(*keys, atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def test_logits_stay_when_the_next_step_is_computed(runner: ModelRunner) -> None:
    rows = contexts(runner, 2)
    first = decode(runner, rows, 30)
    kept = first.clone()
    decode(runner, rows, 40)
    assert torch.equal(first, kept)


@torch.inference_mode()
def test_rooms_of_many_rows_are_not_all_kept(runner: ModelRunner) -> None:
    assert runner._fused is not None
    decode_pass = runner._fused._decode_pass
    assert decode_pass is not None
    before = set(decode_pass._rooms)
    rows = contexts(runner, KEPT_ROWS + 4)
    for num in (2, KEPT_ROWS + 2, KEPT_ROWS + 4):
        decode(runner, rows[:num], 30)
    assert set(decode_pass._rooms) == {*before, 2, KEPT_ROWS + 4}
    read = contexts(runner, 1)
    found = decode(runner, contexts(runner, KEPT_ROWS + 2), 50)  # its room was given up in between
    expected = runner.run([Work(read[0], [50], False, 1)]).logits
    torch.testing.assert_close(found[:1], expected, atol=TOLERANCE, rtol=TOLERANCE)
