#!/usr/bin/env python3
"""Short chats beside a long prefill: how long do their tokens wait, and what does the prefill pay for it?

Starts a server for each `--budgets` value of --step-time-budget-ms. In each: the long prompt alone; then another one
of the same length while `--chats` short chats stream. Reports the chats' inter-token latency while the prompt is read
(p50, p99, the worst, and p99 over the budget) and the prefill's time over its time alone, in `--rounds` rounds, as
medians. Draws all latencies (`--plot`); the last line is JSON.

    scripts/bench/fairness.py --tokens 131072 --budgets 50 100 200 --plot fairness.png
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from scripts.tasks import filler

Gap = tuple[float, float]  # seconds since the prefill began, seconds since the chat's token before


@dataclass
class Round:
    """One budget, one round."""

    alone_seconds: float
    prefill_seconds: float
    health_ms: list[float]
    gaps: list[Gap]


@dataclass
class Chats:
    """Streams that go on until told to stop, and when their tokens came."""

    begun: list[asyncio.Event] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)
    is_over: bool = False


def main() -> None:
    args = parse_args()
    results: dict[int, list[Round]] = {}
    for budget in args.budgets:
        with Server(args, budget) as url:
            results[budget] = asyncio.run(measure(args, url))
        print(f"budget {budget:4d} ms  " + "  ".join(f"{k} {v}" for k, v in report(budget, results[budget]).items()))
    if args.plot:
        plot(results, args.plot)
    print(json.dumps({"commit": commit(), "cores": os.cpu_count(), "tokens": args.tokens, "chats": args.chats,
                      "rounds": args.rounds,
                      "budgets_ms": {b: report(b, rounds) for b, rounds in results.items()}}))  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072, help="of the long prompt, at most")
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 100, 200], help="milliseconds")
    parser.add_argument("--chats", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--model", help="as for the server; else the bundled one")
    parser.add_argument("--port", type=int, default=8290)
    parser.add_argument("--plot", type=Path, help="PNG of every latency")
    parser.add_argument("--server-args", nargs="*", default=[], help="further flags, without their dashes first")
    return parser.parse_args()


class Server:
    """A server process with one budget; gives its URL."""

    def __init__(self, args: argparse.Namespace, budget: int) -> None:
        self._url = f"http://127.0.0.1:{args.port}"
        flags = ["--port", str(args.port), "--step-time-budget-ms", str(budget), "--uvicorn-log-level", "warning"]
        flags += ["--model", args.model] if args.model else []
        self._command = [sys.executable, "-m", "server", "serve", *flags, *(f"--{flag}" for flag in args.server_args)]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(1200):
            if self._process.poll() is not None:
                raise SystemExit("the server ended; is the port in use?")
            try:
                httpx.get(f"{self._url}/health", timeout=5).raise_for_status()
                return self._url
            except httpx.TransportError:
                time.sleep(0.1)
        raise SystemExit("the server is not up")

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(60)


async def measure(args: argparse.Namespace, url: str) -> list[Round]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]
        num_tokens = min(args.tokens, model["max_model_len"] - 16)
        documents = [await document(client, num_tokens, seed) for seed in range(2 * args.rounds)]
        await asyncio.gather(*(read(client, documents[0][: 20 * 1000], model["id"]) for _ in range(2)))  # warms up
        return [await one_round(args, client, model["id"], *documents[2 * i : 2 * i + 2]) for i in range(args.rounds)]


async def one_round(args: argparse.Namespace, client: httpx.AsyncClient, model: str, alone: str, beside: str) -> Round:
    alone_seconds = await read(client, alone, model)
    chats, health = Chats([asyncio.Event() for _ in range(args.chats)]), Chats()
    tasks = [asyncio.create_task(chat(client, model, chats, i)) for i in range(args.chats)]
    tasks.append(asyncio.create_task(probe(client, health)))
    await asyncio.gather(*(begun.wait() for begun in chats.begun))
    started = time.perf_counter()
    prefill_seconds = await read(client, beside, model)
    chats.is_over = health.is_over = True
    await asyncio.gather(*tasks)
    ended = started + prefill_seconds
    gaps = [
        (at - started, at - before)
        for times in chats.times
        for before, at in itertools.pairwise(times)
        if started <= before and at <= ended
    ]
    waits = [1000 * (end - begin) for begin, end in health.times if started <= begin and end <= ended]
    return Round(alone_seconds, prefill_seconds, waits, gaps)


async def read(client: httpx.AsyncClient, text: str, model: str) -> float:
    """Seconds until the first token after `text`."""
    started = time.perf_counter()
    body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    (await client.post("/v1/completions", json=body)).raise_for_status()
    return time.perf_counter() - started


async def chat(client: httpx.AsyncClient, model: str, chats: Chats, number: int) -> None:
    """One short question after the other; a gap is only counted within an answer."""
    body: dict[str, Any] = {
        "model": model, "max_tokens": 400, "stream": True, "temperature": 0, "ignore_eos": True,
        "messages": [{"role": "user", "content": f"Question {number}: how are you?"}],
    }  # fmt: skip
    while not chats.is_over:
        times: list[float] = []
        chats.times.append(times)
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if '"content":' in line and '"role"' not in line:
                    times.append(time.perf_counter())
                    chats.begun[number].set()
                if chats.is_over:
                    return


async def probe(client: httpx.AsyncClient, health: Chats) -> None:
    """How long /health takes, ten times a second."""
    while not health.is_over:
        started = time.perf_counter()
        (await client.get("/health")).raise_for_status()
        health.times.append([started, time.perf_counter()])
        await asyncio.sleep(0.1)


async def document(client: httpx.AsyncClient, num_tokens: int, seed: int) -> str:
    """Text of nearly `num_tokens` tokens."""
    rng = random.Random(seed)
    sample = " ".join(filler(rng) for _ in range(500))
    counted = (await client.post("/tokenize", json={"prompt": sample})).json()["count"]
    return " ".join(filler(rng) for _ in range(int(500 * 0.98 * num_tokens / counted)))


def report(budget: int, rounds: list[Round]) -> dict[str, float]:
    each = [
        {
            "p50_ms": quantile([1000 * gap for _, gap in r.gaps], 0.5),
            "p99_ms": quantile([1000 * gap for _, gap in r.gaps], 0.99),
            "max_ms": max(1000 * gap for _, gap in r.gaps),
            "p99_over_budget": quantile([1000 * gap for _, gap in r.gaps], 0.99) / budget,
            "prefill_seconds": r.prefill_seconds,
            "prefill_alone_seconds": r.alone_seconds,
            "prefill_over_alone": r.prefill_seconds / r.alone_seconds,
            "health_p99_ms": quantile(r.health_ms, 0.99),
            "num_gaps": len(r.gaps),
        }
        for r in rounds
    ]
    return {name: round(statistics.median(row[name] for row in each), 3) for name in each[0]}


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def plot(results: dict[int, list[Round]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 1, figsize=(9, 2.6 * len(results)), sharex=True, squeeze=False)
    for axis, (budget, rounds) in zip(axes[:, 0], results.items(), strict=True):
        gaps = rounds[-1].gaps
        axis.plot([at for at, _ in gaps], [1000 * gap for _, gap in gaps], ".", markersize=2)
        axis.axhline(budget, color="tab:green", linewidth=1, label="budget")
        axis.axhline(2 * budget, color="tab:red", linewidth=1, label="2 × budget")
        axis.set(ylabel="ms between tokens", title=f"--step-time-budget-ms {budget}", ylim=(0, 3 * budget))
        axis.legend(loc="upper right")
    axes[-1, 0].set_xlabel("seconds since the long prompt was sent")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    main()
