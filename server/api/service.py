"""What every endpoint needs: the engine, the tokenizer, the model's names and the limits. One per app."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import Depends, Request

from server.api.face import EngineFace
from server.api.streaming import TextOptions, Update, generate
from server.engine.grammar import GrammarCompiler
from server.engine.request import Request as EngineRequest
from server.engine.tokenizer import Tokenizer
from server.errors import NotFoundError

ToolParserName = Literal["auto", "hermes", "llama3_json"]
ReasoningParserName = Literal["auto", "think", "none"]


@dataclass(frozen=True, slots=True)
class Service:
    """Shared by all requests; made by `server.app`."""

    engine: EngineFace
    tokenizer: Tokenizer
    grammars: GrammarCompiler
    model_names: tuple[str, ...]  # the reported one first
    render_metrics: Callable[[], bytes]
    version: str
    created: int  # seconds since 1970, when the model was loaded
    request_timeout_seconds: float | None = None
    keepalive_seconds: float = 5.0
    tool_parser: ToolParserName = "auto"
    reasoning_parser: ReasoningParserName = "auto"
    sampling_defaults: dict[str, float] = field(default_factory=dict)

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises NotFoundError for one that is not served."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            raise NotFoundError(f"the model '{name}' does not exist", code="model_not_found", param="model")
        return name

    def generate(self, requests: Sequence[EngineRequest], options: TextOptions) -> AsyncGenerator[Update]:
        """Runs the requests together; see `streaming.generate`."""
        return generate(self.engine, self.tokenizer, requests, options, self.request_timeout_seconds)


async def _service(request: Request) -> Service:  # async, or every request would hop to a thread for it
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]
