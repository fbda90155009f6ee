#!/usr/bin/env python3
"""Which eviction policy computes least again? Traces of requests through a simulated cache.

Policies: LRU, the server's own, and one that knows the future (greedy: the optimum is NP-hard for segments of
different sizes). Figures are seconds of prefill of what had been computed before, by a small model on two cores; only
ratios carry over. Nothing is measured: the same seeds give the same table on any machine. Last line JSON; the exit code
is 1 when LRU is better anywhere.

    scripts/bench/policy.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from scripts.bench.policy_sim.simulate import lru, make_offline, ours, simulate
from scripts.bench.policy_sim.traces import TRACES, make_trace

MEMORY_MIB = {"documents": (512, 1024), "chats": (128, 256), "one-shot": (128, 512), "mixed": (128, 512)}


def main() -> None:
    args = parse_args()
    print(
        f"{'trace':10s} {'memory':>8s} {'LRU':>9s} {'ours':>9s} {'offline':>9s} {'ours/LRU':>9s}   seconds of prefill"
    )
    rows = [row(name, mib, args) for name in args.traces for mib in MEMORY_MIB[name]]
    print(json.dumps({"requests": args.requests, "seeds": args.seeds, "rows": rows}))
    sys.exit(any(row["ours"] > row["lru"] for row in rows))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="+", choices=list(TRACES), default=list(TRACES))
    parser.add_argument("--requests", type=int, default=1500, help="of each trace")
    parser.add_argument("--seeds", type=int, default=4, help="traces per row, summed")
    return parser.parse_args()


def row(name: str, mib: int, args: argparse.Namespace) -> dict[str, Any]:
    sums = {"lru": 0.0, "ours": 0.0, "offline": 0.0}
    for seed in range(args.seeds):
        trace = make_trace(name, args.requests, seed)
        for policy_name, policy in (("lru", lru), ("ours", ours), ("offline", make_offline(trace))):
            sums[policy_name] += simulate(trace, mib * 2**20, policy).again_seconds
    values = " ".join(f"{value:9.1f}" for value in sums.values())
    print(f"{name:10s} {mib:4d} MiB {values} {sums['ours'] / max(sums['lru'], 1e-9):9.2f}", flush=True)
    return {"trace": name, "memory_mib": mib, **{key: round(value, 2) for key, value in sums.items()}}


if __name__ == "__main__":
    main()
