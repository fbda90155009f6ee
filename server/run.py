"""One serving process: loads the model, listens, drains on a signal, and ends when the engine is dead."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable

import uvicorn

from server import memory
from server.api.face import EngineFace
from server.app import create_app
from server.config import Settings
from server.engine.build import build_engine
from server.engine.engine import Engine
from server.engine.tokenizer import Tokenizer
from server.metrics import Metrics
from server.rehearsal import AsgiApp, EchoEngine, rehearse

logger = logging.getLogger("server")

DEAD_ENGINE_SECONDS = 5.0  # /health answers 503 for so long before the process ends: probes notice first


def run(settings: Settings) -> int:
    """Exit status: 0 after a signal, 1 when the model cannot be loaded or the engine died."""
    metrics = Metrics()
    engine_config = settings.engine_config()
    try:
        tokenizer = Tokenizer.load(
            engine_config.model,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            chat_template_file=settings.chat_template,
        )
        engine = build_engine(engine_config, metrics)
    except (OSError, ValueError) as error:
        logger.error("cannot load %s: %s", engine_config.model, error)
        return 1
    engine.start()
    uvicorn_config = _uvicorn_config(settings, create_app(settings, engine, tokenizer, metrics))
    uvicorn_config.load()
    rehearsed = create_app(settings, EchoEngine(engine), tokenizer, metrics)
    api_key = next(iter(settings.api_keys), None)
    with asyncio.Runner(loop_factory=uvicorn_config.get_loop_factory()) as runner:
        step_bytes = runner.run(_warm_up(engine, rehearsed, api_key))
    del rehearsed
    trimmer = memory.Trimmer()

    def begin() -> None:
        gc.collect()
        gc.freeze()  # what was loaded stays: full collections, which stop every stream, need not look at it
        memory.trim()
        base_bytes = memory.resident_bytes()
        metrics.process_base(base_bytes, step_bytes)
        engine.count_from(base_bytes)
        trimmer.start()

    server = DrainingServer(uvicorn_config, engine, settings.drain_timeout, begin)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has drained
        signal.signal(number, lambda *_: None)
    server.run()
    trimmer.close()
    tokenizer.close()
    return server.exit_code


class DrainingServer(uvicorn.Server):
    """Lets the engine drain while connections close, and stops serving some time after the engine's death."""

    def __init__(
        self,
        uvicorn_config: uvicorn.Config,
        engine: EngineFace,
        drain_seconds: float,
        on_started: Callable[[], None] = lambda: None,
    ) -> None:
        """on_started: called when the server listens and has answered nobody."""
        super().__init__(uvicorn_config)
        self._on_started = on_started
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._dead_since: float | None = None
        self.exit_code = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        if self.started:
            self._on_started()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; true ends the process."""
        return await super().on_tick(counter) or self._is_dead_for_long()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Streams finish or fail within the drain time, and with them their connections."""
        drain = asyncio.create_task(self._engine.stop(self._drain_seconds))
        await super().shutdown(sockets)
        await drain

    def _is_dead_for_long(self) -> bool:
        if self._engine.is_alive:
            return False
        now = asyncio.get_running_loop().time()
        if self._dead_since is None:
            logger.critical("the engine is dead; ending in %g seconds", DEAD_ENGINE_SECONDS)
            self._dead_since, self.exit_code = now, 1
        return now - self._dead_since >= DEAD_ENGINE_SECONDS


async def _warm_up(engine: Engine, rehearsed: AsgiApp, api_key: str | None) -> int:
    """What is resident afterwards is the process' base; a failure here is one that requests will show.

    Returns the working memory of a full step.
    """
    started, step_bytes = time.perf_counter(), 0
    try:
        step_bytes = await engine.warm_up()
        await rehearse(rehearsed, api_key)
    except Exception:
        logger.exception("warming up failed")
    logger.info("warmed up in %.1f s", time.perf_counter() - started)
    return step_bytes


def _uvicorn_config(settings: Settings, app: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=settings.host,
        port=settings.port,
        log_level=settings.uvicorn_log_level,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
        timeout_graceful_shutdown=int(settings.drain_timeout) + 10,  # only for connections that ignore the end
        server_header=False,
    )
