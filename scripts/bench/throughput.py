#!/usr/bin/env python3
"""Tokens per second of 1, 8 and 16 streaming chats at once, and what one client's share is then.

Drives a running server from this process. The clients are raw sockets that only count bytes, so that two cores are
the server's; `--sdk` uses the OpenAI SDK instead, as a user would. Levels take turns within each round, so that a busy
machine disturbs all alike; figures are medians over rounds. With `--server-pid` also the server's CPU time per token,
which neighbours hardly change. The last line is JSON.

    scripts/bench/throughput.py --base-url http://127.0.0.1:8000/v1 --clients 1 8 16
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from openai import AsyncOpenAI

ROOT = Path(__file__).resolve().parent.parent.parent
END = b"data: [DONE]\n\n"
WORDS = "river stone lamp garden winter paper cloud engine window bread music forest harbor silver".split()


@dataclass(frozen=True)
class Sample:
    """One level in one round."""

    tokens_per_second: float
    decode_tokens_per_second: float  # between the first and the last token of each stream, added up
    ttft_seconds: float  # median over the clients
    server_cpu_ms_per_token: float | None


@dataclass(frozen=True)
class Answer:
    """One stream: what came and when."""

    num_tokens: int
    first_at: float
    last_at: float


class RawStream(asyncio.Protocol):
    """Sends one request and counts what comes back."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._kept = bytearray()
        self._first_at = self._last_at = 0.0
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._first_at and b'"content":"' in data.replace(b'"content":""', b""):
            self._first_at = now
        self._kept += data
        if b'"content"' in data:
            self._last_at = now
        if END in self._kept[-len(END) - 16 :]:
            usage = self._kept.rindex(b'"completion_tokens":')
            num_tokens = int(self._kept[usage:].split(b":", 1)[1].split(b",", 1)[0].rstrip(b"}"))
            self.answer.set_result(Answer(num_tokens, self._first_at, self._last_at))
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionError(f"{error or 'closed'}: {bytes(self._kept[:500])!r}"))


def main() -> None:
    args = parse_args()
    samples = asyncio.run(run(args))
    result = {level: report(level, of_level) for level, of_level in samples.items()}
    single = result[args.clients[0]]["tokens_per_second"]
    for level, figures in result.items():
        figures["ratio"] = round(figures["tokens_per_second"] / single, 2)
        print(f"{level:3d} clients  " + "  ".join(f"{key} {value}" for key, value in figures.items()))
    print(json.dumps({"commit": commit(), "cpu": platform.processor(), "cores": os.cpu_count(), "sdk": args.sdk,
                      "prompt_tokens": args.prompt_tokens, "max_tokens": args.max_tokens, "rounds": args.rounds,
                      "clients": result}))  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16], help="ratios are against the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=50, help="about as many words; distinct in every request")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--sdk", action="store_true", help="the OpenAI SDK instead of raw sockets")
    parser.add_argument("--server-pid", type=int, help="for CPU time per token")
    return parser.parse_args()


async def run(args: argparse.Namespace) -> dict[int, list[Sample]]:
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {args.api_key}"}) as plain:
        args.model = (await plain.get(f"{args.base_url}/models")).json()["data"][0]["id"]
    await measure(args, max(args.clients), round_number=-1)  # warms up; not counted
    samples: dict[int, list[Sample]] = {level: [] for level in args.clients}
    for round_number in range(args.rounds):
        for level in args.clients:
            samples[level].append(await measure(args, level, round_number))
    return samples


async def measure(args: argparse.Namespace, level: int, round_number: int) -> Sample:
    ask = ask_sdk if args.sdk else ask_raw
    cpu, started = cpu_seconds(args.server_pid), time.perf_counter()
    answers = await asyncio.gather(*(ask(args, body_of(args, f"{round_number}/{level}/{i}")) for i in range(level)))
    seconds = time.perf_counter() - started
    num_tokens = sum(answer.num_tokens for answer in answers)
    spent = cpu_seconds(args.server_pid)
    return Sample(
        num_tokens / seconds,
        sum((a.num_tokens - 1) / (a.last_at - a.first_at) for a in answers),
        statistics.median(a.first_at for a in answers) - started,
        1000 * (spent - cpu) / num_tokens if spent is not None and cpu is not None else None,
    )


def body_of(args: argparse.Namespace, name: str) -> dict[str, Any]:
    words = " ".join(WORDS[hash((name, i)) % len(WORDS)] for i in range(args.prompt_tokens))
    return {
        "model": args.model,
        "messages": [{"role": "user", "content": f"{name} {words}"}],
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask_raw(args: argparse.Namespace, body: dict[str, Any]) -> Answer:
    url = urlsplit(args.base_url)
    content = json.dumps(body | {"ignore_eos": True}).encode()
    head = (
        f"POST {url.path}/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {args.api_key}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_connection(lambda: RawStream(head.encode() + content), url.hostname, url.port)
    return await stream.answer


async def ask_sdk(args: argparse.Namespace, body: dict[str, Any]) -> Answer:
    first_at = last_at = 0.0
    num_tokens = 0
    async with AsyncOpenAI(base_url=args.base_url, api_key=args.api_key, max_retries=0) as client:
        async for chunk in await client.chat.completions.create(**body, extra_body={"ignore_eos": True}):
            if any(choice.delta.content for choice in chunk.choices):
                last_at = time.perf_counter()
                first_at = first_at or last_at
            if chunk.usage:
                num_tokens = chunk.usage.completion_tokens
    return Answer(num_tokens, first_at, last_at)


def cpu_seconds(pid: int | None) -> float | None:
    """User and system time of a process, all its threads."""
    if pid is None:
        return None
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(level: int, samples: list[Sample]) -> dict[str, float]:
    columns = {name: [asdict(s)[name] for s in samples] for name in asdict(samples[0])}
    return {name: round(statistics.median(values), 3) for name, values in columns.items() if values[0] is not None}


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    main()
