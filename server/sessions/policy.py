"""What to evict first: a pure function over idle segments.

Cost-aware LRU: the segment whose loss costs the fewest seconds of prefill per byte freed and per second it
has not been used goes first. Leaves go before the segments they continue.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """An idle segment as the policy sees it."""

    key: bytes
    parent: bytes | None
    num_bytes: int
    rebuild_seconds: float
    idle_seconds: float
    num_references: int  # children that are held; contexts hold none of a candidate
    num_hits: int = 0  # requests that found it


def choose_victims(candidates: Iterable[Candidate], num_bytes: int) -> list[bytes]:
    """Keys to evict, in order, until `num_bytes` are freed or nothing is left."""
    known = {c.key: c for c in candidates}
    references = {key: c.num_references for key, c in known.items()}
    victims: list[bytes] = []
    while num_bytes > 0:
        leaves = [c for key, c in known.items() if references[key] == 0]
        if not leaves:
            break
        victim = min(leaves, key=eviction_cost)
        victims.append(victim.key)
        num_bytes -= victim.num_bytes
        del known[victim.key]
        if victim.parent in references:
            references[victim.parent] -= 1
    return victims


def eviction_cost(candidate: Candidate) -> float:
    """Seconds to rebuild, per byte freed, discounted by how long it lay idle."""
    return candidate.rebuild_seconds / max(1, candidate.num_bytes) / (1.0 + candidate.idle_seconds)


def prefill_seconds(start: int, num_tokens: int) -> float:
    """Seconds to compute a run of tokens again: work by token, and attention over everything before it.

    The scale is that of a 3M-parameter model on two cores (128K tokens in 30 seconds); only ratios matter here.
    """
    return 3.4e-9 * num_tokens * (1000.0 + start + num_tokens / 2)
