"""From the engine's events to text: detokenizing, stop strings, log-probabilities, usage, time-outs.

One `generate` per HTTP request, on the event loop. Knows nothing of HTTP or of the shape of any endpoint's answer.
Leaving the iteration early, by an error or because the client went away, aborts the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np

from server.api.face import EngineFace, StreamFace
from server.api.stops import StopFinder
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
from server.engine.tokenizer import Detokenizer, Tokenizer
from server.errors import RequestTimeoutError


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A chosen token with its log-probability and its alternatives; made only when asked for."""

    logprob: TokenLogprob
    top: tuple[TokenLogprob, ...]
    text_offset: int  # characters of the answer before it


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice gained; the last one of a choice carries its finish reason."""

    choice: int
    text: str
    tokens: tuple[ScoredToken, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_tokens: int = 0  # of this choice so far


@dataclass(frozen=True, slots=True, eq=False)
class PromptScores:
    """All scores of one request's prompt, before its first delta; comes when asked for, and if there are any."""

    request: int  # its position among those generated together
    scores: PromptLogprobs


@dataclass(frozen=True, slots=True)
class TextUsage:
    """Tokens over all prompts and choices; generated ones up to the stop strings."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    share_scanned: float | None


Update = Progress | PromptScores | Delta | TextUsage


class Choice:
    """The text of one choice while it grows."""

    def __init__(self, index: int, request: Request, options: TextOptions, tokenizer: Tokenizer) -> None:
        sampling = request.sampling
        self._index = index
        self._min_tokens = sampling.min_tokens
        shows_eos = sampling.ignore_eos and request.make_constraint is None
        self._hidden = frozenset(sampling.stop_token_ids) | (frozenset() if shows_eos else tokenizer.eos_token_ids)
        self._detokenizer = Detokenizer(
            tokenizer, request.prompt_token_ids, skip_special_tokens=options.skip_special_tokens
        )
        self._stops = StopFinder(options.stops, include_stop=options.include_stop)
        self._pending: list[ScoredToken] = []
        self._num_chars = 0
        self.num_tokens = 0
        self.is_finished = False

    def push(self, token: Token) -> Delta | None:
        """What `token` adds; None when it adds nothing that can be shown yet."""
        self.num_tokens += 1
        is_hidden = token.token_id in self._hidden
        if token.logprob is not None and not is_hidden:
            self._pending.append(ScoredToken(token.logprob, token.top_logprobs, self._num_chars))
        text = "" if is_hidden else self._detokenizer.push(token.token_id)
        self._num_chars += len(text)
        text = self._stops.push(text, is_armed=self.num_tokens > self._min_tokens)
        if self._stops.found is not None:
            return self._end(text, "stop", self._stops.found)
        return Delta(self._index, text, self._take_tokens(), num_tokens=self.num_tokens) if text else None

    def finish(self, event: Finish) -> Delta:
        """The rest of the text and why it ended."""
        text = self._stops.push(self._detokenizer.flush(), is_armed=self.num_tokens > self._min_tokens)
        if self._stops.found is not None:
            return self._end(text, "stop", self._stops.found)
        return self._end(text + self._stops.flush(), event.reason, event.stop_token_id)

    def _end(self, text: str, reason: str, stop_reason: int | str | None) -> Delta:
        self.is_finished = True
        return Delta(self._index, text, self._take_tokens(), reason, stop_reason, self.num_tokens)

    def _take_tokens(self) -> tuple[ScoredToken, ...]:
        tokens, self._pending = tuple(self._pending), []
        return tokens


@dataclass(slots=True)
class Deadline:
    """When the request has to be over, in the event loop's time; None: never."""

    seconds: float | None = None
    _at: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.seconds:
            self._at = asyncio.get_running_loop().time() + self.seconds

    async def next_event(self, events: AsyncIterator[Event]) -> Event | None:
        """The next event, None at the end. Raises RequestTimeoutError."""
        if self._at is None:
            return await anext(events, None)
        try:
            async with asyncio.timeout_at(self._at):
                return await anext(events, None)
        except TimeoutError:
            raise RequestTimeoutError(f"the request took longer than {self.seconds:g} seconds") from None


async def generate(
    engine: EngineFace,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    options: TextOptions,
    timeout_seconds: float | None = None,
) -> AsyncGenerator[Update]:
    """Runs all requests together; choice c of request r has index r * n + c. Ends with the usage of all.

    Submits on the first step of the iteration; raises what `submit` raises, or the error a request ended with.
    """
    deadline = Deadline(timeout_seconds)
    streams: list[StreamFace] = []
    try:
        for request in requests:
            streams.append(engine.submit(request))
        texts = [
            _request_updates(stream, request, options, tokenizer, deadline, position=i)
            for i, (stream, request) in enumerate(zip(streams, requests, strict=True))
        ]
        usages: list[TextUsage] = []
        async with aclosing(_merge(texts)) as updates:
            async for update in updates:
                if isinstance(update, TextUsage):
                    usages.append(update)
                else:
                    yield update
        yield _sum(usages)
    finally:
        for stream in streams:
            stream.abort()


async def _request_updates(
    stream: StreamFace,
    request: Request,
    options: TextOptions,
    tokenizer: Tokenizer,
    deadline: Deadline,
    position: int,
) -> AsyncGenerator[Update]:
    n = request.sampling.n
    choices = [Choice(position * n + i, request, options, tokenizer) for i in range(n)]
    scores: list[PromptLogprobs] = []
    usage = Usage(len(request.prompt_token_ids), 0, 0, None)
    shown_percent = -1
    events = aiter(stream)
    while (event := await deadline.next_event(events)) is not None:
        match event:
            case Progress():
                if (percent := _percent(event)) != shown_percent:  # at most a hundred and one per prompt
                    shown_percent = percent
                    yield event
            case PromptLogprobs():
                scores.append(event)
            case Token() | Finish():
                if scores:
                    yield PromptScores(position, _joined(scores))
                    scores = []
                delta = _advance(choices[event.choice], event)
                if delta is not None and delta.finish_reason is not None and isinstance(event, Token):
                    stream.stop(event.choice)  # a stop string; the engine knows only tokens
                if delta is not None:
                    yield delta
            case Failure():
                raise event.error
            case Done():
                usage = event.usage
    yield TextUsage(
        usage.num_prompt_tokens,
        usage.num_cached_tokens,
        sum(choice.num_tokens for choice in choices),
        usage.share_scanned,
    )


def _joined(scores: Sequence[PromptLogprobs]) -> PromptLogprobs:
    return PromptLogprobs(
        scores[0].start,
        np.concatenate([part.token_ids for part in scores]),
        np.concatenate([part.logprobs for part in scores]),
        np.concatenate([part.ranks for part in scores]),
    )


def _percent(progress: Progress) -> int:
    return 100 * progress.num_prefilled_tokens // max(1, progress.num_prompt_tokens)


def _advance(choice: Choice, event: Token | Finish) -> Delta | None:
    if choice.is_finished:  # by a stop string, before the engine knew
        return None
    return choice.push(event) if isinstance(event, Token) else choice.finish(event)


async def _merge(streams: Sequence[AsyncGenerator[Update]]) -> AsyncGenerator[Update]:
    """All updates as they come; the first error ends all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as updates:
            async for update in updates:
                yield update
        return
    queue: asyncio.Queue[Update | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Update]) -> None:
        try:
            async with aclosing(stream) as updates:
                async for update in updates:
                    queue.put_nowait(update)
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        for _ in range(len(tasks)):
            while (queued := await queue.get()) is not None:
                yield queued
            for task in filter(asyncio.Task.done, tasks):
                task.result()  # raises what ended it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _sum(usages: Sequence[TextUsage]) -> TextUsage:
    scanned = [(u.share_scanned, u.num_generated_tokens) for u in usages if u.share_scanned is not None]
    weight = sum(num_tokens for _, num_tokens in scanned)
    return TextUsage(
        sum(u.num_prompt_tokens for u in usages),
        sum(u.num_cached_tokens for u in usages),
        sum(u.num_generated_tokens for u in usages),
        sum(share * num_tokens for share, num_tokens in scanned) / weight if weight else None,
    )
