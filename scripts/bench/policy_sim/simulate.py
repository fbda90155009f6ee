"""A cache of blocks under a trace: what each policy makes the server compute again.

Counts seconds of prefill of blocks that had been computed before. A block leaves only after those that continue it, and
none that the running request uses, as in the server. No disk, and no indexes: what is lost is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from scripts.bench.policy_sim.traces import Block, Trace
from server.sessions.policy import Candidate, choose_victims, prefill_seconds

KV_BYTES_PER_TOKEN = 2048


@dataclass(slots=True)
class Held:
    """A block in the cache."""

    block: Block
    last_used: float
    num_hits: int = 0
    children: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds of prefill: computed again, and computed for the first time, which no cache can save."""

    again_seconds: float
    first_seconds: float


Policy = Callable[[list[Held], float, int, int], Iterable[int]]  # held and idle, now, step, bytes -> keys


def ours(idle: list[Held], now: float, step: int, num_bytes: int) -> Iterable[int]:
    """The server's policy."""
    candidates = [
        Candidate(
            key=held.block.key.to_bytes(8, "big"),
            parent=None if held.block.parent is None else held.block.parent.to_bytes(8, "big"),
            num_bytes=size(held.block),
            restore_seconds=cost(held.block),
            idle_seconds=now - held.last_used,
            num_references=len(held.children),
            num_hits=held.num_hits,
        )
        for held in idle
    ]
    return [int.from_bytes(victim.key, "big") for victim in choose_victims(candidates, num_bytes)]


def lru(idle: list[Held], now: float, step: int, num_bytes: int) -> Iterable[int]:
    """The longest unused first."""
    return ordered(idle, num_bytes, lambda held: held.last_used)


def make_offline(trace: Trace) -> Policy:
    """Knows the future: what frees most byte-seconds per second of prefill goes first. Greedy, so an upper bound of the
    offline optimum's cost, which is NP-hard for blocks of different sizes."""
    uses: dict[int, list[int]] = {}
    for step, request in enumerate(trace):
        for block in request.path:
            uses.setdefault(block.key, []).append(step)

    def offline(idle: list[Held], now: float, step: int, num_bytes: int) -> Iterable[int]:
        def value(held: Held) -> float:
            later = next((s for s in uses[held.block.key] if s > step), None)
            return 0.0 if later is None else cost(held.block) / size(held.block) / (later - step)

        return ordered(idle, num_bytes, value)

    return offline


def ordered(idle: list[Held], num_bytes: int, value: Callable[[Held], float]) -> list[int]:
    """The least valuable leaves, one after the other, until so many bytes are freed."""
    values = {held.block.key: value(held) for held in idle}
    known = {held.block.key: held for held in idle}
    children = {key: len(held.children) for key, held in known.items()}
    victims: list[int] = []
    while num_bytes > 0:
        leaves = [key for key in known if not children[key]]
        if not leaves:
            break
        victim = known.pop(min(leaves, key=values.__getitem__)).block
        victims.append(victim.key)
        num_bytes -= size(victim)
        if victim.parent in children:
            children[victim.parent] -= 1
    return victims


class Cache:
    """Blocks held, each with those that continue it."""

    def __init__(self, limit_bytes: int, policy: Policy) -> None:
        self._limit_bytes, self._policy = limit_bytes, policy
        self._held: dict[int, Held] = {}
        self.used_bytes = 0

    def find(self, path: tuple[Block, ...]) -> int:
        """How many blocks of a path are held, from its beginning."""
        return next((i for i, block in enumerate(path) if block.key not in self._held), len(path))

    def use(self, path: tuple[Block, ...], now: float, step: int) -> None:
        """Hold all of a path, evicting what the policy says; it may not fit, as in a server whose budget is too small
        for a running request."""
        num_found = self.find(path)
        missing = self.used_bytes + sum(map(size, path[num_found:])) - self._limit_bytes
        if missing > 0:
            needed = {block.key for block in path}
            idle = [held for held in self._held.values() if held.block.key not in needed]
            for key in self._policy(idle, now, step, missing):
                self._drop(key)
        for i, block in enumerate(path):
            if i < num_found:
                self._held[block.key].num_hits += 1
            else:
                self._hold(block, now)
            self._held[block.key].last_used = now

    def _hold(self, block: Block, now: float) -> None:
        self._held[block.key] = Held(block, now)
        self.used_bytes += size(block)
        if block.parent is not None:
            self._held[block.parent].children.add(block.key)

    def _drop(self, key: int) -> None:
        held = self._held.pop(key)
        assert not held.children, "nothing that is left continues what has gone"
        self.used_bytes -= size(held.block)
        if held.block.parent in self._held:
            self._held[held.block.parent].children.discard(key)


def simulate(trace: Trace, limit_bytes: int, policy: Policy) -> Outcome:
    """Run a trace through an empty cache of that size."""
    cache, seen, again, first = Cache(limit_bytes, policy), set[int](), 0.0, 0.0
    for step, request in enumerate(trace):
        for block in request.path[cache.find(request.path) :]:
            if block.key in seen:
                again += cost(block)
            else:
                first += cost(block)
        cache.use(request.path, request.seconds, step)
        seen.update(block.key for block in request.path)
    return Outcome(again, first)


def size(block: Block) -> int:
    """Bytes of its K and V."""
    return block.num_tokens * KV_BYTES_PER_TOKEN


def cost(block: Block) -> float:
    """Seconds to compute it."""
    return prefill_seconds(block.start, block.num_tokens)
