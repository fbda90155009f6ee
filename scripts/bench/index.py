"""Which index kind gives a layer's decode attention best, and at what price?

    python scripts/bench/index.py --capture results/capture.safetensors      # vectors of a model, see capture.py
    python scripts/bench/index.py --num-keys 131072                          # made up, Llama-3-8B's geometry

One decode step of one layer reads, per query head, the static set (sink and window) exactly and the best keys of
the rest through an index; exact attention must read K and V of the whole context, so its floor is their bytes over
the memory's bandwidth, while a search reads codes or a few lists. All kinds run in one process over the same vectors,
beside two baselines over all keys: `flat` (exact search) and `sdpa` (torch's attention; `sdpa:grouped=1` is its
fastest form for grouped heads), and `faiss_rabitq`, faiss's own scan of such codes. Queries of the same prompt and of
questions asked later are shown apart: an index that learned from the prompt's queries can fail on the second alone.
`core` is the whole layer in one native call, `core:bits=0` the same call over all keys. `CPU µs` is the time of all
threads together, which a busy machine disturbs least.

Captured mass is the softmax mass of the retrieved keys over that of the exact top 100; `out err` the relative error
of the layer's output, static set included, against attention over all keys. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from retrieval.index.base import KINDS
from scripts.bench.index_bench import report
from scripts.bench.index_bench.contestants import Plan, make
from scripts.bench.index_bench.layers import Layer, captured_layers, query_key_gap, synthetic_layers
from scripts.bench.index_bench.measure import Result, exact_answers, measure_quality, measure_speed

DEFAULT_KINDS = (
    "sdpa", "sdpa:grouped=1", "flat", "ivf:num_probes=32", "ivf", "ivf:num_probes=256", "pq", "hnsw",
    "hnsw:ef_search=1024", "roar", "faiss_rabitq", "rabitq", "core:bits=0", "core:k=100", "core",
)  # fmt: skip
Results = dict[str, dict[str, Result]]  # set -> spec -> result


def is_available(spec: str) -> bool:
    """Whether the kind's module, and the core where it needs it, are there; says so if not."""
    name = spec.partition(":")[0]
    others = {"sdpa": "torch", "core": "retrieval._core", "faiss_rabitq": "faiss"}
    module = others.get(name) or KINDS.get(name, "").partition(":")[0]
    if not module:
        raise SystemExit(f"unknown kind {name!r}; known: {', '.join([*others, *KINDS])}")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(f"{spec}: left out ({error})", file=sys.stderr)
        return False
    return True


def run_layer(layer: Layer, specs: list[str], plan: Plan, num_repeats: int, results: Results) -> None:
    """Build, check and time every contestant over one layer, one after the other."""
    indexed = slice(plan.num_sink, layer.keys.shape[1] - plan.window)
    truths = {name: exact_answers(layer, queries, indexed) for name, queries in layer.asked.items()}
    for spec in specs:
        contestant = make(spec, layer, plan)
        for name, queries in layer.asked.items():
            result = results[name].setdefault(spec, Result(spec))
            result.build_seconds.append(contestant.build_seconds)
            result.nbytes.append(contestant.nbytes)
            measure_quality(contestant, queries, truths[name], result)
            measure_speed(contestant, queries, num_repeats, result)
        print(f"layer {layer.layer_idx}: {spec} done, built in {contestant.build_seconds:.2f} s", file=sys.stderr)


def set_threads(count: int) -> None:
    """The same number of threads for torch, faiss, hnswlib (which takes torch's) and the core."""
    torch.set_num_threads(count)
    for module, setter in (("faiss", "omp_set_num_threads"), ("retrieval._core", "set_num_threads")):
        with contextlib.suppress(ModuleNotFoundError):
            getattr(importlib.import_module(module), setter)(count)


def numbers(text: str) -> list[int] | None:
    """`all` or `0,2,5`."""
    return None if text == "all" else [int(part) for part in text.split(",")]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capture", type=Path, help="file of capture.py; synthetic vectors if not given")
    parser.add_argument("--num-keys", type=int, default=131072, help="of synthetic vectors")
    parser.add_argument("--gap", type=float, default=4.0, help="query/key gap of synthetic vectors, 1 is none")
    parser.add_argument("--kinds", nargs="+", default=list(DEFAULT_KINDS), help="kind or kind:option=value,...")
    parser.add_argument("--layers", type=numbers, default=None, help="0,2,5 (synthetic: just as many); all")
    parser.add_argument("--heads", type=numbers, default=None, help="KV heads: 0,1 (synthetic: just as many); all")
    parser.add_argument("--rows", type=int, default=64, help="rows of queries per set and layer")
    parser.add_argument("--num-retrieved", type=int, default=100, help="keys per query head, where the kind takes it")
    parser.add_argument("--num-sink-tokens", type=int, default=128)
    parser.add_argument("--window-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=100, help="timed steps per layer and set")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="of synthetic vectors")
    parser.add_argument("--plots", type=Path, help="folder for plots (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.plots and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install 'retrieval-server[bench]'")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    set_threads(args.threads)
    hardware = report.hardware(args.threads)
    specs = [spec for spec in args.kinds if is_available(spec)]
    plan = Plan(args.num_retrieved, args.num_sink_tokens, args.window_size)
    if args.capture:
        about, layers = captured_layers(args.capture, args.layers, args.heads, args.rows)
    else:
        about, layers = synthetic_layers(args.num_keys, args.layers, args.heads, args.rows, args.gap, args.seed)
    results: Results = defaultdict(dict)
    gaps: dict[str, list[float]] = defaultdict(list)
    shape = (0, 0)  # query heads, bytes of K and V of a layer
    for layer in layers:
        for name in layer.asked:
            gaps[name].append(query_key_gap(layer, name))
        shape = (layer.train.shape[0], layer.keys.nbytes + layer.values.nbytes)
        run_layer(layer, specs, plan, args.repeats, results)
    tables = {name: [report.figures(result, *shape) for result in found.values()] for name, found in results.items()}
    for name, rows in tables.items():
        report.add_ratios(rows)
        gap = sum(gaps[name]) / len(gaps[name])
        title = {"same": "same prompt", "later": "asked later"}[name]
        print(report.table(f"{title} ({rows[0]['num_queries']} queries; query/key gap {gap:.1f})", rows))
        print(*report.relations(rows), sep="\n")
    if args.plots:
        print("\nplots:", *report.plot(tables, args.plots))
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    summary = {"commit": report.commit(), "hardware": hardware, "config": config, "vectors": about}
    print(json.dumps({**summary, "query_key_gap": gaps, "results": tables}))


if __name__ == "__main__":
    main()
