"""One turn of a conversation: from a chat request to the parts of its answer, whatever protocol asked for it.

`/v1/chat/completions` uses it directly; `/v1/responses` and `/v1/messages` translate to and from it.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from server.api.caller import Caller
from server.api.conversation import encode_conversation
from server.api.parts import reasoning
from server.api.parts.base import CallArguments, CallStart, Content, Part, PartParser, PlainParser, Reasoning
from server.api.sampling import check_prompt_scores, engine_request, text_options
from server.api.service import Service
from server.api.streaming import Delta, PromptScores, ScoredToken, TextUsage
from server.api.structure import constraint
from server.api.tools import forced_calls, offered_tools, parser_maker
from server.api.wire.chat import ChatRequest
from server.api.wire.tools import NamedToolChoice
from server.engine.events import Progress, PromptLogprobs
from server.engine.request import Request


@dataclass(frozen=True, slots=True)
class TurnDelta:
    """What one choice gained; the last one of a choice carries its finish reason."""

    choice: int
    parts: tuple[Part, ...]
    tokens: tuple[ScoredToken, ...] = ()
    finish_reason: str | None = None  # stop, length, tool_calls, abort
    stop_reason: int | str | None = None
    num_tokens: int = 0  # of this choice so far


TurnUpdate = Progress | PromptScores | TurnDelta | TextUsage


@dataclass(frozen=True, slots=True)
class Turn:
    """A request that is ready to run."""

    body: ChatRequest
    service: Service
    request: Request
    make_parser: Callable[[], PartParser]

    async def run(self) -> AsyncGenerator[TurnUpdate]:
        """The answer's parts as they come. Raises what `Service.generate` raises."""
        options = text_options(self.body)
        if self.make_parser is not PlainParser:  # the tags of calls may be special tokens
            options = replace(options, skip_special_tokens=False)
        choices = [_Choice(self.make_parser(), self.body) for _ in range(self.request.sampling.n)]
        async with aclosing(self.service.generate([self.request], options)) as updates:
            async for update in updates:
                if not isinstance(update, Delta):
                    yield update
                elif (delta := choices[update.choice].take(update)) is not None:
                    yield delta


async def prepare(body: ChatRequest, service: Service, request_id: str, caller: Caller) -> Turn:
    """Renders, encodes and compiles; nothing has been submitted yet. Raises InvalidRequestError."""
    tokenizer = service.tokenizer
    prompt = await encode_conversation(
        body.messages,
        tokenizer,
        tools=offered_tools(body),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=bool(body.add_special_tokens),
        template_kwargs=body.chat_template_kwargs,
    )
    check_prompt_scores(body, len(prompt))
    make_constraint = await constraint(body, service, forced_calls(body))
    request = engine_request(body, prompt, request_id, service, caller, make_constraint)
    make_parser = parser_maker(body, service.tool_parser, tokenizer.chat_template)
    if make_constraint is None:
        ending = tokenizer.decode(prompt[-8:], skip_special_tokens=False).rstrip()
        make_parser = _with_reasoning(make_parser, service, is_open=ending.endswith(reasoning.OPEN))
    return Turn(body, service, request, make_parser)


def _with_reasoning(
    make_parser: Callable[[], PartParser], service: Service, *, is_open: bool
) -> Callable[[], PartParser]:
    knows_tags = is_open or reasoning.CLOSE in service.tokenizer.chat_template
    if service.reasoning_parser == "none" or (service.reasoning_parser == "auto" and not knows_tags):
        return make_parser
    return lambda: reasoning.ReasoningParser(make_parser(), is_open=is_open)


class _Choice:
    """One choice while it grows."""

    def __init__(self, parser: PartParser, body: ChatRequest) -> None:
        self._parser = parser
        self._is_named = isinstance(body.tool_choice, NamedToolChoice)
        self._has_calls = False
        self._tokens: tuple[ScoredToken, ...] = ()

    def take(self, delta: Delta) -> TurnDelta | None:
        """None while nothing can be told yet."""
        parts = self._parser.push(delta.text)
        self._tokens += delta.tokens
        if delta.finish_reason is not None:
            parts += self._parser.flush()
        self._has_calls |= any(isinstance(part, CallStart) for part in parts)
        if not parts and delta.finish_reason is None:
            return None
        tokens, self._tokens = self._tokens, ()
        reason = delta.finish_reason
        if reason == "stop" and self._has_calls and not self._is_named:  # OpenAI says `stop` for a named function
            reason = "tool_calls"
        return TurnDelta(delta.choice, tuple(parts), tokens, reason, delta.stop_reason, delta.num_tokens)


@dataclass(slots=True)
class CollectedCall:
    """A tool call put together."""

    name: str
    id: str = field(default_factory=lambda: new_call_id())
    arguments: str = ""


@dataclass(slots=True)
class CollectedTurn:
    """One choice put together, for answers in one piece; filled by `add`, in order."""

    content: str = ""
    reasoning: str = ""
    calls: list[CollectedCall] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: str = "abort"  # until the last delta says otherwise
    stop_reason: int | str | None = None

    def add(self, delta: TurnDelta) -> None:
        """Appends what the choice gained."""
        for part in delta.parts:
            match part:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case CallStart(_, name):
                    self.calls.append(CollectedCall(name))
                case CallArguments(call, text):
                    self.calls[call].arguments += text
        self.tokens.extend(delta.tokens)
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass(slots=True)
class WholeTurn:
    """A turn that has ended."""

    choices: list[CollectedTurn]
    usage: TextUsage
    prompt_scores: PromptLogprobs | None = None


async def collect(turn: Turn) -> WholeTurn:
    """All choices and the usage, when the turn has ended."""
    choices = [CollectedTurn() for _ in range(turn.request.sampling.n)]
    whole = WholeTurn(choices, TextUsage(len(turn.request.prompt_token_ids), 0, 0, None))
    async with aclosing(turn.run()) as updates:
        async for update in updates:
            if isinstance(update, TurnDelta):
                choices[update.choice].add(update)
            elif isinstance(update, TextUsage):
                whole.usage = update
            elif isinstance(update, PromptScores):
                whole.prompt_scores = update.scores
    return whole


def new_call_id() -> str:
    """As OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"
