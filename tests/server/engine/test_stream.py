"""Events cross from the engine's thread to the event loop in order, and end exactly once."""

from __future__ import annotations

import asyncio
import threading

import pytest

from server.engine.events import Done, Event, Failure, Finish, Progress, Token, Usage
from server.engine.stream import RequestStream, deliver
from server.errors import ServerError

DONE = Done(Usage(1, 0, 2, None))


async def collect(stream: RequestStream) -> list[Event]:
    return [event async for event in stream]


async def test_events_come_in_order_and_end_with_done() -> None:
    stream = RequestStream("r", lambda request_id, choice: None)
    stream.push([Progress(1, 1), Token(0, 5)])
    stream.push([Token(0, 6), Finish(0, "stop"), DONE])
    async with asyncio.timeout(30):
        events = await collect(stream)
    assert events == [Progress(1, 1), Token(0, 5), Token(0, 6), Finish(0, "stop"), DONE]


async def test_a_failure_is_the_last_event() -> None:
    stream = RequestStream("r", lambda request_id, choice: None)
    failure = Failure(ServerError("broken"))
    stream.push([Token(0, 5), failure])
    async with asyncio.timeout(30):
        assert await collect(stream) == [Token(0, 5), failure]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_events_pushed_from_another_thread_wake_the_reader() -> None:
    stream = RequestStream("r", lambda request_id, choice: None)
    go_on = threading.Event()

    def engine() -> None:
        for token_id in range(100):
            stream.push([Token(0, token_id)])
            if token_id == 50:
                go_on.wait(30)
        stream.push([DONE])

    thread = threading.Thread(target=engine)
    thread.start()
    seen: list[Event] = []
    async with asyncio.timeout(30):
        async for event in stream:
            seen.append(event)
            if event == Token(0, 50):
                go_on.set()
    thread.join()
    assert seen == [*(Token(0, i) for i in range(100)), DONE]


async def test_a_reader_that_waits_lets_the_loop_go_on() -> None:
    stream = RequestStream("r", lambda request_id, choice: None)
    reader = asyncio.create_task(collect(stream))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not reader.done()
    stream.push([DONE])
    async with asyncio.timeout(30):
        assert await reader == [DONE]


async def test_a_reader_that_gives_up_waiting_misses_nothing() -> None:
    stream = RequestStream("r", lambda request_id, choice: None)
    for _ in range(3):  # as between two keep-alive comments
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.001)
    stream.push([Token(0, 1), DONE])
    async with asyncio.timeout(30):
        assert await collect(stream) == [Token(0, 1), DONE]


async def test_abort_and_stop_name_the_request_every_time() -> None:
    ended: list[tuple[str, int | None]] = []
    stream = RequestStream("r-7", lambda request_id, choice: ended.append((request_id, choice)))
    stream.abort()
    stream.abort()
    stream.stop(2)
    assert ended == [("r-7", None), ("r-7", None), ("r-7", 2)]


async def test_a_batch_of_streams_is_delivered_with_one_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [RequestStream(f"r{i}", lambda request_id, choice: None) for i in range(3)]
    loop = asyncio.get_running_loop()
    wake_ups: list[object] = []
    call = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a, **k: (wake_ups.append(a), call(*a, **k))[1])
    deliver([(stream, [Token(0, i), DONE]) for i, stream in enumerate(streams)])
    assert len(wake_ups) == 1
    async with asyncio.timeout(30):
        assert [await collect(stream) for stream in streams] == [[Token(0, i), DONE] for i in range(3)]


def test_events_for_a_loop_that_is_gone_are_dropped() -> None:
    async def make() -> RequestStream:
        return RequestStream("r", lambda request_id, choice: None)

    stream = asyncio.run(make())
    stream.push([DONE])
