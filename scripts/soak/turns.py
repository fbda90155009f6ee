#!/usr/bin/env python3
"""Many turns in one chat: do time per token and the number of segments grow beyond what the length explains?

Starts a server, holds one chat through the OpenAI SDK and notes every turn. At some turns a single document as long as
the chat is read under a salt of its own, asked as often, and its time per token put beside the chat's. Writes a JSON
file and a plot; the last line is JSON. The exit code is 1 when a turn was not reused or the path grew too long.

    scripts/soak/turns.py --turns 200 --out results/turns
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from scripts.needle import ask
from scripts.soak.process import ROOT, ServerProcess
from scripts.tasks import filler

SEAL_TOKENS = 2048  # the server's default --seal-tokens
UNSEALED_TOKENS = 32  # less than a prompt that is reused: its last token is computed, the template may end otherwise
SEGMENTS = 'retrieval_segments{tier="host"}'


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the chat."""

    number: int
    prompt_tokens: int
    cached_tokens: int
    expected_tokens: int  # the prompt of the turn before
    ttft_seconds: float
    seconds_per_token: float
    segments: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The chat's last turns beside as many questions about one document of their length."""

    turn: int
    tokens: int
    chat_seconds_per_token: float
    document_seconds_per_token: float
    document_cold_ttft_seconds: float
    chat_ttft_seconds: float
    document_ttft_seconds: float

    @property
    def ratio(self) -> float:
        """Above 1: the chat is slower than its length explains."""
        return self.chat_seconds_per_token / self.document_seconds_per_token


class Soak:
    """The chat and what is known of it."""

    def __init__(self, args: argparse.Namespace, server: ServerProcess) -> None:
        self._args, self._server = args, server
        self._client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0)
        self._model = self._client.models.list().data[0].id
        self._random = random.Random(args.seed)
        self._messages: list[dict[str, str]] = []
        self._other_segments = 0  # of documents read for comparison
        self.turns: list[Turn] = []
        self.comparisons: list[Comparison] = []

    def run(self) -> None:
        every = max(1, self._args.turns // self._args.comparisons)
        for number in range(1, self._args.turns + 1):
            self._turn(number)
            if number % every == 0:
                self._compare(number)

    def _text(self, num_tokens: int) -> str:
        return " ".join(filler(self._random) for _ in range(max(1, num_tokens // 12)))

    def _turn(self, number: int) -> None:
        self._messages.append({"role": "user", "content": self._text(self._args.turn_tokens)})
        answer = ask(self._client, self._model, self._messages, self._args.max_tokens)
        self._messages.append({"role": "assistant", "content": answer.text})
        before = self.turns[-1] if self.turns else None
        turn = Turn(
            number,
            answer.num_prompt_tokens,
            answer.num_cached_tokens,
            before.prompt_tokens if before else 0,
            answer.ttft_seconds,
            1 / answer.tokens_per_second if answer.tokens_per_second else math.nan,
            self._segments(),
        )
        self.turns.append(turn)
        if number % 10 == 0:
            print(
                f"turn {number:4d}  {turn.prompt_tokens:6d} tokens, {turn.cached_tokens:6d} cached, "
                f"{turn.segments:2d} segments, ttft {turn.ttft_seconds:.3f} s, "
                f"{1000 * turn.seconds_per_token:.2f} ms/token",
                flush=True,
            )

    def _segments(self) -> int:
        """Of the chat, once nothing is being built or merged."""
        for _ in range(100):
            metrics = self._server.metrics()
            if not metrics["retrieval_index_builds_pending"]:
                break
            time.sleep(0.05)
        return int(metrics[SEGMENTS]) - self._other_segments

    def _compare(self, number: int) -> None:
        """A document of the chat's length under another salt, and the same number of questions about it."""
        last, own = self.turns[-1], self._segments()
        document = self._text(last.prompt_tokens)
        asked = 5
        answers = []
        for i in range(asked + 1):
            chat = [{"role": "system", "content": document}, {"role": "user", "content": self._text(24)}]
            answers.append(self._ask_salted(chat, f"document {number}"))
            if i == 0:
                self._segments()
        recent = self.turns[-asked:]
        self._other_segments += self._segments() - own
        self.comparisons.append(
            Comparison(
                number,
                answers[0].num_prompt_tokens,
                statistics.median(t.seconds_per_token for t in recent),
                statistics.median(1 / a.tokens_per_second for a in answers[1:]),
                answers[0].ttft_seconds,
                statistics.median(t.ttft_seconds for t in recent),
                statistics.median(a.ttft_seconds for a in answers[1:]),
            )
        )
        print(f"turn {number:4d}  {self.comparisons[-1].ratio:.2f} x a document's time per token", flush=True)

    def _ask_salted(self, chat: list[dict[str, str]], salt: str) -> Any:
        return ask(self._client, self._model, chat, self._args.max_tokens, cache_salt=salt)


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ServerProcess(args.port, args.serve_args.split(), args.out / "server.log") as server:
        soak = Soak(args, server)
        soak.run()
    result = summary(args, soak)
    everything = {
        **result,
        "turns": [asdict(t) for t in soak.turns],
        "comparisons": [asdict(c) for c in soak.comparisons],
    }
    (args.out / "turns.json").write_text(json.dumps(everything, indent=1))
    plot(soak, args.out / "turns.png")
    print(json.dumps(result))
    if result["turns_not_reused"] or result["segments_max"] > result["segments_allowed"]:
        sys.exit(1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--turn-tokens", type=int, default=250, help="of each user message, about")
    parser.add_argument("--max-tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--comparisons", type=int, default=4, help="documents read for comparison, evenly spread")
    parser.add_argument("--port", type=int, default=8240)
    parser.add_argument("--serve-args", default="--kv-host-memory 4GiB", help="flags of the server")
    parser.add_argument("--out", type=Path, default=Path("results/turns"))
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def summary(args: argparse.Namespace, soak: Soak) -> dict[str, Any]:
    turns, longest = soak.turns, soak.turns[-1].prompt_tokens
    lost = [t.number for t in turns if t.cached_tokens < t.expected_tokens - UNSEALED_TOKENS]
    fifth = max(1, len(turns) // 5)
    return {
        "turns": len(turns),
        "tokens": longest,
        "turns_not_reused": lost,
        "recomputed_tokens_per_turn": round(statistics.mean(t.prompt_tokens - t.cached_tokens for t in turns), 1),
        "segments_max": max(t.segments for t in turns),
        "segments_allowed": 2 + math.ceil(math.log2(max(2, longest / SEAL_TOKENS))),
        "ttft_seconds_first_fifth": round(statistics.median(t.ttft_seconds for t in turns[:fifth]), 4),
        "ttft_seconds_last_fifth": round(statistics.median(t.ttft_seconds for t in turns[-fifth:]), 4),
        "ms_per_token_first_fifth": round(1000 * statistics.median(t.seconds_per_token for t in turns[:fifth]), 3),
        "ms_per_token_last_fifth": round(1000 * statistics.median(t.seconds_per_token for t in turns[-fifth:]), 3),
        "chat_over_document": {c.turn: round(c.ratio, 3) for c in soak.comparisons},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": f"{platform.processor() or platform.machine()}",
        "serve_args": args.serve_args,
    }


def plot(soak: Soak, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(8, 9))
    numbers = [t.number for t in soak.turns]
    axes[0].plot(numbers, [1000 * t.seconds_per_token for t in soak.turns], ".", label="chat")
    axes[0].plot(
        [c.turn for c in soak.comparisons],
        [1000 * c.document_seconds_per_token for c in soak.comparisons],
        "rx",
        label="one document of that length",
    )
    axes[0].set_ylabel("ms per token")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    axes[1].plot(numbers, [t.ttft_seconds for t in soak.turns], ".")
    axes[1].set_ylabel("seconds to the first token")
    axes[1].set_ylim(bottom=0)
    axes[2].step(numbers, [t.segments for t in soak.turns], where="post", label="segments")
    axes[2].plot(numbers, [t.prompt_tokens / 10_000 for t in soak.turns], "--", label="tokens / 10,000")
    axes[2].set_xlabel("turn")
    axes[2].set_ylim(bottom=0)
    axes[2].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
