"""How does the time of a layer's decode attention grow with the context?

    python scripts/bench/growth.py                                  # one made-up layer of Llama-3-8B's geometry
    python scripts/bench/growth.py --lengths 131072 524288 --heads 0,1,2

All lengths are held in memory together (4 GB per million keys of a whole layer, twice) and take turns step by step, so
that a machine that changes its pace changes it for all; growth is the median of what each turn shows. Quality is
measured as in index.py, on questions asked later. What is compared by default: `core`, `core:reach=0` (every code is
scanned) and `core:bits=0` (every key). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.bench.index import numbers, set_threads
from scripts.bench.index_bench import report
from scripts.bench.index_bench.contestants import Plan, make
from scripts.bench.index_bench.layers import Layer, synthetic_layers
from scripts.bench.index_bench.measure import Result, Truth, exact_answers, measure_quality, measure_speed

TITLES = ("kind", "keys", "µs/layer", "× first length", "mass", "mass worst", "out err", "scored", "KB/query")
DEFAULT_KINDS = ("core", "core:reach=0", "core:bits=0")
ASKED = "later"


def compare(spec: str, layers: dict[int, Layer], truths: dict[int, Truth], plan: Plan, repeats: int) -> list[Result]:
    """One kind over layers of several lengths: quality, then steps that take turns."""
    contestants = {length: make(spec, layer, plan) for length, layer in layers.items()}
    results = {length: Result(spec) for length in layers}
    for length, contestant in contestants.items():
        measure_quality(contestant, layers[length].asked[ASKED], truths[length], results[length])
        results[length].build_seconds.append(contestant.build_seconds)
        results[length].nbytes.append(contestant.nbytes)
    for turn in range(repeats):
        for length, contestant in contestants.items():
            queries = layers[length].asked[ASKED].roll(-turn, dims=1)  # warm up with the rows before
            measure_speed(contestant, queries, 1, results[length])
    return list(results.values())


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[131072, 1048576], help="keys; all against the first")
    parser.add_argument("--gap", type=float, default=4.0, help="query/key gap of the vectors, 1 is none")
    parser.add_argument("--kinds", nargs="+", default=list(DEFAULT_KINDS), help="as in index.py")
    parser.add_argument("--heads", type=numbers, default=None, help="KV heads: 0,1 (just as many); all")
    parser.add_argument("--rows", type=int, default=32, help="rows of queries")
    parser.add_argument("--repeats", type=int, default=60, help="timed steps per length")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    set_threads(args.threads)
    hardware, plan = report.hardware(args.threads), Plan(num_retrieved=100, num_sink=128, window=512)
    layers: dict[int, Layer] = {}
    truths: dict[int, Truth] = {}
    for length in args.lengths:
        _, made = synthetic_layers(length, None, args.heads, args.rows, args.gap, args.seed)
        layers[length] = layer = next(iter(made))
        truths[length] = exact_answers(layer, layer.asked[ASKED], slice(plan.num_sink, length - plan.window))
        print(f"{length} keys are made", file=sys.stderr)
    rows = []
    print("|", " | ".join(TITLES), "|\n|" + "---|" * len(TITLES))
    for spec in args.kinds:
        results = compare(spec, layers, truths, plan, args.repeats)
        for length, result in zip(args.lengths, results, strict=True):
            layer = layers[length]
            row = report.figures(result, layer.train.shape[0], layer.keys.nbytes + layer.values.nbytes)
            turns = zip(result.step_seconds, results[0].step_seconds, strict=True)
            row |= {"num_keys": length, "growth": statistics.median(step / first for step, first in turns)}
            rows.append(row)
            print(
                f"| {spec} | {length} | {row['layer_us_p50']:.0f} | {row['growth']:.2f} | {row['mass_mean']:.4f} "
                f"| {row['mass_worst']:.3f} | {row['error_mean']:.4f} | {row['share_scored']:.2%} "
                f"| {row['kilobytes_read_per_query']:.0f} |"
            )
    print(json.dumps({"commit": report.commit(), "hardware": hardware, "config": vars(args), "results": rows}))


if __name__ == "__main__":
    main()
