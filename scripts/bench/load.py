#!/usr/bin/env python3
"""Many streaming clients of mixed lengths, some of which hang up half-way: does every stream end, is all freed?

Drives a running server through the OpenAI SDK. Ends with one JSON line; the exit code is 1 when a stream hung,
a gauge did not return to 0, or the server is not healthy afterwards. Bounded in requests and time.

    scripts/bench/load.py --base-url http://127.0.0.1:8000/v1 --clients 16 --shortest 100 --longest 16000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
from openai import APIError, AsyncOpenAI

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from scripts.tasks import filler

GAUGES = ("retrieval_num_requests_running", "retrieval_num_requests_waiting", "retrieval_prefill_total_tokens")
TOKENS_PER_SENTENCE = 12  # of the generated filler, roughly; lengths need only be mixed


def main() -> None:
    args = parse_args()
    result = asyncio.run(run(args))
    print(json.dumps(result))
    if result["hung"] or result["leaked"] or not result["healthy"] or result["errors"]:
        sys.exit(1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1, help="requests of each client, one after the other")
    parser.add_argument("--shortest", type=int, default=100, help="tokens of the shortest prompt")
    parser.add_argument("--longest", type=int, default=16000, help="tokens of the longest prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--disconnect", type=float, default=0.25, help="share of the requests that hang up half-way")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which a stream counts as hung")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


async def run(args: argparse.Namespace) -> dict[str, object]:
    root = args.base_url.removesuffix("/").removesuffix("/v1")
    outcomes: Counter[str] = Counter()
    ttfts: list[float] = []
    async with (
        AsyncOpenAI(base_url=args.base_url, api_key=args.api_key, max_retries=0, timeout=args.timeout) as client,
        httpx.AsyncClient(timeout=30) as plain,
    ):
        model = (await client.models.list()).data[0].id
        started = time.perf_counter()
        clients = [one_client(client, model, args, index, outcomes, ttfts) for index in range(args.clients)]
        await asyncio.gather(*clients)
        seconds = time.perf_counter() - started
        leaked = await settled_gauges(plain, root)
        healthy = (await plain.get(f"{root}/health")).status_code == 200
    return {
        "clients": args.clients,
        "requests": args.clients * args.rounds,
        "finished": outcomes["finished"],
        "disconnected": outcomes["disconnected"],
        "errors": outcomes["error"],
        "hung": outcomes["hung"],
        "leaked": leaked,
        "healthy": healthy,
        "seconds": round(seconds, 2),
        "ttft_seconds_p50": round(statistics.median(ttfts), 3) if ttfts else None,
    }


async def one_client(
    client: AsyncOpenAI, model: str, args: argparse.Namespace, index: int, outcomes: Counter[str], ttfts: list[float]
) -> None:
    for round_number in range(args.rounds):
        rng = random.Random(f"{args.seed}/{index}/{round_number}")
        low, high = math.log(args.shortest), math.log(args.longest)
        prompt = text_of(rng, int(math.exp(low + (high - low) * index / max(1, args.clients - 1))))
        will_leave = (index + round_number) % max(1, round(1 / args.disconnect)) == 0 if args.disconnect else False
        try:
            async with asyncio.timeout(args.timeout):
                outcomes[await one_request(client, model, prompt, args.max_tokens, will_leave, rng, ttfts)] += 1
        except TimeoutError:
            outcomes["hung"] += 1
        except APIError as error:
            outcomes["error"] += 1
            print(f"client {index}: {error}", file=sys.stderr)


async def one_request(
    client: AsyncOpenAI,
    model: str,
    prompt: str,
    max_tokens: int,
    will_leave: bool,
    rng: random.Random,
    ttfts: list[float],
) -> str:
    """Stream one answer; one that leaves hangs up after a few tokens, or while the prompt is still being read."""
    started, num_chunks, leave_after = time.perf_counter(), 0, rng.choice([0, 1, 8])
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async with stream:
        async for chunk in stream:
            if will_leave and num_chunks >= leave_after:
                return "disconnected"
            num_chunks += any(choice.delta.content for choice in chunk.choices)
            if num_chunks == 1:
                ttfts.append(time.perf_counter() - started)
    return "finished"


def text_of(rng: random.Random, num_tokens: int) -> str:
    return " ".join(filler(rng) for _ in range(max(1, num_tokens // TOKENS_PER_SENTENCE)))


async def settled_gauges(plain: httpx.AsyncClient, root: str, limit_seconds: float = 15.0) -> dict[str, float]:
    """Gauges that have not returned to 0 within the limit."""
    deadline = time.perf_counter() + limit_seconds
    while True:
        lines = (await plain.get(f"{root}/metrics")).text.splitlines()
        values = {line.split()[0]: float(line.split()[-1]) for line in lines if line.startswith(GAUGES)}
        leaked = {name: value for name, value in values.items() if value}
        if not leaked or time.perf_counter() > deadline:
            return leaked
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    main()
