"""`POST /v1/completions`: prompts (text or token ids) in, their continuations out, at once or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter, Request, Response

from server.api import sse
from server.api.caller import Caller, CallerDep
from server.api.collected import Collected, best
from server.api.disconnect import unless_disconnected
from server.api.documentation import ERRORS, STREAM
from server.api.json_answer import json_response
from server.api.logprobs import completion_logprobs, echoed_logprobs, followed_by, prompt_logprobs
from server.api.sampling import check_prompt_scores, check_token_ids, engine_request, text_options
from server.api.service import Service, ServiceDep
from server.api.streaming import Delta, PromptScores, ScoredToken, TextUsage
from server.api.structure import constraint
from server.api.usage import usage_info, usage_so_far
from server.api.wire.completions import CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse
from server.api.wire.generation import PromptLogprobsByToken, UsageInfo
from server.engine.events import Progress, PromptLogprobs
from server.engine.request import Request as EngineRequest

router = APIRouter()


@router.post("/v1/completions", responses={200: {"model": CompletionResponse, **STREAM}, **ERRORS})
async def create_completion(body: CompletionRequest, http: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Continues one or several prompts."""
    call = CompletionCall(body, service, service.check_model(body.model))
    await call.prepare(caller)
    if body.stream:
        return sse.EventStream(call.stream(), service.keepalive_seconds)
    return await unless_disconnected(http, call.collect())


@dataclass(slots=True)
class Prompt:
    """One prompt of the call, what stands before its choices' texts, and its scores once they are there."""

    request: EngineRequest
    echo: str
    scores: PromptLogprobs | None = None  # set while the answer is made


@dataclass(slots=True)
class CompletionCall:
    """One call: what its answer repeats in every part."""

    body: CompletionRequest
    service: Service
    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    prompts: list[Prompt] = field(default_factory=list)  # filled by `prepare`

    async def prepare(self, caller: Caller) -> None:
        """Encodes and compiles; nothing has been submitted yet. Raises InvalidRequestError."""
        make_constraint = await constraint(self.body, self.service)
        for index, prompt in enumerate(self.body.prompts):
            token_ids = await self._token_ids(prompt)
            request_id = f"{self.id}-{index}"
            request = engine_request(self.body, token_ids, request_id, self.service, caller, make_constraint)
            self.prompts.append(Prompt(request, await self._echo(prompt)))
        check_prompt_scores(self.body, sum(len(prompt.request.prompt_token_ids) for prompt in self.prompts))

    async def collect(self) -> Response:
        """All texts as one JSON document."""
        n = self.body.num_choices
        choices = [Collected() for _ in range(n * len(self.prompts))]
        async with aclosing(self._updates()) as updates:
            async for update in updates:
                if isinstance(update, Delta):
                    choices[update.choice].add(update)
                elif isinstance(update, TextUsage):
                    usage = usage_info(update)
        shown: list[CompletionChoice] = []
        for number, prompt in enumerate(self.prompts):
            generated = choices[number * n : (number + 1) * n]
            kept = best(generated, self.body.n or 1) if self.body.is_selective else generated
            shown += await self._choices(prompt, kept, first_index=len(shown))
        answer = CompletionResponse(id=self.id, created=self.created, model=self.model, choices=shown, usage=usage)
        return await json_response(answer, is_large=self.body.num_prompt_logprobs is not None)

    async def stream(self) -> AsyncGenerator[str]:
        """The texts as events, as they grow; the usage last, when asked for."""
        begun: set[int] = set()
        async with aclosing(self._updates()) as updates:
            async for update in updates:
                match update:
                    case Progress():
                        yield sse.comment(update)
                    case Delta():
                        is_first = update.choice not in begun
                        begun.add(update.choice)
                        yield await self._event(update, is_first)
                    case TextUsage() if self.body.has_usage:
                        yield sse.event(self._chunk([], usage=usage_info(update)))
        yield sse.DONE

    async def _updates(self) -> AsyncGenerator[Progress | Delta | TextUsage]:
        """What comes from the engine; the prompts' scores are put where they belong."""
        requests = [prompt.request for prompt in self.prompts]
        async with aclosing(self.service.generate(requests, text_options(self.body))) as updates:
            async for update in updates:
                if isinstance(update, PromptScores):
                    self.prompts[update.request].scores = update.scores
                else:
                    yield update

    async def _choices(self, prompt: Prompt, kept: Sequence[Collected], first_index: int) -> list[CompletionChoice]:
        """One prompt's choices, which share what is told of the prompt."""
        echoed, scores = await self._echoed_logprobs(prompt), await self._prompt_logprobs(prompt)
        return [
            CompletionChoice(
                index=first_index + i,
                text=prompt.echo + choice.text,
                logprobs=self._logprobs(choice.tokens, echoed, len(prompt.echo)),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                prompt_logprobs=scores,
            )
            for i, choice in enumerate(kept)
        ]

    async def _event(self, delta: Delta, is_first: bool) -> str:
        prompt = self.prompts[delta.choice // self.body.num_choices]
        echoed = await self._echoed_logprobs(prompt) if is_first else None
        choice = CompletionChoice(
            index=delta.choice,
            text=prompt.echo + delta.text if is_first else delta.text,
            logprobs=self._logprobs(delta.tokens, echoed, len(prompt.echo)),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if not self.body.has_usage:
            return sse.event(self._chunk([choice]))
        num_prompt_tokens = len(prompt.request.prompt_token_ids)
        usage = usage_so_far(num_prompt_tokens, delta.num_tokens) if self.body.has_usage_throughout else None
        return sse.event(self._chunk([choice], usage=usage))

    def _chunk(self, choices: list[CompletionChoice], **usage: UsageInfo | None) -> CompletionResponse:
        return CompletionResponse(
            id=self.id, object="text_completion", created=self.created, model=self.model, choices=choices, **usage
        )

    async def _token_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            add = self.body.add_special_tokens is not False
            return await self.service.tokenizer.encode(prompt, add_special_tokens=add)
        check_token_ids(prompt, self.service, "prompt")
        return tuple(prompt)

    async def _echo(self, prompt: str | list[int]) -> str:
        """The prompt with `echo`, else nothing."""
        if not self.body.echo:
            return ""
        return prompt if isinstance(prompt, str) else await self.service.tokenizer.decode_off_loop(prompt)

    async def _echoed_logprobs(self, prompt: Prompt) -> CompletionLogprobs | None:
        if not self.body.echo or self.body.logprobs is None:
            return None
        token_ids = prompt.request.prompt_token_ids
        return await echoed_logprobs(token_ids, prompt.scores, self.service.tokenizer, self.body.logprobs)

    async def _prompt_logprobs(self, prompt: Prompt) -> PromptLogprobsByToken | None:
        if self.body.prompt_logprobs is None:
            return None
        return await prompt_logprobs(prompt.scores, self.service.tokenizer)

    def _logprobs(
        self, tokens: Sequence[ScoredToken], echoed: CompletionLogprobs | None, num_echoed_chars: int
    ) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        ours = completion_logprobs(tokens, self.service.tokenizer, self.body.logprobs)
        return followed_by(echoed, ours, num_echoed_chars)
