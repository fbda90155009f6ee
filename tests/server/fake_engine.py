"""An engine that plays back scripted events, with the face of the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from server.engine.events import (
    Done,
    Event,
    Failure,
    Finish,
    Progress,
    PromptLogprobs,
    Token,
    TokenLogprob,
    Usage,
)
from server.engine.request import Request
from server.engine.session_info import SessionBytes, SessionInfo, SessionKey, SessionList
from server.engine.tokenizer import Tokenizer
from server.errors import ConflictError, DiskUnavailableError, NotFoundError, ServerError, UnavailableError

Script = Callable[[Request], list[Event]]


class FakeStream:
    """Gives its events out, then ends after Done or Failure; without one it waits to be aborted."""

    def __init__(self, events: list[Event], request: Request) -> None:
        self._events = list(events)
        self._request = request
        self._changed = asyncio.Event()
        self._is_over = False
        self.num_aborts = 0
        self.stopped: list[int] = []

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Event:
        if self._is_over:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        while not self._events:
            self._changed.clear()
            await self._changed.wait()
        event = self._events.pop(0)
        self._is_over = isinstance(event, Done | Failure)
        return event

    def abort(self) -> None:
        self.num_aborts += 1
        if self.num_aborts == 1 and not self._is_over:
            self._events = [Finish(i, "abort") for i in range(self._request.sampling.n)]
            self.push(Done(Usage(len(self._request.prompt_token_ids), 0, 0, None)))

    def stop(self, choice: int) -> None:
        self.stopped.append(choice)
        rest = [event for event in self._events if not (isinstance(event, Token | Finish) and event.choice == choice)]
        self._events = [Finish(choice, "stop"), *rest]
        self._changed.set()

    def push(self, *events: Event) -> None:
        self._events.extend(events)
        self._changed.set()


class FakeSessions:
    """Knows the names of the requests that came, and what was asked; nothing is kept, so nothing can be saved."""

    def __init__(self) -> None:
        self.known: dict[SessionKey, SessionInfo] = {}
        self.asked: list[tuple[Any, ...]] = []

    def came(self, key: SessionKey, num_tokens: int) -> None:
        self.known[key] = SessionInfo(
            key.name, "ready", 1.5, 2.5, num_tokens, num_tokens, 1, 0, 0, 0, 0, 0, 1.0, False, None, None, None,
            SessionBytes(host_kv=num_tokens, own=num_tokens),
        )  # fmt: skip

    async def list(self, owner: str, salt: str, limit: int, after: str | None) -> SessionList:
        mine = [info for key, info in self.known.items() if (key.owner, key.salt) == (owner, salt)][::-1]
        begin = 0 if after is None else mine.index(await self.get(SessionKey(owner, salt, after))) + 1
        page = tuple(mine[begin : begin + limit])
        held = SessionBytes(host_kv=sum(info.num_tokens for info in page))
        return SessionList(page, len(mine), begin + limit < len(mine), held)

    async def get(self, key: SessionKey) -> SessionInfo:
        if key not in self.known:
            raise NotFoundError(f"there is no session '{key.name}'", code="session_not_found", param="id")
        return self.known[key]

    async def delete(self, key: SessionKey) -> int:
        await self.get(key)
        return self.known.pop(key).num_tokens

    async def pin(self, key: SessionKey, ttl_seconds: float | None) -> SessionInfo:
        self.asked.append(("pin", key.name, ttl_seconds))
        self.known[key] = replace(await self.get(key), is_pinned=ttl_seconds != 0, pinned_until=ttl_seconds or None)
        return self.known[key]

    async def save(self, key: SessionKey) -> SessionInfo:
        await self.get(key)
        raise DiskUnavailableError("this server keeps nothing on disk")

    async def restore(self, key: SessionKey) -> SessionInfo:
        self.asked.append(("restore", key.name))
        return await self.get(key)

    async def fork(self, key: SessionKey, name: str) -> SessionInfo:
        twin = replace(key, name=name)
        if twin in self.known:
            raise ConflictError(f"there is a session '{name}' already", code="session_exists", param="id")
        self.known[twin] = replace(await self.get(key), name=name)
        return self.known[twin]


class FakeEngine:
    """Answers every request with `script(request)`; `refusal`, when set, is raised by `submit`."""

    def __init__(self, script: Script) -> None:
        self.model_name = "/models/fake"
        self.max_model_len = 4096
        self.is_alive = True
        self.script = script
        self.sessions = FakeSessions()
        self.refusal: ServerError | None = None
        self.requests: list[Request] = []
        self.streams: list[FakeStream] = []
        self.submitted = asyncio.Event()

    def submit(self, request: Request) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        stream = FakeStream(self.script(request), request)
        self.requests.append(request)
        if request.session is not None:
            self.sessions.came(request.session, len(request.prompt_token_ids))
        self.streams.append(stream)
        self.submitted.set()
        return stream

    async def stop(self, drain_seconds: float) -> None:
        """Waits for nothing: open streams fail at once."""
        self.is_alive = False
        for stream in self.streams:
            stream.push(Failure(UnavailableError("the server is shutting down", code="shutting_down")))


def says(
    tokenizer: Tokenizer, *texts: str, cached: int = 0, has_progress: bool = False, has_logprobs: bool = False
) -> Script:
    """A script: choice i answers texts[i % len(texts)] and ends with eos, or by length with `ignore_eos`."""

    def script(request: Request) -> list[Event]:
        num_prompt = len(request.prompt_token_ids)
        events: list[Event] = [Progress(i * num_prompt // 2, num_prompt) for i in range(3)] if has_progress else []
        events += prompt_events(request, tokenizer)
        num_tokens = 0
        for choice in range(request.sampling.n):
            token_ids = _encode(tokenizer, texts[choice % len(texts)])
            answer = answer_events(choice, token_ids, tokenizer, request, has_logprobs)
            num_tokens += sum(isinstance(event, Token) for event in answer)
            events += answer
        return [*events, Done(Usage(num_prompt, cached, num_tokens, 0.25))]

    return script


def prompt_events(request: Request, tokenizer: Tokenizer) -> list[Event]:
    """Scores of the prompt, when asked for: -1 for its own tokens, then -2, -3, … for those that follow in the
    vocabulary; in two parts, as if read in two chunks."""
    num_top, ids = request.sampling.num_prompt_logprobs, np.array(request.prompt_token_ids[1:], dtype=np.int32)
    if num_top is None or not len(ids):
        return []
    columns = np.arange(1 + num_top, dtype=np.int32)
    token_ids = (ids[:, None] + columns) % tokenizer.vocab_size
    logprobs = np.broadcast_to(-1.0 - columns.astype(np.float32), token_ids.shape)
    ranks = np.full(len(ids), 1 + num_top, dtype=np.int32)
    half = len(ids) // 2
    parts = [slice(0, half), slice(half, len(ids))]
    return [
        PromptLogprobs(1 + part.start, token_ids[part], logprobs[part], ranks[part])
        for part in parts
        if part.stop > part.start
    ]


def answer_events(
    choice: int, token_ids: Sequence[int], tokenizer: Tokenizer, request: Request, has_logprobs: bool = False
) -> list[Event]:
    """Tokens and finish of one choice."""
    (eos,) = tokenizer.eos_token_ids
    limit = request.sampling.max_tokens
    is_cut = request.sampling.ignore_eos or (limit is not None and limit <= len(token_ids))
    shown = list(token_ids)[:limit] + ([] if is_cut else [eos])
    scored = has_logprobs and request.sampling.num_logprobs is not None
    tokens: list[Event] = [
        Token(
            choice,
            token_id,
            TokenLogprob(token_id, -0.5) if scored else None,
            tuple(
                TokenLogprob((token_id + i) % tokenizer.vocab_size, -0.5 - i)
                for i in range(request.sampling.num_logprobs or 0)
            ),
        )
        for token_id in shown
    ]
    return [*tokens, Finish(choice, "length" if is_cut else "stop", None if is_cut else eos)]


def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tokenizer._encode(text, False)
