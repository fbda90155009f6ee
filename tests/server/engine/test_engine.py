"""A request's life: order of events, ends, aborts, refusals, failures, and that nothing leaks."""

from __future__ import annotations

import asyncio

import pytest

from server.engine.events import Done, Failure, Finish, Progress, Token
from server.engine.recorder import NullRecorder
from server.engine.request import Request, SamplingParams
from server.errors import (
    ContextLengthError,
    InvalidRequestError,
    MemoryExhaustedError,
    RateLimitError,
    UnavailableError,
)


async def settle(engine, limit: float = 10.0) -> None:
    """Wait until the engine has nothing to do."""
    for _ in range(int(limit / 0.01)):
        if not engine._worker._by_request and not engine._streams and not engine._inbox:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine is still busy")


def leaks(engine) -> dict[str, int]:
    """What must be zero when nothing runs."""
    return {
        "reserved": engine._manager.budget.reserved_bytes,
        "running": len(engine._worker.scheduler.running),
        "waiting": len(engine._worker.scheduler.waiting),
        "queued": len(engine._queued),
        "references": sum(s.num_references - len(s.children) for s in engine._manager.store),
    }


class Endings(NullRecorder):
    """Why requests ended."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def ended(self, reason, num_generated_tokens, times) -> None:
        self.reasons.append(reason)


async def test_events_come_in_order_and_end_once(make_engine, prompt, run):
    events = await run(make_engine(), prompt(250), max_tokens=5)
    kinds = [type(e).__name__ for e in events]
    num_progress = kinds.count("Progress")
    assert kinds == ["Progress"] * num_progress + ["Token"] * 5 + ["Finish", "Done"]
    assert [e.num_prefilled_tokens for e in events if isinstance(e, Progress)] == [96, 192, 250]
    assert events[-2] == Finish(0, "length", None)
    usage = events[-1].usage
    assert (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_generated_tokens) == (250, 0, 5)


async def test_eos_and_stop_tokens_end_a_choice(make_engine, prompt, run, tokens_of):
    engine = make_engine()
    free = tokens_of(await run(engine, prompt(30), max_tokens=20))
    stop = free[7]
    events = await run(engine, prompt(30), max_tokens=20, stop_token_ids=(stop,))
    cut = free.index(stop) + 1
    assert tokens_of(events) == free[:cut]
    assert events[-2] == Finish(0, "stop", stop)


async def test_choices_share_the_prompt_and_differ_by_their_own_seed(make_engine, prompt, run, tokens_of):
    engine = make_engine()
    events = await run(engine, prompt(200), n=3, temperature=1.0, seed=4, max_tokens=10)
    texts = [tokens_of(events, choice) for choice in range(3)]
    assert len({tuple(t) for t in texts}) == 3
    assert events[-1].usage.num_generated_tokens == 30
    assert texts[0] == tokens_of(await run(engine, prompt(200), temperature=1.0, seed=4, max_tokens=10))
    await settle(engine)
    assert not any(leaks(engine).values())


async def test_same_seed_same_text_whatever_else_runs(make_engine, prompt, run, tokens_of):
    engine = make_engine()
    wanted = tokens_of(await run(engine, prompt(60), temperature=0.9, seed=11, max_tokens=16))
    noise = [run(engine, prompt(20 + 30 * i, seed=2), temperature=1.0, max_tokens=20) for i in range(5)]
    results = await asyncio.gather(run(engine, prompt(60), temperature=0.9, seed=11, max_tokens=16), *noise)
    assert tokens_of(results[0]) == wanted


async def test_bundled_model_says_the_same_while_others_are_read(make_engine, prompt, run, tokens_of):
    """bfloat16, where products in other shapes round otherwise, sampled at a high temperature. Only the cutting of a
    prompt into chunks is kept the same: that depends on the batch, and rounds otherwise too."""
    whole = {"max_num_batched_tokens": 4096, "step_time_budget_ms": 0}
    engine = make_engine(model="server/demo_model", prefix_caching=False, **whole)
    sampling = {"temperature": 1.5, "seed": 5, "max_tokens": 60}
    wanted = [tokens_of(await run(engine, prompt(n), **sampling)) for n in (9, 70)]
    noise = [run(engine, prompt(40 + 90 * i, seed=3), temperature=1.0, max_tokens=15) for i in range(6)]
    found = await asyncio.gather(run(engine, prompt(9), **sampling), run(engine, prompt(70), **sampling), *noise)
    assert [tokens_of(events) for events in found[:2]] == wanted


@pytest.mark.parametrize("num_seen", [0, 1, 5])
async def test_abort_frees_everything_and_ends_the_stream(num_seen, make_engine, prompt):
    engine = make_engine()
    stream = engine.submit(Request("gone", prompt(500), SamplingParams(max_tokens=5000, ignore_eos=True)))
    seen = 0
    while seen < num_seen:
        seen += isinstance(await anext(stream), Token)
    stream.abort()
    stream.abort()
    events = [event async for event in stream]
    assert isinstance(events[-1], Done)
    assert Finish(0, "abort", None) in events
    await settle(engine)
    assert not any(leaks(engine).values())


async def test_stopped_choice_ends_as_complete_and_the_others_go_on(make_engine, prompt):
    recorder = Endings()
    engine = make_engine(recorder=recorder)
    stream = engine.submit(Request("two", prompt(300), SamplingParams(n=2, max_tokens=40, ignore_eos=True)))
    num_tokens = [0, 0]
    ends = []
    async for event in stream:
        if isinstance(event, Token):
            num_tokens[event.choice] += 1
            if num_tokens[0] == 3:
                stream.stop(0)
                stream.stop(0)
                stream.stop(7)
        elif isinstance(event, Finish):
            ends.append(event)
    assert ends == [Finish(0, "stop", None), Finish(1, "length", None)]
    assert num_tokens[0] < 40 == num_tokens[1]
    assert isinstance(event, Done)
    assert event.usage.num_generated_tokens == sum(num_tokens)
    assert event.usage.share_scanned is not None
    stream.stop(1)  # after the end
    await settle(engine)
    assert recorder.reasons == ["length"]
    assert not any(leaks(engine).values())


async def test_request_whose_only_choice_was_stopped_counts_as_stop(make_engine, prompt):
    recorder = Endings()
    engine = make_engine(recorder=recorder)
    stream = engine.submit(Request("one", prompt(30), SamplingParams(max_tokens=5000, ignore_eos=True)))
    while not isinstance(await anext(stream), Token):
        pass
    stream.stop(0)
    events = [event async for event in stream]
    assert (events[-2], type(events[-1])) == (Finish(0, "stop", None), Done)
    assert recorder.reasons == ["stop"]
    await settle(engine)
    assert not any(leaks(engine).values())


async def test_aborted_prefill_is_kept_for_the_next_try(make_engine, prompt, run):
    engine = make_engine()
    stream = engine.submit(Request("gone", prompt(900), SamplingParams(max_tokens=10)))
    while not (isinstance(event := await anext(stream), Progress) and event.num_prefilled_tokens >= 192):
        pass
    stream.abort()
    [_ async for _ in stream]
    events = await run(engine, prompt(900), max_tokens=2)
    assert events[-1].usage.num_cached_tokens >= 192


async def test_too_long_prompt_is_refused_with_both_numbers(make_engine, prompt):
    engine = make_engine(max_model_len=100)
    with pytest.raises(ContextLengthError, match=r"100 tokens.*101"):
        engine.submit(Request("a", prompt(101)))
    with pytest.raises(ContextLengthError, match=r"100 tokens.*60.*50"):
        engine.submit(Request("a", prompt(60), SamplingParams(max_tokens=50)))


async def test_bad_requests_are_refused_before_any_work(make_engine, prompt):
    engine = make_engine(max_num_seqs=2)
    for request in (
        Request("a", ()),
        Request("a", (5, 99999)),
        Request("a", (-1,)),
        Request("a", (5,), SamplingParams(n=3)),
    ):
        with pytest.raises(InvalidRequestError):
            engine.submit(request)


async def test_full_queue_is_refused(make_engine, prompt):
    engine = make_engine(max_queue_len=2, max_num_seqs=1)
    long = SamplingParams(max_tokens=3000, ignore_eos=True)
    streams = [engine.submit(Request("r0", prompt(50), long))]
    await anext(streams[0])
    streams += [engine.submit(Request(f"r{i}", prompt(50), long)) for i in (1, 2)]
    with pytest.raises(RateLimitError) as refused:
        engine.submit(Request("r3", prompt(50), long))
    assert refused.value.retry_after_seconds == 1
    for stream in streams:
        stream.abort()
    await settle(engine)
    assert not any(leaks(engine).values())


async def test_queued_prompt_tokens_are_limited_but_one_request_may_always_wait(make_engine, prompt):
    engine = make_engine(max_queued_tokens=100, max_num_seqs=1)
    long = SamplingParams(max_tokens=3000, ignore_eos=True)
    streams = [engine.submit(Request("r0", prompt(50), long))]
    await anext(streams[0])
    streams.append(engine.submit(Request("r1", prompt(150), long)))  # alone in the queue, whatever its length
    with pytest.raises(RateLimitError, match="150 prompt tokens are waiting, 100 allowed"):
        engine.submit(Request("r2", prompt(1), long))
    for stream in streams:
        stream.abort()
    await settle(engine)
    assert not any(leaks(engine).values())


async def test_request_larger_than_the_budget_is_refused_with_figures(make_engine, prompt):
    engine = make_engine(kv_host_memory=100_000)
    with pytest.raises(MemoryExhaustedError, match="100000"):
        engine.submit(Request("a", prompt(4000), SamplingParams(max_tokens=100)))


async def test_open_ended_answer_is_cut_to_the_budget(make_engine, prompt, run):
    engine = make_engine(kv_host_memory=400_000)
    events = await run(engine, prompt(20), max_tokens=None)
    assert 10 < events[-1].usage.num_generated_tokens < 1000
    assert events[-2].reason == "length"


async def test_idle_segments_make_room_for_new_requests(make_engine, prompt, run):
    class Counting(NullRecorder):
        evicted = 0

        def eviction(self, tier, reason, num_bytes):
            self.evicted += num_bytes

    recorder = Counting()
    engine = make_engine(kv_host_memory=1_500_000, recorder=recorder)
    for seed in range(8):
        await run(engine, prompt(600, seed=seed), max_tokens=4)
        stats = engine._manager.stats()
        assert stats.kv_bytes + stats.index_bytes + stats.reserved_bytes <= 1_500_000
    assert recorder.evicted > 0


async def test_more_requests_than_memory_wait_their_turn(make_engine, prompt, run, tokens_of):
    engine = make_engine(kv_host_memory=1_000_000)
    results = await asyncio.gather(*[run(engine, prompt(500, seed=i), max_tokens=8) for i in range(6)])
    assert all(len(tokens_of(events)) == 8 for events in results)


async def test_higher_priority_preempts_and_nothing_is_lost(make_engine, prompt, run, tokens_of):
    class Counting(NullRecorder):
        preemptions = 0

        def preemption(self):
            self.preemptions += 1

    recorder = Counting()
    engine = make_engine(max_num_seqs=1, recorder=recorder)
    wanted = tokens_of(await run(engine, prompt(40), max_tokens=200))
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    low = engine.submit(Request("low", prompt(40), params, priority=5))
    first = [await anext(low) for _ in range(4)]
    urgent = engine.submit(Request("urgent", prompt(30), SamplingParams(max_tokens=3), priority=0))
    assert isinstance([e async for e in urgent][-1], Done)
    assert tokens_of(first + [e async for e in low]) == wanted
    assert recorder.preemptions == 1


async def test_failing_request_takes_no_other_with_it(make_engine, prompt, run, tokens_of, monkeypatch):
    engine = make_engine()
    wanted = tokens_of(await run(engine, prompt(80), max_tokens=30))
    real = engine._runner._forward

    def forward(work, wanted, step):
        if any(len(item.tokens) == 13 for item in work):
            raise RuntimeError("planted")
        return real(work, wanted, step)

    monkeypatch.setattr(engine._runner, "_forward", forward)
    good, bad = await asyncio.gather(run(engine, prompt(80), max_tokens=30), run(engine, prompt(13), salt="x"))
    assert tokens_of(good) == wanted
    assert isinstance(bad[-1], Failure)
    assert "planted" not in bad[-1].error.message
    await settle(engine)
    assert not any(leaks(engine).values())
    assert engine.is_alive


@pytest.mark.parametrize(
    "planted", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: out of memory")]
)
@pytest.mark.parametrize("place", ["forward", "sealing"])
async def test_running_out_of_memory_fails_that_request_alone_and_is_called_so(
    planted, place, make_engine, prompt, run, tokens_of, monkeypatch
):
    engine = make_engine()
    wanted = tokens_of(await run(engine, prompt(80), max_tokens=30))
    forward, grown = engine._runner._forward, engine._manager.grown

    def failing_forward(work, wanted, step):
        if place == "forward" and any(len(item.tokens) == 13 for item in work):
            raise planted
        return forward(work, wanted, step)

    def failing_grown(context, token_ids):
        if place == "sealing" and context.num_tokens == 15:
            raise planted
        return grown(context, token_ids)

    monkeypatch.setattr(engine._runner, "_forward", failing_forward)
    monkeypatch.setattr(engine._manager, "grown", failing_grown)
    good, bad = await asyncio.gather(run(engine, prompt(80), max_tokens=30), run(engine, prompt(13), salt="x"))
    assert tokens_of(good) == wanted
    assert isinstance(bad[-1], Failure)
    assert isinstance(bad[-1].error, MemoryExhaustedError)
    await settle(engine)
    assert not any(leaks(engine).values())
    assert engine.is_alive


async def test_one_row_of_logits_that_is_not_finite_fails_its_request_alone(
    make_engine, prompt, run, tokens_of, monkeypatch
):
    engine = make_engine()
    wanted = tokens_of(await run(engine, prompt(80), max_tokens=30))
    forward = engine._runner._forward

    def poisoned(work, wanted, step):
        logits = forward(work, wanted, step)
        for row, item in zip(logits, [item for item in work if item.num_logits], strict=True):
            if item.context.num_tokens == 15:
                row[3] = float("nan")
        return logits

    monkeypatch.setattr(engine._runner, "_forward", poisoned)
    good, bad = await asyncio.gather(run(engine, prompt(80), max_tokens=30), run(engine, prompt(13), salt="x"))
    assert tokens_of(good) == wanted
    assert isinstance(bad[-1], Failure)
    await settle(engine)
    assert not any(leaks(engine).values())


async def test_non_finite_logits_fail_that_request_alone(make_engine, prompt, run, monkeypatch):
    engine = make_engine()
    real = engine._runner._forward
    monkeypatch.setattr(engine._runner, "_forward", lambda *a: real(*a) * float("nan"))
    assert isinstance((await run(engine, prompt(10)))[-1], Failure)
    monkeypatch.setattr(engine._runner, "_forward", real)
    assert isinstance((await run(engine, prompt(10)))[-1], Done)


async def test_dead_engine_fails_open_streams_and_refuses_new_ones(make_engine, prompt, monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine._worker.scheduler, "schedule", lambda: 1 / 0)
    stream = engine.submit(Request("a", prompt(10)))
    events = [event async for event in stream]
    assert isinstance(events[-1], Failure)
    for _ in range(200):
        if not engine.is_alive:
            break
        await asyncio.sleep(0.01)
    with pytest.raises(UnavailableError):
        engine.submit(Request("b", prompt(10)))


async def test_stop_lets_streams_finish_and_fails_the_rest(make_engine, prompt):
    engine = make_engine()
    short = engine.submit(Request("short", prompt(10), SamplingParams(max_tokens=3, ignore_eos=True)))
    endless = engine.submit(Request("endless", prompt(10), SamplingParams(max_tokens=8000, ignore_eos=True)))
    await engine.stop(0.3)
    assert isinstance([e async for e in short][-1], Done)
    last = [e async for e in endless][-1]
    assert isinstance(last, Failure)
    assert last.error.code == "shutting_down"


async def test_salted_caches_share_nothing(make_engine, prompt, run):
    engine = make_engine()
    await run(engine, prompt(300), salt="tenant-a")
    assert (await run(engine, prompt(300), salt="tenant-b"))[-1].usage.num_cached_tokens == 0
    assert (await run(engine, prompt(300), salt="tenant-a"))[-1].usage.num_cached_tokens == 299
