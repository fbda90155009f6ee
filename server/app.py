"""Puts the HTTP application together: routers, middleware, error handlers."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from server.api import chat, completions, errors, messages, models, ops, responses, sessions, tokenize
from server.api.face import EngineFace
from server.api.middleware import REQUEST_ID, ApiKeys, BodyLimit, Defects, KeyConcurrency, RequestId
from server.api.sampling import MODEL_DEFAULTS
from server.api.service import Service
from server.config import Settings
from server.engine.grammar import GrammarCompiler
from server.engine.tokenizer import Tokenizer
from server.metrics import Metrics


def create_app(settings: Settings, engine: EngineFace, tokenizer: Tokenizer, metrics: Metrics) -> FastAPI:
    """The application over an engine and a tokenizer, which whoever made them starts and stops.

    Makes no global state: several apps may live in one process.
    """

    app = FastAPI(title="retrieval-server", version=package_version(), docs_url=None, redoc_url=None)
    app.state.service = _service(settings, engine, tokenizer, metrics)
    errors.install(app)
    for module in (chat, completions, responses, messages, sessions, models, tokenize, ops):
        app.include_router(module.router)
    _add_middleware(app, settings)
    return app


def package_version() -> str:
    """The installed version; `0+source` when run from a folder that was never installed."""
    try:
        return version("retrieval-server")
    except PackageNotFoundError:
        return "0+source"


def _service(settings: Settings, engine: EngineFace, tokenizer: Tokenizer, metrics: Metrics) -> Service:
    defaults = tokenizer.generation_config
    return Service(
        engine=engine,
        tokenizer=tokenizer,
        model_names=settings.model_names,
        render_metrics=metrics.render,
        version=package_version(),
        created=int(time.time()),
        request_timeout_seconds=settings.request_timeout or None,
        keepalive_seconds=settings.sse_keepalive_seconds,
        tool_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
        grammars=GrammarCompiler(tokenizer),
        sampling_defaults={name: defaults[name] for name in MODEL_DEFAULTS if defaults.get(name) is not None},
    )


def _add_middleware(app: FastAPI, settings: Settings) -> None:
    """The last one added sees a call first."""
    app.add_middleware(Defects)
    app.add_middleware(BodyLimit, max_bytes=int(settings.max_body_bytes))
    if settings.api_keys:
        if settings.max_concurrency_per_key:
            app.add_middleware(KeyConcurrency, limit=settings.max_concurrency_per_key)
        open_paths = ("/health", "/metrics") if settings.open_metrics else ("/health",)
        app.add_middleware(ApiKeys, keys=settings.api_keys, open_paths=open_paths)
    if settings.cors_allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_allow_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID],
        )
    app.add_middleware(RequestId)
