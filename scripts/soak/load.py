#!/usr/bin/env python3
"""Many SDK clients for many minutes: does every request end in exactly one way, and is everything given back?

Chats of 200 tokens, some over distinct long documents; a share of the clients hangs up at a random moment, another
sends requests that are wrong. After a warm-up of the same mix, the clients run for `--minutes`; then the server's
counters have to agree with what the clients saw, its gauges to return to 0, and its resident memory, less what its
caches hold, to where it was after the warm-up. The exit code is 1 otherwise; the last line is JSON. Start the server
with a `--kv-host-memory` that the warm-up fills, such as 1GiB.

    scripts/soak/load.py --base-url http://127.0.0.1:8000/v1 --clients 64 --minutes 15
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
from openai import APIStatusError, AsyncOpenAI, OpenAIError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from scripts.tasks import filler

MIB = 2**20
ENDS = "retrieval_request_success_total"
GAUGES = (
    "retrieval_num_requests_running",
    "retrieval_num_requests_waiting",
    "retrieval_num_waiting_tokens",
    "retrieval_prefill_total_tokens",
    "retrieval_index_builds_pending",
)
BAD: list[dict[str, Any]] = [
    {"temperature": 9.0},
    {"max_tokens": -1},
    {"model": "no-such-model"},
    {"messages": []},
    {"messages": [{"role": "nobody", "content": "?"}]},
    {"messages": "not a list"},
    {"extra_body": {"no_such_field": 1}},
    {"max_tokens": 10**9},
    {"n": 10**6},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}},
]


@dataclass
class Tally:
    """What the clients saw, and how long /health took."""

    outcomes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    ttft_seconds: list[float] = field(default_factory=list)
    health_ms: list[float] = field(default_factory=list)
    num_tokens: int = 0


def main() -> None:
    args = parse_args()
    result, problems = asyncio.run(run(args))
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    print(json.dumps(result | {"problems": problems}))
    sys.exit(bool(problems))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--warm-up-minutes", type=float, default=2.0)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--long-share", type=float, default=0.02, help="of the requests: with a long document")
    parser.add_argument("--long-tokens", type=int, default=32000)
    parser.add_argument("--disconnect", type=float, default=0.2, help="share that hangs up")
    parser.add_argument("--bad", type=float, default=0.05, help="share that is wrong")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which a request counts as hung")
    parser.add_argument("--tolerance", type=float, default=64.0, help="MiB that resident memory may be above its start")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


async def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    root = args.base_url.removesuffix("/").removesuffix("/v1")
    async with httpx.AsyncClient(base_url=root, headers={"Authorization": f"Bearer {args.api_key}"}, timeout=60) as ops:
        args.model = (await ops.get("/v1/models")).json()["data"][0]["id"]
        idle = HealthProbe(root)
        await asyncio.sleep(10)
        idle_ms, _ = await asyncio.to_thread(idle.end)
        await drive(args, root, args.warm_up_minutes, "warm-up")
        leaked = await settled_gauges(ops)
        before = await metrics(ops)
        tally = await drive(args, root, args.minutes, "run")
        leaked |= await settled_gauges(ops)
        after = await metrics(ops)
        is_healthy = (await ops.get("/health")).status_code == 200
    ends = {name: int(after[key] - before[key]) for name, key in ends_of(after).items()}
    own_before, own_after = own_bytes(before), own_bytes(after)
    result = {
        "clients": args.clients, "minutes": args.minutes, **tally.outcomes, "server_ends": ends,
        "generated_tokens": tally.num_tokens, "leaked": leaked, "healthy": is_healthy,
        "rss_mib": [round(m["retrieval_process_resident_bytes"] / MIB, 1) for m in (before, after)],
        "rss_less_held_mib": [round(own_before / MIB, 1), round(own_after / MIB, 1)],
        "ttft_seconds_p50": quantile(tally.ttft_seconds, 0.5), "ttft_seconds_p99": quantile(tally.ttft_seconds, 0.99),
        "health_ms_idle_p99": quantile(idle_ms, 0.99), "health_ms_p50": quantile(tally.health_ms, 0.5),
        "health_ms_p99": quantile(tally.health_ms, 0.99), "messages": dict(tally.messages),
    }  # fmt: skip
    problems = disagreements(tally.outcomes, ends)
    if leaked:
        problems.append(f"gauges did not return to 0: {leaked}")
    if not is_healthy:
        problems.append("/health does not answer 200")
    if own_after > own_before + args.tolerance * MIB:
        problems.append(
            f"resident memory less what is held: {own_before / MIB:.0f} MiB before, {own_after / MIB:.0f} after"
        )
    return result, problems


def disagreements(seen: Counter[str], ends: dict[str, int]) -> list[str]:
    """How the clients' counts and the server's contradict each other. One who hangs up may do so just before the
    request was accepted, or just after it was finished."""
    problems = [
        f"{seen[name]} requests {name}" for name in ("hung", "broken", "error", "accepted", "unhealthy") if seen[name]
    ]
    finished = ends["stop"] + ends["length"]
    if not seen["finished"] <= finished <= seen["finished"] + seen["disconnected"]:
        problems.append(f"the server finished {finished}, the clients saw {seen['finished']} of them")
    if finished + ends["abort"] > seen["finished"] + seen["disconnected"]:
        problems.append(f"the server aborted {ends['abort']}, {seen['disconnected']} hung up")
    if ends["error"]:
        problems.append(f"the server failed {ends['error']} requests")
    return problems


async def drive(args: argparse.Namespace, root: str, minutes: float, name: str) -> Tally:
    """All clients until the time is over and their last requests have ended."""
    tally, deadline = Tally(), time.monotonic() + 60 * minutes
    health = HealthProbe(root)
    clients = [one_client(args, random.Random(f"{args.seed}/{name}/{i}"), tally, deadline) for i in range(args.clients)]
    await asyncio.gather(*clients)
    tally.health_ms, unhealthy = await asyncio.to_thread(health.end)
    for message in unhealthy:
        tally.outcomes["unhealthy"] += 1
        tally.messages[f"health: {message}"[:200]] += 1
    print(f"{name}: {dict(tally.outcomes)}", flush=True)
    return tally


async def one_client(args: argparse.Namespace, rng: random.Random, tally: Tally, deadline: float) -> None:
    async with AsyncOpenAI(
        base_url=args.base_url, api_key=args.api_key, max_retries=0, timeout=args.timeout + 60
    ) as client:
        while time.monotonic() < deadline:
            try:
                async with asyncio.timeout(args.timeout):
                    outcome = await one_request(client, args, rng, tally)
            except TimeoutError:
                outcome = "hung"
            except OpenAIError as error:
                outcome = "error"
                tally.messages[str(error)[:200]] += 1
            tally.outcomes[outcome] += 1


async def one_request(client: AsyncOpenAI, args: argparse.Namespace, rng: random.Random, tally: Tally) -> str:
    kind = rng.random()
    body = body_of(args, rng)
    if kind < args.bad:
        return await ask_badly(client, body | rng.choice(BAD), tally)
    ask = ask_streaming if rng.random() < 0.7 else ask_whole
    if kind >= args.bad + args.disconnect:
        return await ask(client, body, tally)
    leaving = asyncio.create_task(ask(client, body, tally))
    await asyncio.wait([leaving], timeout=rng.expovariate(1.0))
    if leaving.done():
        return leaving.result()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    return "disconnected"


def body_of(args: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    is_long = rng.random() < args.long_share
    num_sentences = args.long_tokens // 12 if is_long else rng.randrange(1, 12)
    text = " ".join(filler(rng) for _ in range(num_sentences))
    return {
        "model": args.model,
        "messages": [{"role": "user", "content": f"{rng.random()} {text}"}],
        "max_tokens": args.max_tokens,
        "temperature": rng.choice([0.0, 1.0]),
        "extra_body": {"ignore_eos": rng.random() < 0.8},
    }


async def ask_badly(client: AsyncOpenAI, body: dict[str, Any], tally: Tally) -> str:
    """A request that has to be refused by its own fault."""
    try:
        await client.chat.completions.create(**body)
    except APIStatusError as error:
        if 400 <= error.status_code < 500:
            return "refused"
        tally.messages[f"bad request: {error}"[:200]] += 1
        return "error"
    return "accepted"


async def ask_streaming(client: AsyncOpenAI, body: dict[str, Any], tally: Tally) -> str:
    """A stream, which has to end in one finish reason and the usage."""
    started, reasons, usages, has_begun = time.perf_counter(), 0, 0, False
    async with await client.chat.completions.create(
        **body, stream=True, stream_options={"include_usage": True}
    ) as stream:
        async for chunk in stream:
            if not has_begun and any(choice.delta.content for choice in chunk.choices):
                has_begun = True
                tally.ttft_seconds.append(time.perf_counter() - started)
            reasons += sum(choice.finish_reason is not None for choice in chunk.choices)
            if chunk.usage is not None:
                usages += 1
                tally.num_tokens += chunk.usage.completion_tokens
    return "finished" if (reasons, usages) == (1, 1) else "broken"


async def ask_whole(client: AsyncOpenAI, body: dict[str, Any], tally: Tally) -> str:
    answer = await client.chat.completions.create(**body)
    is_whole = len(answer.choices) == 1 and answer.choices[0].finish_reason in ("stop", "length") and answer.usage
    tally.num_tokens += answer.usage.completion_tokens if answer.usage else 0
    return "finished" if is_whole else "broken"


class HealthProbe:
    """Asks /health five times a second from a process of its own: the clients' one is too busy to keep time."""

    def __init__(self, root: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, theirs = context.Pipe()
        self._process = context.Process(target=probe_health, args=(root, theirs), daemon=True)
        self._process.start()

    def end(self) -> tuple[list[float], list[str]]:
        """Milliseconds of each answer, and what went wrong."""
        self._end.send(None)
        answers: tuple[list[float], list[str]] = self._end.recv()
        self._process.join()
        return answers


def probe_health(root: str, end: Connection) -> None:
    milliseconds: list[float] = []
    errors: list[str] = []
    while not end.poll(0.2):
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(f"{root}/health", timeout=60) as response:
                response.read()
        except OSError as error:
            errors.append(repr(error))
        milliseconds.append(1000 * (time.perf_counter() - started))
    end.send((milliseconds, errors))


async def metrics(ops: httpx.AsyncClient) -> dict[str, float]:
    lines = (await ops.get("/metrics")).text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def ends_of(values: dict[str, float]) -> dict[str, str]:
    """Metric by finished_reason."""
    return {key.split('"')[1]: key for key in values if key.startswith(ENDS + "{")}


def own_bytes(values: dict[str, float]) -> float:
    """Resident memory but what the cache of segments holds in host memory, which is to stay."""
    held = sum(
        value for key, value in values.items() if key.startswith("retrieval_memory_bytes{") and 'tier="host"' in key
    )
    return values["retrieval_process_resident_bytes"] - held


async def settled_gauges(ops: httpx.AsyncClient, limit_seconds: float = 60.0) -> dict[str, float]:
    """Gauges that have not returned to 0 within the limit."""
    deadline = time.monotonic() + limit_seconds
    while True:
        values = await metrics(ops)
        leaked = {name: values[name] for name in GAUGES if values[name]}
        if not leaked or time.monotonic() > deadline:
            return leaked
        await asyncio.sleep(0.2)


def quantile(values: list[float], q: float) -> float | None:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 3) if ordered else None


if __name__ == "__main__":
    main()
