"""`POST /v1/completions`: prompts (text or token ids) in, their continuations out, at once or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter, Request, Response

from server.api import sse
from server.api.caller import Caller, CallerDep
from server.api.collected import Collected
from server.api.disconnect import unless_disconnected
from server.api.documentation import ERRORS, STREAM
from server.api.logprobs import completion_logprobs
from server.api.sampling import check_token_ids, engine_request, text_options
from server.api.service import Service, ServiceDep
from server.api.streaming import Delta, ScoredToken, TextUsage, Update
from server.api.structure import constraint
from server.api.usage import usage_info
from server.api.wire.completions import CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse
from server.api.wire.generation import UsageInfo
from server.engine.events import Progress
from server.engine.request import Request as EngineRequest

router = APIRouter()


@router.post("/v1/completions", responses={200: {"model": CompletionResponse, **STREAM}, **ERRORS})
async def create_completion(body: CompletionRequest, http: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Continues one or several prompts."""
    call = CompletionCall(body, service, service.check_model(body.model))
    requests = await call.engine_requests(caller)
    echoes = await call.echoes(requests)
    updates = service.generate(requests, text_options(body))
    if body.stream:
        return sse.EventStream(call.stream(updates, echoes), service.keepalive_seconds)
    return await unless_disconnected(http, call.collect(updates, echoes))


@dataclass(slots=True)
class CompletionCall:
    """One call: what its answer repeats in every part."""

    body: CompletionRequest
    service: Service
    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def engine_requests(self, caller: Caller) -> list[EngineRequest]:
        """One request per prompt, each with all of its choices."""
        requests = []
        make_constraint = await constraint(self.body, self.service)
        for index, prompt in enumerate(self.body.prompts):
            token_ids = await self._token_ids(prompt)
            request_id = f"{self.id}-{index}"
            requests.append(engine_request(self.body, token_ids, request_id, self.service, caller, make_constraint))
        return requests

    async def echoes(self, requests: list[EngineRequest]) -> list[str]:
        """What stands before each choice: its prompt with `echo`, else nothing."""
        texts = []
        for request, prompt in zip(requests, self.body.prompts, strict=True):
            if not self.body.echo:
                text = ""
            elif isinstance(prompt, str):
                text = prompt
            else:
                text = await self.service.tokenizer.decode_off_loop(request.prompt_token_ids)
            texts += [text] * request.sampling.n
        return texts

    async def collect(self, updates: AsyncGenerator[Update], echoes: list[str]) -> Response:
        """All texts as one JSON document."""
        choices = [Collected([echo]) for echo in echoes]
        async with aclosing(updates):
            async for update in updates:
                if isinstance(update, Delta):
                    choices[update.choice].add(update)
                elif isinstance(update, TextUsage):
                    usage = usage_info(update)
        answer = CompletionResponse(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[
                CompletionChoice(
                    index=index,
                    text=choice.text,
                    logprobs=self._logprobs(choice.tokens),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
        )
        return Response(answer.model_dump_json(), media_type="application/json")

    async def stream(self, updates: AsyncGenerator[Update], echoes: list[str]) -> AsyncGenerator[str]:
        """The texts as events, as they grow; the usage last, when asked for."""
        has_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        pending_echoes = dict(enumerate(echoes))
        async with aclosing(updates):
            async for update in updates:
                match update:
                    case Progress():
                        yield sse.comment(update)
                    case Delta():
                        yield self._event(update, pending_echoes.pop(update.choice, ""), has_usage)
                    case TextUsage() if has_usage:
                        yield sse.event(self._chunk([], usage=usage_info(update)))
        yield sse.DONE

    def _event(self, delta: Delta, echo: str, has_usage: bool) -> str:
        choice = CompletionChoice(
            index=delta.choice,
            text=echo + delta.text,
            logprobs=self._logprobs(delta.tokens),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        return sse.event(self._chunk([choice], usage=None) if has_usage else self._chunk([choice]))

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

    def _logprobs(self, tokens: list[ScoredToken] | tuple[ScoredToken, ...]) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        return completion_logprobs(tokens, self.service.tokenizer, self.body.logprobs)
