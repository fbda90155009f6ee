#!/usr/bin/env python3
"""What a decode step costs, and what it is made of: retrieval against full attention, fused against eager forward.

In process and without HTTP: one sequence over a generated document, prefilled once per length; every variant decodes
over the same segments, interleaved in rounds so that a busy machine disturbs all alike. `flat` is full attention
through the C++ core; `torch` is full attention through torch's flash kernel; `eager` is transformers' own forward.
Prints p50 and p99 per step and the share of it spent in attention; the last line is JSON.

    scripts/bench/decode.py --lengths 4096 32768 131072
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from retrieval import native
from retrieval.builder import IndexBuilder
from retrieval.context import Context, StaticSet, open_context
from retrieval.decode import NativeDecoder, TorchDecoder
from retrieval.methods import make_method
from retrieval.segment_index import CodesMaker
from retrieval.segments import SegmentStore
from scripts.tasks import make_context
from server.engine.config import EngineConfig
from server.engine.model_runner import ModelRunner, Work

CHUNK_TOKENS = 2048


@dataclass
class Variant:
    """A runner and what was measured with it."""

    runner: ModelRunner
    step_seconds: list[float] = field(default_factory=list)
    attention_seconds: list[float] = field(default_factory=list)
    share_scanned: float = 0.0


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
        native.core().set_num_threads(args.threads)
    results = {length: measure(args, length) for length in args.lengths}
    print(json.dumps({"commit": commit(), "cpu": platform.processor(), "threads": native.core().num_threads(),
                      "model": args.model, "steps": args.steps * args.rounds, "lengths": results}))  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "server/demo_model"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--steps", type=int, default=32, help="decode steps of each variant and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    return parser.parse_args()


def measure(args: argparse.Namespace, length: int) -> dict[str, dict[str, float]]:
    variants = make_variants(args.model)
    runner = variants["retrieval"].runner
    static, store = StaticSet(), SegmentStore()
    tokens = document(args.model, length)
    context = open_context(
        runner.geometry, static, store, np.array(tokens, dtype=np.int32),
        salt="", capacity=length + 1, device=runner.device, reuse=False,
    )  # fmt: skip
    core = native.core()
    builder = IndexBuilder("rabitq", {}, static.num_sink_tokens, lambda *_: None, CodesMaker(core, core.Budget()))
    builder.watch(context)
    started = time.perf_counter()
    for begin in range(0, length, CHUNK_TOKENS):
        runner.run([Work(context, tokens[begin : begin + CHUNK_TOKENS], False, 0)])
    print(f"\n{length} tokens read in {time.perf_counter() - started:.1f} s")
    segment = context.seal(np.array(tokens, dtype=np.int32))
    builder.submit(segment, None, context.online_codes)
    builder.wait()
    for _ in range(args.rounds):
        for variant in variants.values():
            decode(variant, context, tokens[-1], args.steps)
    builder.close()
    return {name: report(name, variant, variants["flat"]) for name, variant in variants.items()}


def make_variants(model: str) -> dict[str, Variant]:
    core = native.core()
    budget = core.Budget()
    full, retrieval = (make_method(name, num_retrieved=256) for name in ("full", "retrieval"))
    config, eager = EngineConfig(model), EngineConfig(model, enforce_eager=True)
    return {
        "torch": Variant(ModelRunner(config, full, TorchDecoder(256))),
        "flat": Variant(ModelRunner(config, full, NativeDecoder(256, core, budget))),
        "retrieval": Variant(ModelRunner(config, retrieval, NativeDecoder(256, core, budget))),
        "retrieval eager": Variant(ModelRunner(eager, retrieval, NativeDecoder(256, core, budget))),
    }


def document(model: str, length: int) -> list[int]:
    """`length` tokens of a haystack with a question at its end."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    context = make_context(
        "niah_single_2", num_tokens=length + 512, count_tokens=lambda t: len(tokenizer(t)["input_ids"]),
        num_questions=20, seed=1,
    )  # fmt: skip
    ids: list[int] = tokenizer(context.document)["input_ids"]
    question: list[int] = tokenizer("\n" + context.questions[0].prompt)["input_ids"]
    return ids[: length - len(question)] + question


def decode(variant: Variant, context: Context, token: int, num_steps: int) -> None:
    """Greedy steps on a fork, the first two not counted."""
    fork, visible, scored = context.fork(), 0, 0
    for step in range(num_steps + 2):
        started = time.perf_counter()
        result = variant.runner.run([Work(fork, [token], True, 1)])
        token = int(result.logits[0].argmax())
        if step >= 2:
            variant.step_seconds.append(time.perf_counter() - started)
            variant.attention_seconds.append(result.decode_attention_seconds)
            visible, scored = visible + result.num_visible, scored + result.num_scored
    variant.share_scanned = scored / visible
    fork.close()


def report(name: str, variant: Variant, flat: Variant) -> dict[str, float]:
    p50 = statistics.median(variant.step_seconds)
    figures = {
        "ms_p50": 1000 * p50,
        "ms_p99": 1000 * float(np.quantile(variant.step_seconds, 0.99)),
        "tokens_per_second": 1 / p50,
        "attention_ms_p50": 1000 * statistics.median(variant.attention_seconds),
        "speedup_over_flat": statistics.median(flat.step_seconds) / p50,
        "attention_speedup_over_flat": statistics.median(flat.attention_seconds)
        / statistics.median(variant.attention_seconds),
        "share_scanned": variant.share_scanned,
    }
    print(f"{name:16s} " + "  ".join(f"{key} {value:8.3f}" for key, value in figures.items()))
    return {key: round(value, 4) for key, value in figures.items()}


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    main()
