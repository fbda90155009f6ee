"""Loads a model and runs packed forward passes. Knows contexts and tensors, not requests or scheduling.

Engine thread only. A pass that fails commits nothing: every context is as it was before.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from retrieval import adapter, prefill
from retrieval.adapter import read_geometry
from retrieval.attention import DecodeReport, Span, Step
from retrieval.context import Context
from retrieval.decode import Decoder
from retrieval.methods import AttentionMethod
from retrieval.probe import LiveProbe
from server.engine.config import EngineConfig
from server.engine.fingerprint import fingerprint
from server.engine.fused_model import fuse

logger = logging.getLogger(__name__)

SMALL_STEP = 64_000_000  # tokens times parameters: about 10 ms of one core's products, a few tokens at a time
SMALL_CHUNK = 1_500_000_000  # the same for a prefill, which reads each weight once for many tokens
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's part of a step: its next `tokens`, to follow what its context holds."""

    context: Context
    tokens: list[int]
    is_decode: bool
    num_logits: int  # wanted, of its last tokens


@dataclass(frozen=True, slots=True)
class StepResult:
    """logits float32 `[sum of num_logits, vocab_size]` on the CPU, in the order of the work."""

    logits: Tensor
    decode_attention_seconds: float  # summed over layers and sequences
    num_visible: int
    num_scored: int
    num_retrieved: int


class ModelRunner:
    """A causal language model whose attention reads and writes contexts."""

    def __init__(self, config: EngineConfig, method: AttentionMethod, decoder: Decoder) -> None:
        adapter.register()
        self.device = resolve_device(config.device)
        self._method, self._decoder = method, decoder
        self.hf_config = load_config(config)
        dtype = resolve_dtype(config.dtype, self.hf_config, self.device)
        self.geometry = read_geometry(self.hf_config, dtype, config.kv_cache_dtype == "int8")
        started = time.perf_counter()
        model: Any = AutoModelForCausalLM.from_pretrained(
            config.model,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=adapter.ATTENTION_NAME,
            trust_remote_code=config.trust_remote_code,
            device_map={"": self.device} if self.device.type == "cuda" else None,
        )
        adapter.check_model(model, self.geometry)
        self._model = model.eval()
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._num_threads = torch.get_num_threads()
        self._chunks_are_apart = prefill.has_own_threads(self.geometry)
        self._fused = None if config.enforce_eager else fuse(self._model, self.geometry)
        self.vocab_size = int(self.hf_config.get_text_config(decoder=True).vocab_size)
        self.max_position = int(getattr(self.hf_config.get_text_config(decoder=True), "max_position_embeddings", 0))
        self.end_ids = read_end_ids(config, self.hf_config)
        self.scale = self._read_scale()
        self.probe: LiveProbe | None = None  # set by the engine's builder when live recall is on
        self._probe_interval = max(1, config.live_recall_interval)
        self._num_decode_steps = 0
        self._random = random.Random(config.seed)
        logger.info("loaded %s (%s, %s) in %.1f s", config.model, dtype, self.device, time.perf_counter() - started)

    def _read_scale(self) -> float:
        """The softmax scale that the model's own attention modules pass on."""
        scales = {float(m.scaling) for m in self._model.modules() if hasattr(m, "scaling") and hasattr(m, "layer_idx")}
        return scales.pop() if len(scales) == 1 else self.geometry.head_dim**-0.5

    @torch.inference_mode()
    def run(self, work: list[Work]) -> StepResult:
        """One packed forward pass, decodes first; commits every context when it has succeeded."""
        self._set_threads(work)
        decodes: list[Span] = []
        prefills: list[Span] = []
        row = 0
        for item in work:
            item.context.tail.reserve(len(item.tokens))
            (decodes if item.is_decode else prefills).append(Span(item.context, row, len(item.tokens)))
            row += len(item.tokens)
        report = DecodeReport(keep_queries_of=self._sampled_layer(len(decodes)))
        step = Step(decodes, prefills, self._method, self._decoder, report)
        ends = [span.row + span.num_tokens for span in (*decodes, *prefills)]
        wanted = [row for end, w in zip(ends, work, strict=True) for row in range(end - w.num_logits, end)]
        logits = self._forward(work, wanted, step)
        self._probe_queries(step)
        for item in work:
            item.context.tail.commit(len(item.tokens))
        stats = report.stats
        return StepResult(logits, report.seconds, stats.num_visible, stats.num_scored, stats.num_retrieved)

    def _set_threads(self, work: list[Work]) -> None:
        """One thread for a small step of a small model: its products take less than waking a second thread, which
        on a busy machine even waits for a time slice. Not where torch attends too: long contexts need them all."""
        num_tokens = sum([len(item.tokens) for item in work])
        is_decode = work[-1].is_decode  # which come first
        is_apart = self._decoder.has_own_threads and (is_decode or self._chunks_are_apart)
        limit = SMALL_STEP if is_decode else SMALL_CHUNK
        is_small = num_tokens * self.num_parameters <= limit
        wanted = 1 if self.device.type == "cpu" and is_apart and is_small else self._num_threads
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def _sampled_layer(self, num_decodes: int) -> int | None:
        """A random layer to check exactly, every `live_recall_interval` steps that decode."""
        if self.probe is None or not num_decodes:
            return None
        self._num_decode_steps += 1
        is_due = self._num_decode_steps % self._probe_interval == 0 and self.probe.is_ready
        return self._random.randrange(self.geometry.num_layers) if is_due else None

    def _probe_queries(self, step: Step) -> None:
        """Hand one random head's query of one indexed run to the live probe."""
        layer_idx, queries = step.report.keep_queries_of, step.report.kept_queries
        if queries is None or layer_idx is None or self.probe is None:
            return
        rows = step.rows(self.geometry.sliding_windows[layer_idx])
        indexed = [(i, run) for i, row in enumerate(rows) for run in row.runs if run.indexed is not None]
        if indexed:
            i, run = self._random.choice(indexed)
            head = self._random.randrange(self.geometry.num_q_heads)
            self.probe.submit(queries[i, head], run, layer_idx, head // self.geometry.group_size)

    def _forward(self, work: list[Work], wanted: list[int], step: Step) -> Tensor:
        tokens = self._row([t for item in work for t in item.tokens])
        starts = [(item.context.num_tokens, len(item.tokens)) for item in work]
        positions = self._row([p for start, n in starts for p in range(start, start + n)])
        if self._fused is not None:
            return self._fused.forward(tokens, positions, wanted, step).cpu()
        rows = torch.tensor(wanted, device=self.device, dtype=torch.int64)
        output = self._model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
            step=step,
        )
        logits: Tensor = output.logits[0].float().cpu()
        return logits

    def reserve(self, num_tokens: int) -> None:
        """Hold from now on what steps of so many tokens compute in; steps of fewer have been run."""
        if self._fused is not None:
            self._fused.reserve(num_tokens)

    def _row(self, numbers: list[int]) -> Tensor:
        """int64 `[num_tokens]`, by way of numpy, which makes it in a fifth of the time that torch takes."""
        return torch.from_numpy(np.array(numbers, dtype=np.int64)).to(self.device)

    def close(self) -> None:
        """Wait for the live check under way."""
        if self.probe is not None:
            self.probe.close()

    def fingerprint(self) -> str:
        """A digest of all that K and V of a token depend on: every weight, the model's configuration, their dtypes."""
        config = {
            k: v for k, v in self.hf_config.to_dict().items() if k not in ("_name_or_path", "transformers_version")
        }
        return fingerprint(config, self._model.state_dict(), self.geometry)

    def prefill_done(self, context: Context) -> None:
        """Tell the attention method that the context's prompt is committed."""
        with torch.inference_mode():
            self._method.prefill_done(context, self.scale)


def load_config(config: EngineConfig) -> Any:
    """The transformers config of the model; the error says what to do when it cannot be found."""
    return AutoConfig.from_pretrained(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_dtype(name: str, hf_config: Any, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own dtype."""
    if name != "auto":
        return DTYPES[name]
    stored = getattr(hf_config, "dtype", None)
    if isinstance(stored, str):
        stored = DTYPES.get(stored)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def read_end_ids(config: EngineConfig, hf_config: Any) -> frozenset[int]:
    """All end-of-sequence ids: of the generation config where there is one, else of the config."""
    try:
        eos = GenerationConfig.from_pretrained(config.model, revision=config.revision or "main").eos_token_id
    except OSError:
        eos = None
    eos = eos if eos is not None else hf_config.get_text_config(decoder=True).eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])
