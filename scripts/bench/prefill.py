"""How much faster than torch's flash kernel does the core attend a chunk of a prompt, and how exact is it?

    python scripts/bench/prefill.py
    python scripts/bench/prefill.py --cases 4x2x64:2048+131072 32x8x128:2048+32768 --num-repeats 9

A case is `num_q_heads x num_kv_heads x head_dim : new tokens + past tokens`. Both candidates run in this process, in
turns, on the same number of threads: the core's `attend_chunk`, and the torch twin it replaces (flash attention of
the group's rows over the past, of the chunk over itself, merged). CPU seconds are shown beside wall time because
they hardly change when other programs use the machine.

Theory: a query/key pair costs 2 * head_dim multiplications in two matrix products and one exponential. The ceiling
stated is that of the products alone: the rate of a plain bf16 matrix product in the same run over 2 * head_dim.
Errors are against float64, over rows spread evenly, relative to the root mean square of the exact output.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from retrieval import _core
from retrieval.merge import merge
from retrieval.partial_attention import attend_block, attend_grouped
from scripts.bench.index_bench.report import commit, hardware

DEFAULT_CASES = (
    "4x2x64:2048+32768",
    "4x2x64:2048+131072",
    "4x2x64:30+131072",
    "32x8x64:2048+32768",
    "32x8x128:2048+32768",
)
NUM_CHECKED_ROWS = 16


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of one layer, bf16, and the number of query/key pairs in them."""

    name: str
    queries: Tensor  # [num_q_heads, num_new, head_dim]
    keys: Tensor  # [num_kv_heads, past + num_new, head_dim]
    values: Tensor

    @property
    def num_pairs(self) -> float:
        heads, num_new, _ = self.queries.shape
        return heads * num_new * (self.keys.shape[1] - (num_new - 1) / 2)


def make_case(name: str, seed: int) -> Case:
    shape, _, lengths = name.partition(":")
    num_q_heads, num_kv_heads, head_dim = (int(x) for x in shape.split("x"))
    num_new, past = (int(x) for x in lengths.split("+"))
    random = torch.Generator().manual_seed(seed)
    sizes = [(num_q_heads, num_new), (num_kv_heads, past + num_new), (num_kv_heads, past + num_new)]
    return Case(name, *(torch.randn(*size, head_dim, generator=random).bfloat16() for size in sizes))


def by_core(case: Case) -> Tensor:
    out, num_keys = torch.empty(case.queries.shape), case.keys.shape[1]
    part = _core.Part(case.keys, case.values, 0, num_keys)
    _core.attend_chunk(case.queries, [part], case.queries.shape[1], case.queries.shape[2] ** -0.5, out)
    return out


def by_torch(case: Case) -> Tensor:
    group, past = len(case.queries) // len(case.keys), case.keys.shape[1] - case.queries.shape[1]
    scale = case.queries.shape[2] ** -0.5
    own = [t[:, past:].repeat_interleave(group, 0) for t in (case.keys, case.values)]
    partials = [attend_block(case.queries, own[0], own[1], scale, is_causal=True)]
    if past:
        partials.append(attend_grouped(case.queries, case.keys[:, :past], case.values[:, :past], scale))
    return merge(partials)[0]


def error_of(out: Tensor, case: Case) -> float:
    """Largest error of the checked rows over the root mean square of their exact values."""
    num_new, num_keys = case.queries.shape[1], case.keys.shape[1]
    group = len(case.queries) // len(case.keys)
    worst, squares = 0.0, []
    for row in torch.linspace(0, num_new - 1, min(NUM_CHECKED_ROWS, num_new)).long().tolist():
        end = num_keys - num_new + row + 1
        for head in range(0, len(case.queries), group):
            scores = case.keys[head // group, :end].double() @ case.queries[head, row].double()
            exact = torch.softmax(scores * case.queries.shape[2] ** -0.5, 0) @ case.values[head // group, :end].double()
            worst = max(worst, float((out[head, row] - exact).abs().max()))
            squares.append(float(exact.square().mean()))
    return worst / statistics.mean(squares) ** 0.5


def seconds_of(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def products_per_second(num_threads: int) -> float:
    """Multiply-adds per second of a large bf16 matrix product."""
    a = torch.randn(2048, 2048).bfloat16()
    return 2048**3 / min(seconds_of(lambda: a @ a)[0] for _ in range(10))


def summary(walls: list[float], cpus: list[float], case: Case, ceiling: float) -> dict[str, float]:
    p50 = statistics.median(walls)
    return {
        "p50_ms": p50 * 1e3, "p99_ms": sorted(walls)[min(len(walls) - 1, int(0.99 * len(walls)))] * 1e3,
        "cpu_p50_ms": statistics.median(cpus) * 1e3, "gpairs_per_second": case.num_pairs / p50 / 1e9,
        "share_of_ceiling": case.num_pairs / p50 / ceiling,
    }  # fmt: skip


def run_case(name: str, num_repeats: int, seed: int, products: float) -> dict[str, Any]:
    case = make_case(name, seed)
    candidates = {"core": by_core, "torch": by_torch}
    errors = {label: error_of(run(case), case) for label, run in candidates.items()}
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in candidates}
    for _ in range(num_repeats):
        for label, run in candidates.items():
            times[label].append(seconds_of(lambda run=run: run(case)))  # type: ignore[misc]
    ceiling = products / (2 * case.queries.shape[2])
    rows: dict[str, Any] = {
        label: {**summary(*(list(t) for t in zip(*found, strict=True)), case, ceiling), "max_error": errors[label]}
        for label, found in times.items()
    }
    rows["ratio_wall"] = rows["torch"]["p50_ms"] / rows["core"]["p50_ms"]
    rows["ratio_cpu"] = rows["torch"]["cpu_p50_ms"] / rows["core"]["cpu_p50_ms"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT_CASES), metavar="HxKVxD:NEW+PAST")
    parser.add_argument("--num-repeats", type=int, default=5)
    parser.add_argument("--num-threads", type=int, default=_core.num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not _core.can_attend_chunk():
        raise SystemExit("this machine lacks AMX-BF16: the torch path serves")
    torch.set_num_threads(args.num_threads)
    _core.set_num_threads(args.num_threads)
    machine = hardware(args.num_threads)
    products = products_per_second(args.num_threads)
    print(f"bf16 products: {products / 1e9:.0f} G multiply-adds/s")
    titles = ("who", "p50 ms", "p99 ms", "cpu ms", "Gpairs/s", "ceiling", "max err")
    print(f"{'case':>22} {titles[0]:>6} " + " ".join(f"{title:>9}" for title in titles[1:]))
    results = {}
    for name in args.cases:
        results[name] = rows = run_case(name, args.num_repeats, args.seed, products)
        for label in ("core", "torch"):
            r = rows[label]
            print(
                f"{name:>22} {label:>6} {r['p50_ms']:9.1f} {r['p99_ms']:9.1f} {r['cpu_p50_ms']:9.1f} "
                f"{r['gpairs_per_second']:9.2f} {r['share_of_ceiling']:9.1%} {r['max_error']:9.5f}"
            )
        print(f"{name:>22}  torch/core: {rows['ratio_wall']:.2f} wall, {rows['ratio_cpu']:.2f} cpu", flush=True)
    config = {"num_repeats": args.num_repeats, "seed": args.seed, "gmacs_per_second": products / 1e9}
    print(
        json.dumps({"bench": "prefill", "commit": commit(), "hardware": machine, "config": config, "results": results})
    )


if __name__ == "__main__":
    main()
