"""Generated traces: who asks what when, as paths of blocks (runs of tokens that follow each other).

Everything is drawn from a seeded generator; the distributions are stated where they are used.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """A run of tokens after those of `parent`; found again by whoever's prompt begins so."""

    key: int
    parent: int | None
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and its answer, as the path of blocks that is in memory when it is over."""

    seconds: float
    path: tuple[Block, ...]


Trace = list[Request]


class Blocks:
    """Numbers blocks."""

    def __init__(self) -> None:
        self._next = 0

    def after(self, path: tuple[Block, ...], num_tokens: int) -> tuple[Block, ...]:
        """The path and a new block of so many tokens."""
        self._next += 1
        last = path[-1] if path else None
        start = last.start + last.num_tokens if last else 0
        return (*path, Block(self._next, last.key if last else None, start, num_tokens))


def lognormal(chance: random.Random, median: float, spread: float, low: float, high: float) -> int:
    """`spread`: standard deviation of the logarithm."""
    return int(min(high, max(low, chance.lognormvariate(math.log(median), spread))))


def documents(chance: random.Random, blocks: Blocks, num_requests: int, rate: float) -> Iterator[Request]:
    """Questions over documents of 4K to 128K tokens. A document is read, asked about by sittings of some questions a
    minute apart, and some come back hours later: popularity is Zipf's, and shifts as new documents come."""
    known: list[tuple[Block, ...]] = []
    now = 0.0
    while num_requests > 0:
        now += chance.expovariate(rate / 6)
        if not known or chance.random() < 0.25:
            known.append(blocks.after((), lognormal(chance, 24_000, 0.9, 4_000, 131_072)))
        rank = min(len(known) - 1, int(chance.paretovariate(0.9)) - 1)
        document, at = known[-1 - rank], now
        for _ in range(min(num_requests, max(1, int(chance.expovariate(1 / 6))))):
            yield Request(at, blocks.after(document, lognormal(chance, 150, 0.6, 30, 1_000)))
            at += chance.lognormvariate(math.log(60), 1.0)
            num_requests -= 1


def chats(chance: random.Random, blocks: Blocks, num_requests: int, rate: float) -> Iterator[Request]:
    """Chats with a median of 40 turns of about 250 tokens, a minute or so apart, some left for an hour."""
    now = 0.0
    while num_requests > 0:
        now += chance.expovariate(rate / 40)
        path: tuple[Block, ...] = blocks.after((), lognormal(chance, 600, 0.8, 50, 4_000))
        at = now
        for _ in range(min(num_requests, lognormal(chance, 40, 0.8, 2, 300))):
            yield Request(at, path)
            at += chance.lognormvariate(math.log(45), 1.2) + (3_600 if chance.random() < 0.01 else 0)
            path = blocks.after(path, lognormal(chance, 250, 0.7, 40, 3_000))
            num_requests -= 1


def one_shots(chance: random.Random, blocks: Blocks, num_requests: int, rate: float) -> Iterator[Request]:
    """Prompts of 1K to 64K tokens that nobody sends again, but for one in ten whose answer did not please."""
    now = 0.0
    while num_requests > 0:
        now += chance.expovariate(rate)
        path, at = blocks.after((), lognormal(chance, 6_000, 1.0, 1_000, 65_536)), now
        while num_requests > 0:
            yield Request(at, path)
            num_requests -= 1
            if chance.random() > 0.1:
                break
            at += chance.lognormvariate(math.log(120), 1.0)


def mixed(chance: random.Random, blocks: Blocks, num_requests: int, rate: float) -> Iterator[Request]:
    """A third of each."""
    for make in (documents, chats, one_shots):
        yield from make(chance, blocks, num_requests // 3, rate / 3)


TRACES: dict[str, Callable[[random.Random, Blocks, int, float], Iterator[Request]]] = {
    "documents": documents,
    "chats": chats,
    "one-shot": one_shots,
    "mixed": mixed,
}

RATES = {"documents": 0.05, "chats": 2.0, "one-shot": 0.5, "mixed": 0.5}  # requests a second, about


def make_trace(name: str, num_requests: int, seed: int) -> Trace:
    """Requests in the order of their time."""
    chance = random.Random(f"{name}/{seed}")
    requests = TRACES[name](chance, Blocks(), num_requests, RATES[name])
    return heapq.nsmallest(num_requests, requests, key=lambda request: request.seconds)
