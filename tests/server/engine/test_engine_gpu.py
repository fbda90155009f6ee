"""The engine on a CUDA device: weights, sink and tail there, K and V of segments in host memory."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("index", ["flat", "rabitq"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3"])
async def test_greedy_tokens_on_the_device_equal_those_on_the_cpu(family, index, make_engine, prompt, run, tokens_of):
    oracle = make_engine(family, attention="full", device="cpu", prefix_caching=False)
    engine = make_engine(family, device="cuda", index=index, num_retrieved=4096)
    for num_tokens in (1, 40, 300):
        ids = prompt(num_tokens)
        expected = tokens_of(await run(oracle, ids, max_tokens=120))
        assert tokens_of(await run(engine, ids, max_tokens=120)) == expected, num_tokens
        engine._manager.wait_for_indexes()
        assert tokens_of(await run(engine, ids, max_tokens=120)) == expected, num_tokens


async def test_sealed_segments_lie_in_host_memory_and_the_tail_on_the_device(make_engine, prompt, run):
    engine = make_engine(device="cuda")
    await run(engine, prompt(300), max_tokens=80)
    assert {s.kv.device.type for s in engine._manager.store} == {"cpu"}
