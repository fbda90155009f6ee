#!/usr/bin/env python3
"""Time to the first token over one document: cold, cached in memory, and cached on disk after a restart.

Starts a server with --kv-disk-path, reads a document, asks follow-up questions, ends the server cleanly and asks the
first of them again on a new one, several times over. Every answer is compared with that of a request which may use no
cache (a salt of its own). Theory: what a follow-up computes is its question only; from disk it waits for K and V to be
read and checked once. Last line JSON; the exit code is 1 when an answer differs or a ratio is missed.

    scripts/soak/restart.py --tokens 131072 --restarts 3
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from scripts.needle import CHAT_OVERHEAD_TOKENS, Answer, ask, count_tokens, wait_for_index
from scripts.soak.process import ServerProcess
from scripts.tasks import Context, make_context, messages

MEMORY_LIMIT, DISK_LIMIT = 0.01, 0.05  # of the cold time to the first token


def main() -> None:
    args = parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    with serve(args) as server:
        client, model = connect(server)
        context = make_context(
            args.task,
            num_tokens=args.tokens - CHAT_OVERHEAD_TOKENS,
            count_tokens=lambda text: count_tokens(f"{server.url}/v1", "none", model, text),
            num_questions=args.questions + 1,
            seed=args.seed,
        )
        cold = question(client, model, context, 0)
        show("cold", cold)
        wait_for_index(f"{server.url}/v1", 600.0)
        in_memory = [question(client, model, context, i) for i in range(1, args.questions + 1)]
        for answer in in_memory:
            show("memory", answer)
    from_disk: list[Answer] = []
    for _ in range(args.restarts):
        with serve(args) as server:
            client, model = connect(server)
            from_disk.append(question(client, model, context, 1))
            show("disk", from_disk[-1])
    with serve(args) as server:
        client, model = connect(server)
        uncached = [question(client, model, context, i, cache_salt=f"alone {i}") for i in range(1, args.questions + 1)]
        for answer in uncached:
            show("uncached", answer)
    result = summary(cold, in_memory, from_disk, uncached)
    print(json.dumps(result))
    sys.exit(0 if result["ok"] else 1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--questions", type=int, default=3, help="follow-ups in memory; each is asked uncached, too")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--task", default="niah_single_2")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--port", type=int, default=8200)
    parser.add_argument("--serve-args", default="", help="further flags of the server")
    parser.add_argument("--out", type=Path, default=Path("results/restart"))
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def serve(args: argparse.Namespace) -> ServerProcess:
    flags = ["--kv-disk-path", str(args.out.resolve() / "disk"), *args.serve_args.split()]
    return ServerProcess(args.port, flags, args.out / "server.log")


def connect(server: ServerProcess) -> tuple[OpenAI, str]:
    """A client whose connection is open, so that no time to the first token counts it."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0)
    model = client.models.list().data[0].id
    ask(client, model, [{"role": "user", "content": "Hello"}], 2)
    return client, model


def question(client: OpenAI, model: str, context: Context, i: int, **options: Any) -> Answer:
    return ask(client, model, messages(context, context.questions[i]), 48, **options)


def show(where: str, answer: Answer) -> None:
    print(
        f"{where:8s} ttft {answer.ttft_seconds:7.3f} s  "
        f"{answer.num_cached_tokens} of {answer.num_prompt_tokens} tokens cached  {answer.text!r}",
        flush=True,
    )


def summary(cold: Answer, in_memory: list[Answer], from_disk: list[Answer], uncached: list[Answer]) -> dict[str, Any]:
    expected = [answer.text for answer in uncached]
    is_equal = [a.text for a in in_memory] == expected and all(a.text == expected[0] for a in from_disk)
    memory, disk = (statistics.median(a.ttft_seconds for a in answers) for answers in (in_memory, from_disk))
    lost = sum(a.num_cached_tokens < 0.9 * cold.num_prompt_tokens for a in (*in_memory, *from_disk))
    shares = memory / cold.ttft_seconds, disk / cold.ttft_seconds
    return {
        "tokens": cold.num_prompt_tokens,
        "cold_ttft_seconds": round(cold.ttft_seconds, 3),
        "memory_ttft_seconds": round(memory, 4),
        "disk_ttft_seconds": round(disk, 4),
        "memory_share_of_cold": round(shares[0], 5),
        "disk_share_of_cold": round(shares[1], 5),
        "not_cached": lost,
        "answers_equal": is_equal,
        "ok": is_equal and not lost and shares[0] <= MEMORY_LIMIT and shares[1] <= DISK_LIMIT,
    }


if __name__ == "__main__":
    main()
