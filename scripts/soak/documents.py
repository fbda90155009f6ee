#!/usr/bin/env python3
"""More documents than the budget holds, asked by many clients at once: nothing wrong, nothing lost, nothing leaked.

First a server without limits answers every question; then one whose budget holds a few of the documents is asked for
half of the time round-robin, for half at random. Every answer must equal the first server's. The server's resident
memory is sampled all the while and must stay below budget + base + 3 %, base being what it says it held before it
served anybody (`retrieval_process_base_bytes`). What it says it holds in the end must be within 3 % of what it holds
above its base. Documents that were read again must be found in the eviction counters. Then all sessions are deleted,
and what is left must be what the gauges say. The last line is JSON; the exit code is 1 when any of this does not hold.

    scripts/soak/documents.py --documents 12 --tokens 16384 --clients 8 --seconds 600 --out results/documents
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from openai import APIError, OpenAI

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from scripts.needle import Answer, ask, count_tokens
from scripts.soak.process import RssSampler, ServerProcess
from scripts.tasks import Context, make_context, messages, score

TOLERANCE = 0.03
STEP = "retrieval_process_step_bytes"
BASE, RESIDENT = "retrieval_process_base_bytes", "retrieval_process_resident_bytes"
ZERO_WHEN_IDLE = (
    "retrieval_num_requests_running",
    "retrieval_num_requests_waiting",
    "retrieval_prefill_total_tokens",
    "retrieval_index_builds_pending",
    'retrieval_memory_bytes{content="staging",tier="host"}',
    'retrieval_memory_bytes{content="step",tier="host"}',
    'retrieval_memory_reserved_bytes{tier="host"}',
)


@dataclass(frozen=True, slots=True)
class Item:
    """One question about one document, and what the unlimited server said."""

    document: int
    question: int
    chat: list[dict[str, str]]
    expected: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server said of itself at one moment."""

    seconds: float
    resident_bytes: int
    accounted_bytes: int


@dataclass
class Outcome:
    """What the clients saw; written under the lock."""

    answers: int = 0
    different: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    first_reads: int = 0
    rereads: int = 0
    ttfts_hit: list[float] = field(default_factory=list)
    ttfts_read: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    seen: set[int] = field(default_factory=set)

    def add(self, item: Item, answer: Answer) -> None:
        with self.lock:
            self.answers += 1
            if answer.text != item.expected:
                told = {"document": item.document, "question": item.question, "got": answer.text}
                self.different.append({**told, "expected": item.expected})
            if answer.num_cached_tokens >= 0.9 * answer.num_prompt_tokens:
                self.ttfts_hit.append(answer.ttft_seconds)
                return
            self.ttfts_read.append(answer.ttft_seconds)
            if item.document in self.seen:
                self.rereads += 1
            else:
                self.first_reads += 1
            self.seen.add(item.document)


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "server.log"
    log.unlink(missing_ok=True)
    with ServerProcess(args.port, ["--kv-host-memory", "16GiB", *args.serve_args.split()], log) as server:
        items, left_out = reference(args, server)
        one = document_bytes(server.metrics()) // args.documents
    budget = int(args.budget_documents * one)
    print(f"{len(items)} questions ({left_out} left out); a document takes {one} bytes, the budget is {budget}")
    with (
        ServerProcess(args.port, ["--kv-host-memory", str(budget), *args.serve_args.split()], log) as server,
        RssSampler(server.process.pid) as sampler,
    ):
        outcome, samples = soak(args, server, items)
        result = checked(args, server, outcome, samples, sampler, budget)
    result |= {"questions": len(items), "left_out": left_out, "document_bytes": one, "exit_code": server.stop()}
    (args.out / "documents.json").write_text(
        json.dumps({**result, "samples": [asdict(s) for s in samples], "rss": sampler.samples})
    )
    print(json.dumps(result))
    if result["violations"]:
        sys.exit(1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--budget-documents", type=float, default=3.0, help="documents that the budget holds")
    parser.add_argument("--tokens", type=int, default=16384, help="of each document")
    parser.add_argument("--questions", type=int, default=4, help="about each document")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--task", default="niah_single_2", help="see scripts/tasks.py")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--port", type=int, default=8241)
    parser.add_argument("--serve-args", default="", help="more flags of both servers")
    parser.add_argument("--out", type=Path, default=Path("results/documents"))
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def reference(args: argparse.Namespace, server: ServerProcess) -> tuple[list[Item], int]:
    """Every question answered without limits; those that this model answers wrongly even so are left out."""
    client, model = connect(server)
    items, left_out = [], 0
    for number in range(args.documents):
        context = make_document(args, server, model, number)
        for i, question in enumerate(context.questions):
            chat = messages(context, question)
            answer = ask(client, model, chat, args.max_tokens)
            if score(answer.text, question) == 1:
                items.append(Item(number, i, chat, answer.text))
            else:
                left_out += 1
    return items, left_out


def make_document(args: argparse.Namespace, server: ServerProcess, model: str, number: int) -> Context:
    return make_context(
        args.task,
        num_tokens=args.tokens - 256,
        count_tokens=lambda text: count_tokens(f"{server.url}/v1", "none", model, text),
        num_questions=args.questions,
        seed=1000 * args.seed + number,
    )


def connect(server: ServerProcess) -> tuple[OpenAI, str]:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=900, max_retries=0)
    return client, client.models.list().data[0].id


def document_bytes(metrics: dict[str, float]) -> int:
    """What the budget is of: K, V and indexes."""
    return int(sum(value for name, value in metrics.items() if is_held(name) and ("kv" in name or "index" in name)))


def held_bytes(metrics: dict[str, float]) -> int:
    return int(sum(value for name, value in metrics.items() if is_held(name)))


def is_held(name: str) -> bool:
    return name.startswith("retrieval_memory_bytes{") and 'tier="host"' in name


def soak(args: argparse.Namespace, server: ServerProcess, items: list[Item]) -> tuple[Outcome, list[Sample]]:
    """Half of the time all documents in turn, half at random; the clients share one order."""
    outcome, started, samples = Outcome(), time.monotonic(), list[Sample]()
    by_document = {d: [i for i in items if i.document == d] for d in sorted({i.document for i in items})}
    draw = random.Random(args.seed)
    turns, lock = count(), threading.Lock()

    def next_items() -> Iterator[Item]:
        while (elapsed := time.monotonic() - started) < args.seconds:
            with lock:
                documents = list(by_document.values())
                is_random = elapsed > args.seconds / 2
                yield draw.choice(draw.choice(documents) if is_random else documents[next(turns) % len(documents)])

    def client_loop(_: int) -> None:
        client, model = connect(server)
        for item in next_items():
            try:
                name = f"document-{item.document}"
                outcome.add(item, ask(client, model, item.chat, args.max_tokens, prompt_cache_key=name))
            except APIError as error:
                with outcome.lock:
                    outcome.errors.append(f"{type(error).__name__}: {error}")

    with ThreadPoolExecutor(args.clients + 1) as pool:
        running = [pool.submit(client_loop, i) for i in range(args.clients)]
        while not all(future.done() for future in running):
            samples.append(sample(server, started))
            time.sleep(1.0)
        for future in running:
            future.result()
    return outcome, samples


def sample(server: ServerProcess, started: float) -> Sample:
    metrics = server.metrics()
    return Sample(time.monotonic() - started, int(metrics[RESIDENT]), held_bytes(metrics))


def settled(server: ServerProcess, names: tuple[str, ...], limit_seconds: float = 30.0) -> dict[str, float]:
    """Gauges that have not come to 0 within the limit."""
    deadline = time.monotonic() + limit_seconds
    while True:
        metrics = server.metrics()
        left = {name: metrics[name] for name in names if metrics.get(name)}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def delete_sessions(server: ServerProcess) -> int:
    """Delete every session there is; returns their number."""
    names = [session["id"] for session in json.loads(server.read("/v1/sessions?limit=1000"))["data"]]
    for name in names:
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/sessions/{name}", method="DELETE")).close()
    return len(names)


def checked(
    args: argparse.Namespace,
    server: ServerProcess,
    outcome: Outcome,
    samples: list[Sample],
    sampler: RssSampler,
    budget: int,
) -> dict[str, Any]:
    """All figures, and which of them are not as they must be."""
    leaked = settled(server, ZERO_WHEN_IDLE)
    full = server.metrics()
    num_sessions = delete_sessions(server)
    time.sleep(5.0)  # freed pages go back within seconds
    left_bytes = held_bytes(server.metrics())  # document parts that no session's last context held whole stay cached
    result = asked(args, outcome, full) | memory(full, samples, sampler, budget)
    result |= {
        "sessions_deleted": num_sessions,
        "left_when_idle": leaked,
        "left_cached_bytes": left_bytes,
        "left_uncounted_bytes": server.rss_bytes - int(full[BASE]) - left_bytes,
    }
    result["violations"] = violations(result)
    for told in (*outcome.different[:5], *outcome.errors[:5]):
        print(told, file=sys.stderr)
    return result


def asked(args: argparse.Namespace, outcome: Outcome, full: dict[str, float]) -> dict[str, Any]:
    """What became of the questions."""
    evictions = sum(v for name, v in full.items() if name.startswith("retrieval_evictions_total"))
    return {
        "seconds": args.seconds,
        "answers": outcome.answers,
        "different": len(outcome.different),
        "errors": len(outcome.errors),
        "first_reads": outcome.first_reads,
        "rereads": outcome.rereads,
        "evictions": int(evictions),
        "ttft_seconds_cached": round(statistics.median(outcome.ttfts_hit), 4) if outcome.ttfts_hit else None,
        "ttft_seconds_read": round(statistics.median(outcome.ttfts_read), 4) if outcome.ttfts_read else None,
    }


def memory(full: dict[str, float], samples: list[Sample], sampler: RssSampler, budget: int) -> dict[str, Any]:
    """What the process took, and how much of it was accounted for."""
    base, used = int(full[BASE]), full[RESIDENT] - full[BASE]
    errors = [abs(s.resident_bytes - base - s.accounted_bytes) / max(1, s.resident_bytes - base) for s in samples]
    return {
        "base_bytes": base,
        "budget_bytes": budget,
        "step_bytes": int(full[STEP]),
        "max_resident_bytes": sampler.max_bytes,
        "max_over_budget_and_base": round(sampler.max_bytes / (budget + base) - 1, 4),
        "max_over_base_as_share_of_budget": round((sampler.max_bytes - base) / budget, 4),
        "accounted_bytes": held_bytes(full),
        "used_above_base_bytes": int(used),
        "accounting_error": round((used - held_bytes(full)) / max(1.0, used), 4),
        "accounting_error_under_load_median": round(statistics.median(errors), 4) if errors else None,
    }


def violations(result: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    allowed, left = result["budget_bytes"] + result["base_bytes"], result["left_cached_bytes"]
    rules = {
        "answers differ": result["different"] > 0,
        "errors": result["errors"] > 0,
        "memory above budget + base + 3 %": result["max_over_budget_and_base"] > TOLERANCE,
        "accounting off by more than 3 %": abs(result["accounting_error"]) > TOLERANCE,
        "documents were read again without an eviction": result["rereads"] > result["evictions"],
        "not idle": bool(result["left_when_idle"]),
        "sessions were deleted and their memory did not go": left >= result["accounted_bytes"] > 0,
        "leaked more than 3 % of budget and base": result["left_uncounted_bytes"] > TOLERANCE * allowed,
    }
    return [name for name, is_broken in rules.items() if is_broken]


if __name__ == "__main__":
    main()
