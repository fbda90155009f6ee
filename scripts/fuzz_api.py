#!/usr/bin/env python3
"""Thousands of broken bodies over HTTP: does a server ever answer 5xx, hang, leak or die?

Starts a server of its own over the bundled model (or drives the one at --base-url, whose process is --pid). Ends with
one JSON line; the exit code is 1 when there was a 5xx, a hang, an error of ours within a stream, a gauge that did not
return to 0, or memory that went on growing.

    scripts/fuzz_api.py --requests 10000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.mutants import Mutant, mutant

# Small limits: everything a body can ask for ends soon, and the cache of contexts is full early.
FLAGS = "--max-model-len 400 --kv-host-memory 48MiB --max-body-bytes 1MiB --uvicorn-log-level warning".split()
GAUGES = ("retrieval_num_requests_running", "retrieval_num_requests_waiting")
FORGIVEN = {"kv_memory_exhausted", "disk_unavailable"}  # 503s that say what is the case
MIB = 2**20


@dataclass
class Findings:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)  # 5xx, hangs, errors of ours within streams
    rss: list[int] = field(default_factory=list)  # bytes, sampled
    slowest_seconds: float = 0.0

    def memory_growth(self) -> float:
        """Of the last quarter's mean over the second quarter's, when caches have been filled."""
        quarter = max(1, len(self.rss) // 4)
        early, late = self.rss[quarter : 2 * quarter] or self.rss, self.rss[-quarter:]
        return (sum(late) / len(late)) / (sum(early) / len(early)) - 1


def main() -> None:
    args = parse_args()
    with running_server(args) as (base_url, pid):
        findings = asyncio.run(fuzz(args, base_url, pid))
        leaked = asyncio.run(open_gauges(base_url))
    growth = findings.memory_growth() if findings.rss else 0.0
    is_flat = growth <= args.max_growth
    for line in findings.bad[:20]:
        print("bad:", line)
    rss_mib = [round(value / MIB) for value in (findings.rss[0], findings.rss[-1], max(findings.rss))] if pid else None
    print(f"RSS at the start, at the end, at most: {rss_mib} MiB; growth {growth:.1%}")
    result = {
        "requests": sum(findings.statuses.values()),
        "seed": args.seed,
        "statuses": dict(sorted(findings.statuses.items())),
        "bad": len(findings.bad),
        "leaked": leaked,
        "slowest_seconds": round(findings.slowest_seconds, 2),
        "rss_mib": rss_mib,
        "rss_growth": round(growth, 4),
    }
    print(json.dumps(result))
    sys.exit(1 if findings.bad or leaked or not is_flat else 0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", help="a running server; none: start one")
    parser.add_argument("--pid", type=int, help="its process, to watch its memory")
    parser.add_argument("--port", type=int, default=0, help="of the server to start; 0: a free one")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds after which a call counts as hung")
    parser.add_argument("--max-growth", type=float, default=0.05, help="of the resident memory, late over early")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


@contextmanager
def running_server(args: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """Base URL and process id; a server that was started here is ended."""
    if args.base_url:
        yield args.base_url.removesuffix("/").removesuffix("/v1"), args.pid
        return
    port = args.port or free_port()
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), *FLAGS]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_healthy(url, process)
            yield url, process.pid
            if process.poll() is not None:
                sys.exit(f"the server ended with {process.returncode}")
        finally:
            process.send_signal(signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode}")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    sys.exit("the server is not up")


async def fuzz(args: argparse.Namespace, base_url: str, pid: int | None) -> Findings:
    """All calls, `clients` at a time, always the same ones for a seed."""
    findings, rng = Findings(), random.Random(args.seed)
    calls = iter([mutant(rng) for _ in range(args.requests)])
    started = time.monotonic()

    async def work(client: httpx.AsyncClient) -> None:
        for call in calls:
            await send(client, call, args.timeout, findings)
            number = sum(findings.statuses.values())
            if pid and number % 50 == 0:
                findings.rss.append(resident_bytes(pid))
            if number % 1000 == 0:
                print(f"{number} calls, {time.monotonic() - started:.0f} s, {len(findings.bad)} bad", flush=True)

    limits = httpx.Limits(max_connections=args.clients)
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=args.timeout) as client:
        if pid:
            findings.rss.append(resident_bytes(pid))
        await asyncio.gather(*(work(client) for _ in range(args.clients)))
    return findings


async def send(client: httpx.AsyncClient, call: Mutant, timeout_seconds: float, findings: Findings) -> None:
    headers = {"Content-Type": call.content_type} if call.content_type else {}
    started = time.monotonic()
    try:
        async with asyncio.timeout(timeout_seconds):
            answer = await client.request(call.method, call.path, content=call.content, headers=headers)
    except (TimeoutError, httpx.HTTPError) as error:
        findings.statuses[0] += 1
        findings.bad.append(f"{type(error).__name__}: {call}"[:2000])
        return
    findings.slowest_seconds = max(findings.slowest_seconds, time.monotonic() - started)
    findings.statuses[answer.status_code] += 1
    if is_bad(answer):
        findings.bad.append(f"{answer.status_code} {answer.text[:500]} {call}"[:3000])


def is_bad(answer: httpx.Response) -> bool:
    """A defect, whether it is told by the status or within a stream."""
    if "internal_error" in answer.text or '"api_error"' in answer.text:
        return True
    return answer.status_code >= 500 and answer.json()["error"].get("code") not in FORGIVEN


def resident_bytes(pid: int) -> int:
    """What the process holds in memory now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


async def open_gauges(base_url: str) -> dict[str, float]:
    """Gauges that are not 0 some seconds after the last answer."""
    async with httpx.AsyncClient(base_url=base_url) as client:
        for _ in range(100):
            lines = (await client.get("/metrics")).text.splitlines()
            values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
            open_ones = {name: values[name] for name in GAUGES if values[name]}
            if not open_ones:
                return {}
            await asyncio.sleep(0.1)
    return open_ones


if __name__ == "__main__":
    main()
