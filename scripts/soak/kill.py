#!/usr/bin/env python3
"""kill -9 under load, again and again: does the server come up, serve what was saved, and never answer wrongly?

Several clients ask about several documents of which memory holds a few, so that segments go to disk and come back all
the time. At a random moment (now and then while it is still starting) the server is killed by its pid and started
anew over the same directory. Every answer is compared with that of a server which has memory for everything and no
disk; a document whose file was whole when the server died must be served from it. At the end every file is read and
checked. Last line JSON; the exit code is 1 when anything was not so.

    scripts/soak/kill.py --kills 50
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from openai import APIConnectionError, APIError, OpenAI

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from retrieval.segment_file import SegmentRecord, read_record
from retrieval.segments import common_prefix
from retrieval.tensor_file import TensorFileError, TensorFileReader
from scripts.needle import CHAT_OVERHEAD_TOKENS, ask, count_tokens
from scripts.soak.process import ServerProcess
from scripts.tasks import make_context, messages, score

KV_BYTES_PER_TOKEN = 2048  # of the bundled model
STARTUP_KILLS = 0.2  # share of kills before the server answers
MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Case:
    """One question over one document, and the right answer."""

    document: int
    chat: list[dict[str, str]]
    expected: str


@dataclass
class Tally:
    """What the clients have seen; guarded by `lock`."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, wrong: dict[str, Any] | None = None) -> None:
        with self.lock:
            self.counts[name] += 1
            if wrong is not None:
                self.wrong.append(wrong)


def main() -> None:
    args = parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    chance, tally = random.Random(args.seed), Tally()
    cases, tokens = references(args)
    for number in range(args.kills):
        is_early = number > 0 and chance.random() < STARTUP_KILLS
        one_life(args, cases, tokens, chance, tally, seconds=chance.uniform(0.2, args.seconds), is_early=is_early)
        if (number + 1) % 5 == 0:
            print(f"{number + 1} kills  {dict(tally.counts)}", flush=True)
    last_life(args, cases, tally)
    damaged = damaged_files(args.out / "disk")
    counts = tally.counts
    is_ok = not tally.wrong and not damaged and not counts["error"] and not counts["saved_but_not_served"]
    result = {"kills": args.kills, "documents": args.documents, **counts, "damaged_files": damaged, "ok": is_ok}
    for wrong in tally.wrong[:5]:
        print(json.dumps(wrong))
    print(json.dumps(result))
    sys.exit(0 if is_ok else 1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--in-memory", type=float, default=3.0, help="documents that memory has room for")
    parser.add_argument("--tokens", type=int, default=4096, help="of each document")
    parser.add_argument("--questions", type=int, default=2, help="over each document")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="the longest life of a server that answers")
    parser.add_argument("--task", default="niah_single_1")
    parser.add_argument("--port", type=int, default=8204)
    parser.add_argument("--out", type=Path, default=Path("results/kill"))
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def start(args: argparse.Namespace) -> ServerProcess:
    """Memory for a few documents: running requests reserve a share for an index, too."""
    memory = int(args.in_memory * args.tokens * KV_BYTES_PER_TOKEN * 1.35)
    flags = ["--kv-disk-path", str(args.out.resolve() / "disk"), "--kv-host-memory", str(memory)]
    return ServerProcess(args.port, flags, args.out / "server.log")


def references(args: argparse.Namespace) -> tuple[list[Case], list[np.ndarray]]:
    """Questions with the answers of a server that has memory for all and no disk, and the documents' tokens."""
    cases, tokens = [], []
    with ServerProcess(args.port, [], args.out / "reference.log") as server:
        client, num_right = connect(server), 0
        for document in range(args.documents):
            context = make_context(
                args.task,
                num_tokens=args.tokens - CHAT_OVERHEAD_TOKENS,
                count_tokens=lambda text: count_tokens(f"{server.url}/v1", "none", "demo", text),
                num_questions=args.questions,
                seed=args.seed + document,
            )
            for question in context.questions:
                chat = messages(context, question)
                expected = ask(client, "demo", chat, MAX_TOKENS).text
                num_right += score(expected, question) == 1
                cases.append(Case(document, chat, expected))
            tokens.append(tokenize(server, cases[-1].chat))
    print(f"{len(cases)} questions, {num_right} of them answered rightly by the reference", flush=True)
    return cases, tokens


def connect(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)


def tokenize(server: ServerProcess, chat: list[dict[str, str]]) -> np.ndarray:
    request = urllib.request.Request(
        f"{server.url}/tokenize",
        json.dumps({"model": "demo", "messages": chat}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return np.array(json.load(response)["tokens"], dtype=np.int32)


def one_life(
    args: argparse.Namespace,
    cases: list[Case],
    tokens: list[np.ndarray],
    chance: random.Random,
    tally: Tally,
    seconds: float,
    is_early: bool,
) -> None:
    """Start, check what was saved, load for a while, kill."""
    saved = saved_documents(args.out / "disk", tokens)
    server = start(args)
    if is_early:
        time.sleep(seconds)
        server.process.kill()
        server.process.wait()
        tally.add("killed_early")
        return
    with server:
        if saved:
            document = chance.choice(saved)
            check_saved(server, next(case for case in cases if case.document == document), tally)
        is_over = threading.Event()
        clients = [
            threading.Thread(target=load, args=(server, cases, random.Random(chance.random()), tally, is_over))
            for _ in range(args.clients)
        ]
        for client in clients:
            client.start()
        time.sleep(seconds)
        note_metrics(server, tally)
        is_over.set()
        server.process.kill()
        server.process.wait()
        for client in clients:
            client.join()
    tally.add("killed")


def check_saved(server: ServerProcess, case: Case, tally: Tally) -> None:
    """A document whose file was whole: its first question after the restart finds it."""
    answer = ask(connect(server), "demo", case.chat, MAX_TOKENS)
    is_served = answer.num_cached_tokens >= 0.8 * answer.num_prompt_tokens
    tally.add("saved_and_served" if is_served else "saved_but_not_served")
    judge(case, answer.text, tally)


def load(server: ServerProcess, cases: list[Case], chance: random.Random, tally: Tally, is_over: Any) -> None:
    """One client, until the server dies."""
    client = connect(server)
    while not is_over.is_set():
        case = chance.choice(cases)
        try:
            answer = ask(client, "demo", case.chat, MAX_TOKENS)
        except (APIConnectionError, APIError, OSError, AssertionError) as error:
            if not is_over.is_set() and server.process.poll() is None and not is_over.wait(1.0):
                tally.add("error", {"error": repr(error)})
            return
        except Exception as error:  # a stream that breaks off raises whatever the HTTP library likes
            if not is_over.wait(1.0):
                tally.add("error", {"error": repr(error)})
            return
        tally.add("cached" if answer.num_cached_tokens else "cold")
        judge(case, answer.text, tally)


def judge(case: Case, text: str, tally: Tally) -> None:
    if text == case.expected:
        tally.add("right")
    else:
        tally.add("wrong", {"document": case.document, "answer": text, "expected": case.expected})


def note_metrics(server: ServerProcess, tally: Tally) -> None:
    """Evictions and failures of this life; a torn file would be one."""
    for name, value in server.metrics().items():
        if value and name.startswith(("retrieval_evictions_total", "retrieval_degraded_total")):
            with tally.lock:
                tally.counts[name.removeprefix("retrieval_")] += int(value)


def last_life(args: argparse.Namespace, cases: list[Case], tally: Tally) -> None:
    """Every question once more, then a clean end."""
    with start(args) as server:
        for case in cases:
            judge(case, ask(connect(server), "demo", case.chat, MAX_TOKENS).text, tally)
        note_metrics(server, tally)


def records(folder: Path) -> list[SegmentRecord]:
    found = []
    for path in folder.glob("*/*.segment"):
        try:
            found.append(read_record(path, path.parent.name))
        except TensorFileError as error:
            print(error, flush=True)
    return found


def saved_documents(folder: Path, tokens: list[np.ndarray]) -> list[int]:
    """Documents of which a file holds the beginning, and most of it."""
    roots = [record.token_ids for record in records(folder) if record.start == 0]
    return [i for i, ids in enumerate(tokens) if any(common_prefix(root, ids) >= 0.85 * len(ids) for root in roots)]


def damaged_files(folder: Path) -> int:
    """Files with a real name that are not whole."""
    num_damaged = 0
    for path in [*folder.glob("*/*.segment"), *folder.glob("*/*.index")]:
        try:
            with TensorFileReader(path) as file:
                file.verify()
        except TensorFileError as error:
            num_damaged += 1
            print(error, flush=True)
    return num_damaged


if __name__ == "__main__":
    main()
