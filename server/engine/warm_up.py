"""One pass over every kind of step before any request: what stays resident afterwards is the process' base.

Kernels are compiled, thread pools started and heaps grown to what a full chunk takes. Leaves nothing in the store and
counts nothing in the metrics.
"""

from __future__ import annotations

import numpy as np
import torch

from retrieval.context import Context
from retrieval.segments import Segment
from server import memory
from server.engine.config import EngineConfig
from server.engine.model_runner import ModelRunner, Work
from server.engine.request import SamplingParams
from server.engine.sampler import Row, make_state, sample_rows
from server.sessions.manager import SessionManager

MAX_PRODUCTS = 2e11  # tokens times parameters: seconds on a few cores
NUM_CHUNKS = 5  # so many that what is read is sealed with an index and searched
NUM_DECODES = 4
MAX_DECODES = 16  # rows of a decode step
NUM_SHAPES = 10  # numbers of rows: as many as fill the bounded caches of compiled products


def warm_up(config: EngineConfig, runner: ModelRunner, manager: SessionManager) -> int:
    """Read a random prompt of a few full chunks, generate a little, forget it.

    Returns the working memory of a full step: bytes that are taken while it runs and free afterwards. Where reading
    full chunks takes too long, smaller ones tell what those will take: all of it grows by the tokens.
    """
    chunk = max(1, min(config.max_num_batched_tokens, int(MAX_PRODUCTS / NUM_CHUNKS / runner.num_parameters)))
    longest = config.max_model_len or runner.max_position or chunk
    full = max(chunk, min(config.max_num_batched_tokens, longest))
    num_tokens = min(NUM_CHUNKS * chunk, longest - NUM_DECODES - 1)
    if num_tokens < 1:
        return 0
    tokens = np.random.default_rng(0).integers(0, runner.vocab_size, num_tokens + NUM_DECODES).tolist()
    context = manager.open(tokens[:num_tokens], "", num_tokens + NUM_DECODES, reuse=False)
    try:
        step_bytes = _read(runner, context, tokens[:num_tokens], chunk) * full // chunk
        runner.reserve(full)
        sealed = _seal(context, tokens)
        for token in tokens[num_tokens:]:
            runner.run([Work(context, [token], is_decode=True, num_logits=1)])
        _probe(runner, context)
    finally:
        context.close()
    manager.store.remove(sealed)
    num_rows = min(config.max_num_seqs, MAX_DECODES, int(MAX_PRODUCTS / MAX_DECODES**2 / runner.num_parameters))
    _decode_together(runner, manager, tokens[:num_rows])
    for i in range(NUM_SHAPES):
        _run_alone(runner, manager, tokens[: min(chunk * (2 * i + 1) // (2 * NUM_SHAPES) + 1, num_tokens)])
    return step_bytes


def _probe(runner: ModelRunner, context: Context) -> None:
    indexed = [run for run in context.decode_runs(0) if run.indexed is not None]
    if runner.probe is not None and indexed:
        query = torch.ones(runner.geometry.head_dim, dtype=runner.geometry.dtype)
        runner.probe.rehearse(query, indexed[0], 0, 0)


def _decode_together(runner: ModelRunner, manager: SessionManager, tokens: list[int]) -> None:
    """Steps of two rows, three and so on, each sampled from: a pass over few rows keeps memory for every number."""
    contexts = [manager.open([token], "", 1, reuse=False) for token in tokens]
    params = [SamplingParams(temperature=0.0), SamplingParams()]
    try:
        for n in range(2, len(tokens) + 1):
            work = [Work(c, [t], is_decode=True, num_logits=1) for c, t in zip(contexts[:n], tokens, strict=False)]
            logits = runner.run(work).logits
            states = [make_state(p, (), 0, 0, runner.vocab_size) for p in params]
            sample_rows([Row(row, p, s, 0, frozenset()) for row, p, s in zip(logits, params, states, strict=False)])
    finally:
        for context in contexts:
            context.close()


def _run_alone(runner: ModelRunner, manager: SessionManager, tokens: list[int]) -> None:
    """A step of so many rows: each number of rows has compiled products of its own, up to the bound on their cache."""
    context = manager.open(tokens, "", len(tokens), reuse=False)
    try:
        runner.run([Work(context, tokens, is_decode=False, num_logits=1)])
    finally:
        context.close()


def _read(runner: ModelRunner, context: Context, tokens: list[int], chunk: int) -> int:
    """The most that a chunk's step took beyond what it left."""
    step_bytes = 0
    for begin in range(0, len(tokens), chunk):
        part = tokens[begin : begin + chunk]
        is_last = begin + chunk >= len(tokens)
        memory.trim()
        is_measured = memory.forget_peak()
        runner.run([Work(context, part, is_decode=False, num_logits=int(is_last))])
        peak = memory.peak_bytes()
        memory.trim()
        step_bytes = peak - memory.resident_bytes() if is_measured else 0
    runner.prefill_done(context)
    return max(0, step_bytes)


def _seal(context: Context, tokens: list[int]) -> Segment:
    """As the end of a prompt does it, except that nobody is told of the index."""
    segment = context.seal(np.asarray(tokens, dtype=np.int32))
    if context.online_codes is not None:
        segment.index = context.online_codes.finish(context.static.num_sink_tokens, segment.kv)
        context.online_codes = None
    return segment
