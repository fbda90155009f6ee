"""What to evict first: a pure function over idle segments.

Cost-aware: what goes first is what costs the fewest seconds to get back per byte freed, weighed by how likely it is to
be wanted again: by how often it was found and how long it lay idle. A segment's index may go by itself, before its
keys and values, where that frees bytes more cheaply. Leaves go before the segments they continue.
`scripts/bench/policy.py` compares it with LRU and with knowing the future.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Part = Literal["index", "segment"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An idle segment as the policy sees it."""

    key: bytes
    parent: bytes | None
    num_bytes: int  # K, V and index
    restore_seconds: float  # to get it back: to read it from disk, or to compute it
    idle_seconds: float
    num_references: int  # children that are held; contexts hold none of a candidate
    num_hits: int = 0  # requests that found it
    index_bytes: int = 0
    index_seconds: float = 0.0  # to build the index anew

    @property
    def cost(self) -> float:
        """Expected seconds lost per byte freed, by a scale of no meaning."""
        return self._weight() * self.restore_seconds / max(1, self.num_bytes)

    @property
    def index_cost(self) -> float:
        """The same for the index alone."""
        return self._weight() * self.index_seconds / max(1, self.index_bytes)

    def _weight(self) -> float:
        """How likely it is to be wanted soon. The logarithm: plain counts keep the beginnings of chats long over."""
        return (1.0 + math.log2(1.0 + self.num_hits)) / (1.0 + self.idle_seconds)


@dataclass(frozen=True, slots=True)
class Victim:
    """What to evict: the whole segment, or its index alone."""

    key: bytes
    part: Part
    num_bytes: int


def choose_victims(candidates: Iterable[Candidate], num_bytes: int) -> list[Victim]:
    """What to evict, in order, until `num_bytes` are freed or nothing is left."""
    known = {c.key: c for c in candidates}
    references = {key: c.num_references for key, c in known.items()}
    without_index: set[bytes] = set()
    victims: list[Victim] = []
    while num_bytes > 0:
        leaves = [(c.cost, c, "segment") for key, c in known.items() if references[key] == 0]
        indexes = [(c.index_cost, c, "index") for c in known.values() if c.index_bytes and c.key not in without_index]
        if not leaves and not indexes:
            break
        _, chosen, part = min([*leaves, *indexes], key=lambda option: option[0])
        if part == "index":
            without_index.add(chosen.key)
            victims.append(Victim(chosen.key, "index", chosen.index_bytes))
        else:
            freed = chosen.num_bytes - (chosen.index_bytes if chosen.key in without_index else 0)
            victims.append(Victim(chosen.key, "segment", freed))
            del known[chosen.key]
            if chosen.parent in references:
                references[chosen.parent] -= 1
        num_bytes -= victims[-1].num_bytes
    return victims


def prefill_seconds(start: int, num_tokens: int) -> float:
    """Seconds to compute a run of tokens again: work by token, and attention over everything before it.

    The scale is that of a 3M-parameter model on two cores (128K tokens in 30 seconds); what matters is the ratio to the
    two below, of the same machine.
    """
    return 3.4e-9 * num_tokens * (1000.0 + start + num_tokens / 2)


def read_seconds(num_bytes: int) -> float:
    """Seconds to read and check a file of that size, and to be woken for it."""
    return 0.002 + num_bytes / 1.5e9


def index_seconds(num_tokens: int) -> float:
    """Seconds to build an index; nobody waits for it, but decoding attends to all keys meanwhile."""
    return 1.0e-5 * num_tokens
