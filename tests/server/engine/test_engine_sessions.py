"""Named sessions over a running engine: read ahead, forked, deleted, saved and found again by the next engine."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from server.engine.engine import Engine
from server.engine.events import Done, Event, Finish, Progress, Token
from server.engine.request import Request, SamplingParams
from server.engine.session_info import SessionKey
from server.errors import (
    ConflictError,
    ContextLengthError,
    DiskUnavailableError,
    MemoryExhaustedError,
    NotFoundError,
    UnavailableError,
)
from server.sessions.disk import Disk

DOC = SessionKey("", "", "doc")
NUMBERS = itertools.count()


async def ask(engine: Engine, ids: tuple[int, ...], key: SessionKey = DOC, max_tokens: int = 8) -> list[Event]:
    """A greedy request that names a session, run to its end."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    names = {"session_id": key.name, "session_owner": key.owner, "cache_salt": key.salt}
    stream = engine.submit(Request(f"r{next(NUMBERS)}", ids, sampling, **names))
    return [event async for event in stream]


async def prefill(engine: Engine, ids: tuple[int, ...], key: SessionKey = DOC) -> list[Event]:
    return await ask(engine, ids, key, max_tokens=0)


async def until(engine: Engine, state: str, key: SessionKey = DOC) -> Any:
    for _ in range(500):
        if (info := await engine.sessions.get(key)).state == state:
            return info
        await asyncio.sleep(0.01)
    raise AssertionError(f"still {info.state}")


async def test_a_prefill_ends_once_with_no_token(make_engine: Any, prompt: Any) -> None:
    engine = make_engine()
    events = await prefill(engine, prompt(300))
    assert not any(isinstance(event, Token) for event in events)
    assert [event for event in events if isinstance(event, Finish | Done)] == events[-2:]
    assert events[-2] == Finish(0, "length")
    assert events[-1].usage.num_generated_tokens == 0
    assert events[-3] == Progress(300, 300)
    assert (await engine.sessions.get(DOC)).num_tokens == 300
    assert engine._manager.budget.reserved_bytes == 0


async def test_answers_over_what_was_read_ahead_are_those_of_a_cold_engine(
    make_engine: Any, prompt: Any, run: Any, tokens_of: Any
) -> None:
    document, question = prompt(300), prompt(20, seed=1)
    expected = tokens_of(await run(make_engine(attention="full", prefix_caching=False), document + question))
    engine = make_engine(num_retrieved=4096)
    await prefill(engine, document)
    for name in ("doc", "another"):
        events = await ask(engine, document + question, SessionKey("", "", name), max_tokens=12)
        assert events[-1].usage.num_cached_tokens >= 300
        assert tokens_of(events) == expected


async def test_a_prefill_may_fill_the_model_to_the_last_token(make_engine: Any, prompt: Any) -> None:
    engine = make_engine(max_model_len=128)
    assert isinstance((await prefill(engine, prompt(128)))[-1], Done)
    with pytest.raises(ContextLengthError):
        await prefill(engine, prompt(129))
    with pytest.raises(ContextLengthError):
        await ask(engine, prompt(128), max_tokens=1)


async def test_forks_do_not_hear_of_each_other(make_engine: Any, prompt: Any, tokens_of: Any) -> None:
    document = prompt(300)
    questions = [prompt(20, seed=seed) for seed in range(1, 5)]
    alone = make_engine(attention="full", prefix_caching=False)
    expected = [tokens_of(await ask(alone, document + question)) for question in questions]
    engine = make_engine(num_retrieved=4096)
    await prefill(engine, document)
    keys = [SessionKey("", "", f"fork{i}") for i in range(4)]
    for key in keys:
        await engine.sessions.fork(DOC, key.name)
    answers = await asyncio.gather(
        *(ask(engine, document + question, key) for key, question in zip(keys, questions, strict=True))
    )
    assert [tokens_of(events) for events in answers] == expected
    await engine.between_steps(engine._manager.wait_for_indexes)
    held = await engine.sessions.list("", "", 100, None)
    one = (await engine.sessions.get(DOC)).bytes
    own = sum(info.bytes.own for info in held.sessions)
    assert held.bytes.host_kv + held.bytes.host_index == one.host_kv + one.host_index + own
    assert own <= 4 * 27 * engine._manager.kv_bytes(1)


async def test_tenants_share_neither_sessions_nor_segments(make_engine: Any, prompt: Any) -> None:
    engine, ids = make_engine(), prompt(300)
    await prefill(engine, ids, SessionKey("a", "salt-a", "doc"))
    events = await prefill(engine, ids, SessionKey("b", "salt-b", "doc"))
    assert events[-1].usage.num_cached_tokens == 0
    for key in (SessionKey("b", "salt-a", "doc"), SessionKey("a", "salt-b", "doc"), DOC):
        with pytest.raises(NotFoundError):
            await engine.sessions.get(key)


async def test_a_running_session_is_not_deleted_and_an_idle_one_is(make_engine: Any, prompt: Any) -> None:
    engine = make_engine(max_num_batched_tokens=16)
    sampling = SamplingParams(temperature=0.0, max_tokens=2000, ignore_eos=True)
    stream = engine.submit(Request("r", prompt(300), sampling, session_id="doc"))
    await anext(aiter(stream))
    assert (await engine.sessions.get(DOC)).num_running == 1
    with pytest.raises(ConflictError, match="under way"):
        await engine.sessions.delete(DOC)
    stream.abort()
    [_ async for _ in stream]
    await engine.between_steps(engine._manager.wait_for_indexes)
    held = (await engine.sessions.get(DOC)).bytes
    assert held.own == held.host_kv + held.host_index > 0
    assert await engine.sessions.delete(DOC) == held.own
    assert engine._manager.held_bytes() == 0


async def test_a_failed_request_leaves_its_reason(make_engine: Any, prompt: Any, monkeypatch: Any) -> None:
    engine = make_engine()
    await prefill(engine, prompt(100))
    monkeypatch.setattr(engine._runner, "run", lambda work: 1 / 0)
    await ask(engine, prompt(200))
    info = await engine.sessions.get(DOC)
    assert info.error is not None
    assert (info.num_tokens, info.num_running) == (100, 0)


async def test_choices_of_one_request_leave_one_context(make_engine: Any, prompt: Any) -> None:
    engine = make_engine()
    sampling = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=20, ignore_eos=True)
    stream = engine.submit(Request("r", prompt(100), sampling, session_id="doc"))
    [_ async for _ in stream]
    info = await engine.sessions.get(DOC)
    assert (info.num_tokens, info.num_running, info.num_requests) == (119, 0, 1)


async def test_a_pin_ends_while_the_engine_is_idle(make_engine: Any, prompt: Any) -> None:
    engine = make_engine()
    await prefill(engine, prompt(300))
    assert (await engine.sessions.pin(DOC, 0.05)).is_pinned
    for _ in range(500):
        if not engine._manager.pinned_bytes:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("still pinned")


async def test_a_saved_session_answers_from_the_next_engine(
    tmp_path: Path, make_engine: Any, prompt: Any, run: Any, tokens_of: Any
) -> None:
    document, question = prompt(300), prompt(20, seed=1)
    expected = tokens_of(await run(make_engine(attention="full", prefix_caching=False), document + question))
    kept = {"kv_disk_path": str(tmp_path), "num_retrieved": 4096}
    key = SessionKey("owner", "salt", "doc")
    first = make_engine(**kept)
    await prefill(first, document, key)
    saved = await first.sessions.save(key)
    assert saved.saved_at is not None
    assert saved.bytes.disk >= 300 * first._manager.kv_bytes(1)
    await first.sessions.fork(key, "unsaved")
    await first.stop(0)

    second = make_engine(**kept)
    assert (await second.sessions.list("owner", "", 10, None)).num_sessions == 0, "another tenant's"
    (info,) = (await second.sessions.list("owner", "salt", 10, None)).sessions
    assert (info.name, info.state, info.num_tokens, info.num_tokens_in_memory) == ("doc", "disk", 300, 0)
    assert (await second.sessions.restore(key)).state in ("ready", "indexing")
    assert (await second.sessions.get(key)).num_tokens_in_memory == 300
    events = await ask(second, document + question, key, max_tokens=12)
    assert events[-1].usage.num_cached_tokens >= 300
    assert tokens_of(events) == expected
    await second.stop(0)


async def test_a_deleted_session_leaves_no_file(tmp_path: Path, make_engine: Any, prompt: Any) -> None:
    engine = make_engine(kv_disk_path=str(tmp_path))
    await prefill(engine, prompt(300))
    await engine.sessions.save(DOC)
    await prefill(engine, prompt(300) + prompt(100, seed=1))
    await engine.sessions.save(DOC)  # again, with what it has grown by
    await engine.sessions.fork(DOC, "fork")
    await engine.between_steps(engine._manager.wait_for_indexes)
    await engine.sessions.delete(DOC)
    assert engine._manager.disk_bytes > 0, "the fork needs it"
    await until(engine, "ready", SessionKey("", "", "fork"))
    await engine.sessions.delete(SessionKey("", "", "fork"))
    assert engine._manager.disk_bytes == 0
    await engine.stop(0)
    again = make_engine(kv_disk_path=str(tmp_path))
    assert again._manager.disk_bytes == 0
    assert (await again.sessions.list("", "", 10, None)).num_sessions == 0


async def test_a_deletion_overtakes_a_write_under_way(
    tmp_path: Path, make_engine: Any, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, go_on = make_engine(kv_disk_path=str(tmp_path)), threading.Event()
    write = Disk.write

    def slow_write(*args: Any) -> bool:
        assert go_on.wait(30)
        return write(*args)

    monkeypatch.setattr(Disk, "write", slow_write)
    for _ in range(2):  # what is used again is written by itself
        await prefill(engine, prompt(400))
    assert engine._manager.is_settling
    await engine.between_steps(engine._manager.wait_for_indexes)
    await engine.sessions.delete(DOC)
    go_on.set()
    for _ in range(500):
        if not await engine.between_steps(lambda: engine._manager.is_settling):
            break
        await asyncio.sleep(0.01)
    assert (engine._manager.is_settling, engine._manager.disk_bytes) == (False, 0)


async def test_deletion_spares_the_files_of_a_tenant_who_has_not_come_back(
    tmp_path: Path, make_engine: Any, prompt: Any
) -> None:
    ours, theirs = SessionKey("us", "", "doc"), SessionKey("them", "", "doc")
    first = make_engine(kv_disk_path=str(tmp_path))
    for key in (ours, theirs):
        await prefill(first, prompt(300), key)
        await first.sessions.save(key)
    await first.stop(0)
    second = make_engine(kv_disk_path=str(tmp_path))
    await second.sessions.delete(ours)
    assert (await second.sessions.restore(theirs)).num_tokens_in_memory == 300
    with pytest.raises(NotFoundError):
        await second.sessions.get(ours)
    await second.sessions.delete(theirs)
    assert second._manager.disk_bytes == 0


async def test_what_memory_has_no_room_for_is_not_restored(tmp_path: Path, make_engine: Any, prompt: Any) -> None:
    first = make_engine(kv_disk_path=str(tmp_path))
    await prefill(first, prompt(300))
    await first.sessions.save(DOC)
    token_bytes = first._manager.kv_bytes(1)
    await first.stop(0)
    second = make_engine(kv_disk_path=str(tmp_path), kv_host_memory=450 * token_bytes)
    await prefill(second, prompt(200, seed=1), SessionKey("", "", "pinned"))
    await second.between_steps(second._manager.wait_for_indexes)
    await second.sessions.pin(SessionKey("", "", "pinned"), None)
    for call in (second.sessions.restore(DOC), second.sessions.pin(DOC, 5.0)):
        with pytest.raises(MemoryExhaustedError, match="of them pinned"):
            await call
    await second.sessions.pin(SessionKey("", "", "pinned"), 0)
    assert (await second.sessions.restore(DOC)).num_tokens_in_memory == 300


async def test_a_full_disk_is_told_and_nothing_is_called_saved(tmp_path: Path, make_engine: Any, prompt: Any) -> None:
    engine = make_engine(kv_disk_path=str(tmp_path), kv_disk=1000)
    await prefill(engine, prompt(300))
    with pytest.raises(UnavailableError) as caught:
        await engine.sessions.save(DOC)
    assert caught.value.code == "kv_disk_full"
    assert (await engine.sessions.get(DOC)).saved_at is None
    assert (await engine.sessions.get(DOC)).num_tokens_in_memory == 300


async def test_a_stopped_engine_says_so(make_engine: Any, prompt: Any) -> None:
    engine = make_engine()
    await prefill(engine, prompt(50))
    with pytest.raises(DiskUnavailableError):
        await engine.sessions.save(DOC)
    await engine.stop(0)
    with pytest.raises(UnavailableError):
        await engine.sessions.get(DOC)


async def test_whatever_is_done_with_sessions_answers_stay_right_and_nothing_is_left(
    tmp_path: Path, make_engine: Any, prompt: Any, tokens_of: Any
) -> None:
    documents = [prompt(260, seed=seed) for seed in range(4)]
    alone = make_engine(attention="full", prefix_caching=False)
    expected = [tokens_of(await ask(alone, (*ids, 5, 6, 7))) for ids in documents]
    token_bytes = alone._manager.kv_bytes(1)
    engine = make_engine(
        num_retrieved=4096, kv_disk_path=str(tmp_path), kv_host_memory=1500 * token_bytes, max_sessions=6
    )
    chance = random.Random(0)

    async def client(number: int) -> int:
        """Whatever comes to mind; returns how much of it was done."""
        num_done = 0
        for _ in range(25):
            i, key = chance.randrange(4), SessionKey("", "", f"s{chance.randrange(8)}")
            sessions = engine.sessions
            try:
                match chance.randrange(9):
                    case 0 | 1:
                        events = await ask(engine, (*documents[i], 5, 6, 7), key)
                        assert tokens_of(events) == expected[i]
                    case 2:
                        await prefill(engine, documents[i], key)
                    case 3:
                        await sessions.fork(key, f"s{chance.randrange(8)}")
                    case 4:
                        await sessions.pin(key, chance.choice([0, 0.01, None]))
                    case 5:
                        await sessions.delete(key)
                    case 6:
                        await sessions.save(key)
                    case 7:
                        await sessions.restore(key)
                    case 8:
                        found = await sessions.list("", "", 100, None)
                        assert found.bytes.host_kv <= 1500 * token_bytes
                        await sessions.pin(SessionKey("", "", chance.choice(found.sessions).name), 0)
                num_done += 1
            except (ConflictError, NotFoundError, MemoryExhaustedError, IndexError):
                continue
        return num_done

    done = await asyncio.gather(*(client(number) for number in range(4)))
    assert sum(done) > 30
    for info in (await engine.sessions.list("", "", 100, None)).sessions:
        await engine.sessions.pin(SessionKey("", "", info.name), 0)
    await engine.between_steps(engine._manager.wait_for_indexes)
    for info in (await engine.sessions.list("", "", 100, None)).sessions:
        await engine.sessions.delete(SessionKey("", "", info.name))
    manager = engine._manager
    assert (manager.pinned_bytes, manager.budget.reserved_bytes) == (0, 0)
    assert all(s.num_references == len(s.children) for s in manager.store)
