"""Tiny models made in the test, and engines over them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from server.engine.build import build_engine
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.events import Done, Event, Failure, Token
from server.engine.recorder import NullRecorder
from server.engine.request import Request, SamplingParams

SIZES: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(head_dim=16, **SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(pad_token_id=0, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=32, **SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(head_dim=16, sliding_window=64, **SIZES)),
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a randomly initialised model of that family, float32, saved once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(7)
            made[family] = tmp_path_factory.mktemp(family)
            MODELS[family]().to(torch.float32).save_pretrained(made[family])
        return made[family]

    return make


SMALL = {"num_sink_tokens": 16, "window_size": 32, "seal_tokens": 64, "max_num_batched_tokens": 96}


@pytest.fixture
async def make_engine(tiny_model: Callable[[str], Path]) -> AsyncIterator[Callable[..., Engine]]:
    """Starts an engine over `family` (or `model=`) with small segments; all are stopped at the end."""
    engines: list[Engine] = []

    def make(family: str = "llama", **options: Any) -> Engine:
        settings = {"model": str(tiny_model(family)), "index": "flat", "num_threads": 1, **SMALL} | options
        recorder = settings.pop("recorder", NullRecorder())
        engines.append(build_engine(EngineConfig(**settings), recorder))
        engines[-1].start()
        return engines[-1]

    yield make
    for engine in engines:
        await engine.stop(0)


def make_prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids without special ones."""
    generator = torch.Generator().manual_seed(1000 * seed + num_tokens)
    return tuple(torch.randint(3, 300, (num_tokens,), generator=generator).tolist())


@pytest.fixture
def prompt() -> Callable[..., tuple[int, ...]]:
    """`make_prompt`."""
    return make_prompt


@pytest.fixture
def run() -> Callable[..., Awaitable[list[Event]]]:
    """Runs one request to its end and returns all its events."""
    counter = iter(range(10**6))

    async def run_one(engine: Engine, token_ids: tuple[int, ...], *, salt: str = "", **sampling: Any) -> list[Event]:
        params = SamplingParams(**({"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | sampling))
        stream = engine.submit(Request(f"r{next(counter)}", token_ids, params, cache_salt=salt))
        return [event async for event in stream]

    return run_one


@pytest.fixture
def tokens_of() -> Callable[..., list[int]]:
    """Token ids of one choice among events; an error event is raised."""

    def tokens(events: list[Event], choice: int = 0) -> list[int]:
        if isinstance(events[-1], Failure):
            raise events[-1].error
        assert isinstance(events[-1], Done)
        return [e.token_id for e in events if isinstance(e, Token) and e.choice == choice]

    return tokens
