#!/usr/bin/env python3
"""What sessions forked from one document hold together, against one of them and their tails.

Starts a server, reads a document into a session ahead of any question (POST /v1/sessions), forks it and asks every fork
a question of its own at the same time. Then bytes are counted in three ways that must agree: /metrics' host memory,
/v1/sessions, and the process' resident memory. Theory: a fork holds its question and its answer; the document is held
once, whatever the number of forks. Last line JSON; the exit code is 1 when all forks together hold more than 1.1 times
the document and their tails, when the counts differ, or when a fork read the document again.

    scripts/soak/forks.py --tokens 65536 --forks 20
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletion

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from scripts.needle import CHAT_OVERHEAD_TOKENS, count_tokens, wait_for_index
from scripts.soak.process import ServerProcess
from scripts.tasks import Context, make_context, messages, score

LIMIT = 1.1  # times the document and all tails
KV = 'retrieval_memory_bytes{content="kv",tier="host"}'
INDEX = 'retrieval_memory_bytes{content="index",tier="host"}'


def main() -> None:
    args = parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    with ServerProcess(args.port, args.serve_args.split(), args.out / "server.log") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0)
        model = client.models.list().data[0].id
        context = make_context(
            "niah_single_2",
            num_tokens=args.tokens - CHAT_OVERHEAD_TOKENS,
            count_tokens=lambda text: count_tokens(f"{server.url}/v1", "none", model, text),
            num_questions=args.forks,
            seed=args.seed,
        )
        one, one_rss = read_document(server, context)
        answers = ask_forks(server, client, model, context, args)
        wait_for_index(f"{server.url}/v1", 600.0)
        result = summary(server, context, one, one_rss, answers)
    print(json.dumps(result))
    sys.exit(0 if result["ok"] else 1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--forks", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8, help="forks asked at the same time")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--port", type=int, default=8220)
    parser.add_argument("--serve-args", default="", help="further flags of the server")
    parser.add_argument("--out", type=Path, default=Path("results/forks"))
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def call(server: ServerProcess, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """A JSON answer of the server."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}{path}", data, headers, method=method)
    with urllib.request.urlopen(request, timeout=3600) as response:
        return json.load(response)


def read_document(server: ServerProcess, context: Context) -> tuple[dict[str, Any], int]:
    """The session of the document, and the process' memory with it."""
    started = time.perf_counter()
    ahead = messages(context, context.questions[0])[:-1]
    call(server, "POST", "/v1/sessions", {"id": "document", "messages": ahead})
    wait_for_index(f"{server.url}/v1", 600.0)
    one: dict[str, Any] = call(server, "GET", "/v1/sessions/document")
    print(f"read {one['tokens']} tokens in {time.perf_counter() - started:.1f} s: {one['bytes']}", flush=True)
    return one, server.rss_bytes


def ask_forks(
    server: ServerProcess, client: OpenAI, model: str, context: Context, args: argparse.Namespace
) -> list[ChatCompletion]:
    def ask(i: int) -> ChatCompletion:
        call(server, "POST", "/v1/sessions/document/fork", {"id": f"fork-{i}"})
        return client.chat.completions.create(
            model=model,
            messages=messages(context, context.questions[i]),  # type: ignore[arg-type]
            prompt_cache_key=f"fork-{i}",
            max_tokens=args.max_tokens,
            temperature=0,
        )

    with ThreadPoolExecutor(args.clients) as pool:
        return list(pool.map(ask, range(len(context.questions))))


def summary(
    server: ServerProcess, context: Context, one: dict[str, Any], one_rss: int, answers: list[ChatCompletion]
) -> dict[str, Any]:
    """All figures; tails are counted in tokens by the answers' usage, not by what the server says that it holds."""
    metrics, sessions = server.metrics(), call(server, "GET", "/v1/sessions?limit=1000")
    token_bytes = one["bytes"]["host_kv"] / one["tokens"]
    tails = sum(a.usage.total_tokens - one["tokens"] for a in answers if a.usage)
    details = [a.usage.prompt_tokens_details for a in answers if a.usage]
    cached = [(d.cached_tokens or 0) if d else 0 for d in details]
    alone = one["bytes"]["host_kv"] + one["bytes"]["host_index"]
    in_metrics = int(metrics[KV] + metrics[INDEX])
    in_sessions = sessions["bytes"]["host_kv"] + sessions["bytes"]["host_index"]
    ratio = in_metrics / (alone + tails * token_bytes)
    right = [score(a.choices[0].message.content or "", q) == 1 for a, q in zip(answers, context.questions, strict=True)]
    is_ok = ratio <= LIMIT and in_sessions == in_metrics and min(cached) >= one["tokens"] - 1
    return {
        "ok": is_ok,
        "tokens": one["tokens"],
        "forks": len(answers),
        "one_bytes": alone,
        "tail_tokens": tails,
        "tail_bytes": int(tails * token_bytes),
        "metrics_bytes": in_metrics,
        "sessions_bytes": in_sessions,
        "own_bytes": sum(session["bytes"]["own"] for session in sessions["data"]),
        "rss_growth_bytes": server.rss_bytes - one_rss,
        "ratio": round(ratio, 4),
        "unshared_ratio": round((1 + len(answers)) * alone / (alone + tails * token_bytes), 1),
        "least_cached_tokens": min(cached),
        "right": sum(right) / len(right),
    }


if __name__ == "__main__":
    main()
