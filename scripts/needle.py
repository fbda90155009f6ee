#!/usr/bin/env python3
"""Needles in a long context, through a running server and the OpenAI SDK.

One document is read once; then every needle is asked for in a request of its own over that document. Prints one
line per question and last one JSON line. The document is sized with the server's own /tokenize.

    scripts/needle.py --base-url http://127.0.0.1:8000/v1 --tokens 131072 --needles 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.tasks import TASKS, Context, Question, make_context, messages, score

CHAT_OVERHEAD_TOKENS = 256  # chat template, question and answer, within --tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer."""

    text: str
    ttft_seconds: float
    tokens_per_second: float  # from the first to the last token
    num_prompt_tokens: int
    num_cached_tokens: int
    share_scanned: float | None


def main() -> None:
    args = parse_args()
    client = OpenAI(base_url=args.base_url, api_key=args.api_key, timeout=args.timeout, max_retries=0)
    model = args.model or client.models.list().data[0].id
    context = make_context(
        args.task,
        num_tokens=args.tokens - CHAT_OVERHEAD_TOKENS,
        count_tokens=lambda text: count_tokens(args.base_url, args.api_key, model, text),
        num_questions=args.needles,
        seed=args.seed,
    )
    cold = read_document(client, model, context, args.document_first)
    print(f"read {cold.num_prompt_tokens} tokens in {cold.ttft_seconds:.1f} s", flush=True)
    waited = wait_for_index(args.base_url, args.wait_index)
    answers = [ask_and_print(client, model, context, q, i, args.max_tokens) for i, q in enumerate(context.questions)]
    print(json.dumps(summary(args, cold, context, answers, waited)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", help="default: the first one the server lists")
    parser.add_argument("--tokens", type=int, default=131072, help="length of the prompt in tokens")
    parser.add_argument("--needles", type=int, default=20, help="needles hidden, and questions asked")
    parser.add_argument("--task", choices=TASKS, default="niah_single_2", help="see scripts/tasks.py")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per request")
    parser.add_argument(
        "--document-first", action="store_true", help="prefill the document alone, before any question is known"
    )
    parser.add_argument(
        "--wait-index", type=float, default=3600.0, metavar="SECONDS",
        help="wait for index builds to end before asking, so that answers come through the index; 0: do not wait",
    )  # fmt: skip
    return parser.parse_args()


def read_document(client: OpenAI, model: str, context: Context, document_first: bool) -> Answer:
    """The cold request: one token about the document, whose time to first token is the prefill."""
    first = messages(context, context.questions[0])
    return ask(client, model, first[:-1] if document_first and len(first) > 1 else first, max_tokens=1)


def ask_and_print(client: OpenAI, model: str, context: Context, question: Question, i: int, max_tokens: int) -> Answer:
    answer = ask(client, model, messages(context, question), max_tokens)
    verdict = "right" if score(answer.text, question) == 1 else "WRONG"
    share = "-" if answer.share_scanned is None else f"{100 * answer.share_scanned:.2f} %"
    print(
        f"{i + 1:3d} {verdict}  ttft {answer.ttft_seconds:7.3f} s  {answer.tokens_per_second:7.1f} tokens/s  "
        f"scanned {share}  cached {answer.num_cached_tokens}  {answer.text!r} (wanted {', '.join(question.answers)})",
        flush=True,
    )
    return answer


def ask(client: OpenAI, model: str, chat: list[dict[str, str]], max_tokens: int, **fields: Any) -> Answer:
    """One streamed answer; `fields` are the server's own, beyond the SDK's."""
    started, arrivals, text, usage = time.perf_counter(), [], "", None
    stream = client.chat.completions.create(
        model=model,
        messages=chat,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=fields,
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta.content or choice.finish_reason:
                arrivals.append(time.perf_counter())
                text += choice.delta.content or ""
    assert usage is not None
    assert arrivals
    seconds = arrivals[-1] - arrivals[0]
    details: Any = getattr(usage, "retrieval_details", None) or {}
    return Answer(
        text,
        arrivals[0] - started,
        (usage.completion_tokens - 1) / seconds if seconds > 0 else 0.0,
        usage.prompt_tokens,
        (usage.prompt_tokens_details.cached_tokens or 0) if usage.prompt_tokens_details else 0,
        details.get("share_scanned"),
    )


def count_tokens(base_url: str, api_key: str, model: str, text: str) -> int:
    """Tokens of a text, by the server's tokenizer."""
    url = base_url.removesuffix("/").removesuffix("/v1") + "/tokenize"
    body = json.dumps({"model": model, "prompt": text, "add_special_tokens": False}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as response:
        return int(json.load(response)["count"])


def wait_for_index(base_url: str, limit_seconds: float) -> float:
    """Seconds waited until no index build was pending; the gauge is read from /metrics."""
    started = time.perf_counter()
    url = base_url.removesuffix("/").removesuffix("/v1") + "/metrics"
    while time.perf_counter() - started < limit_seconds:
        with urllib.request.urlopen(url) as response:
            lines = response.read().decode().splitlines()
        pending = [float(line.split()[-1]) for line in lines if line.startswith("retrieval_index_builds_pending")]
        if not any(pending):
            break
        time.sleep(0.25)
    return time.perf_counter() - started


def summary(
    args: argparse.Namespace, cold: Answer, context: Context, answers: list[Answer], waited: float
) -> dict[str, Any]:
    right = [score(a.text, q) == 1 for a, q in zip(answers, context.questions, strict=True)]
    shares = [a.share_scanned for a in answers if a.share_scanned is not None]
    return {
        "task": args.task,
        "tokens": cold.num_prompt_tokens,
        "needles": len(answers),
        "accuracy": sum(right) / len(right),
        "cold_prefill_seconds": round(cold.ttft_seconds, 3),
        "index_wait_seconds": round(waited, 3),
        "ttft_seconds": round(statistics.median(a.ttft_seconds for a in answers), 4),
        "decode_tokens_per_second": round(statistics.median(a.tokens_per_second for a in answers), 2),
        "share_scanned": round(statistics.mean(shares), 5) if shares else None,
    }


if __name__ == "__main__":
    main()
