"""A long chat through a real engine: the answers of one without a cache, few segments, and every byte in a gauge."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.engine.recorder import NullRecorder


class Gauges(NullRecorder):
    """The newest value of every gauge of memory, and how often segments were merged."""

    def __init__(self) -> None:
        self.bytes: dict[tuple[str, str], int] = {}
        self.num_segments = self.reserved_bytes = self.num_merges = self.num_builds = 0

    def memory(self, tier: str, content: str, num_bytes: int) -> None:
        self.bytes[tier, content] = num_bytes

    def memory_budget(self, tier: str, num_reserved_bytes: int, limit_bytes: int) -> None:
        self.reserved_bytes = num_reserved_bytes

    def segments(self, tier: str, num_segments: int) -> None:
        self.num_segments = num_segments

    def compaction(self, num_segments: int, num_tokens: int, seconds: float) -> None:
        self.num_merges += 1

    def index_build(self, kind: str, seconds: float, num_keys: int) -> None:
        self.num_builds += 1


async def quiet(engine: Any) -> None:
    """Until nothing is being built or merged."""
    manager = engine._manager
    for _ in range(2000):
        if not await engine.between_steps(lambda: (engine._worker.report(), manager.num_pending_builds)[1]):
            return
        await asyncio.sleep(0.005)
    raise AssertionError("still building")


def check_gauges(engine: Any, gauges: Gauges) -> None:
    """What is shown is what a walk over the store finds."""
    segments = list(engine._manager.store)
    per_token = engine._manager.kv_bytes(1)
    assert gauges.bytes["host", "kv"] == sum(s.num_tokens for s in segments) * per_token
    assert gauges.bytes["host", "index"] == sum(s.index.nbytes for s in segments if s.index is not None)
    assert (gauges.bytes["host", "staging"], gauges.bytes["host", "step"], gauges.reserved_bytes) == (0, 0, 0)
    assert gauges.num_segments == len(segments)
    assert sum(s.num_references for s in segments) == sum(len(s.children) for s in segments)


@pytest.mark.parametrize(("index", "num_turns"), [("flat", 8), ("rabitq", 24)])
async def test_a_chat_of_many_turns(
    index: str, num_turns: int, make_engine: Any, prompt: Any, run: Any, tokens_of: Any
) -> None:
    gauges = Gauges()
    engine = make_engine(index=index, num_retrieved=4096, recorder=gauges)
    alone = make_engine(attention="full", prefix_caching=False)
    chat: tuple[int, ...] = ()
    for turn in range(num_turns):
        chat += prompt(50, seed=turn)
        events = await run(engine, chat, max_tokens=30)
        assert events[-1].usage.num_cached_tokens >= len(chat) - 50 - 17
        answer = tokens_of(events)
        if turn % 8 == 7:
            assert answer == tokens_of(await run(alone, chat, max_tokens=30))
        chat += tuple(answer)
        await quiet(engine)
        check_gauges(engine, gauges)
        assert gauges.num_segments <= 7
    assert gauges.num_merges >= num_turns // 5
    assert len(chat) == 80 * num_turns


async def test_forks_go_on_while_a_chat_is_merged(make_engine: Any, prompt: Any, run: Any, tokens_of: Any) -> None:
    gauges = Gauges()
    engine = make_engine(index="rabitq", num_retrieved=4096, recorder=gauges)
    alone = make_engine(attention="full", prefix_caching=False)
    document = prompt(300)
    chats = [document + prompt(20, seed=i) for i in range(4)]
    answers = await asyncio.gather(*(run(engine, chat, max_tokens=140) for chat in chats))
    for chat, events in zip(chats, answers, strict=True):
        assert tokens_of(events) == tokens_of(await run(alone, chat, max_tokens=140))
    await quiet(engine)
    check_gauges(engine, gauges)
    again = await asyncio.gather(*(run(engine, (*c, *tokens_of(e)), n=2) for c, e in zip(chats, answers, strict=True)))
    for chat, events, more in zip(chats, answers, again, strict=True):
        assert more[-1].usage.num_cached_tokens >= len(chat) + 100
        assert tokens_of(more) == tokens_of(more, 1) == tokens_of(await run(alone, (*chat, *tokens_of(events))))
    await quiet(engine)
    check_gauges(engine, gauges)
    assert gauges.num_merges > 0


async def test_warming_up_leaves_nothing_behind(make_engine: Any) -> None:
    gauges = Gauges()
    engine = make_engine(index="rabitq", recorder=gauges)
    assert await engine.warm_up() >= 0
    await quiet(engine)
    assert (len(engine._manager.store), gauges.num_builds, gauges.num_merges) == (0, 0, 0)
    check_gauges(engine, gauges)
