"""Puts an engine together from its settings. The one place where all its parts meet."""

from __future__ import annotations

import logging
from typing import Any

import torch

from retrieval import native
from retrieval.builder import IndexBuilder
from retrieval.context import StaticSet
from retrieval.decode import Decoder, NativeDecoder, TorchDecoder
from retrieval.index import kind_class
from retrieval.methods import make_method
from retrieval.probe import LiveProbe
from retrieval.segment_index import CodesMaker
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner
from server.engine.recorder import Recorder
from server.sessions.budget import Budget, default_host_budget
from server.sessions.manager import SessionManager
from server.sessions.registry import SessionRegistry

logger = logging.getLogger(__name__)

ATTENTION_AWARE = ("roar",)  # kinds that are built from sampled queries
DEFAULT_NUM_RETRIEVED = 256  # for kinds that cannot tell how many keys matter
PROBED_KEYS = 100  # live recall is recall@100, as in the literature


def build_engine(config: EngineConfig, recorder: Recorder) -> Engine:
    """Load the model and make an engine that `start` sets going. Raises OSError or ValueError on a bad model."""
    core = load_core(config, recorder)
    kind = resolve_index(config.index, core)
    num_retrieved = config.num_retrieved or DEFAULT_NUM_RETRIEVED
    method = make_method(
        config.attention,
        num_retrieved=num_retrieved,
        num_index_queries=config.num_index_queries if kind in ATTENTION_AWARE else 0,
    )
    codes = make_codes(config, core) if kind == "rabitq" else None
    decoder: Decoder = TorchDecoder(num_retrieved)
    if core is not None:
        decoder = NativeDecoder(num_retrieved, core, codes.budget if codes else core.Budget())
    runner = ModelRunner(config, method, decoder)
    builder = None
    if method.uses_index:
        kind_class(kind)  # a missing library is an error now, not on a background thread
        builder = IndexBuilder(kind, config.index_options, config.num_sink_tokens, recorder.index_build, codes)
        if config.live_recall_interval:
            runner.probe = LiveProbe(PROBED_KEYS, runner.scale, recorder.live_recall)
    manager = SessionManager(
        runner.geometry,
        StaticSet(config.num_sink_tokens, config.window_size, config.seal_tokens),
        builder,
        Budget(config.kv_host_memory or default_host_budget()),
        recorder,
        device=runner.device,
        prefix_caching=config.prefix_caching,
        compacts=builder is None or kind not in ATTENTION_AWARE,
    )
    return Engine(config, runner, manager, SessionRegistry(manager, recorder), recorder)


def load_core(config: EngineConfig, recorder: Recorder) -> Any:
    """The C++ core, its threads set; None where it was not built."""
    core = native.core()
    if core is None:
        recorder.degraded("no_native_core")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
        if core is not None:
            core.set_num_threads(config.num_threads)
    return core


def make_codes(config: EngineConfig, core: Any) -> CodesMaker | None:
    """Layer codes for the native decoder, from the options that the index kind itself takes."""
    if core is None:
        return None
    options = dict(config.index_options)
    shape = {key: options.pop(key) for key in ("bits", "seed") if key in options}
    return CodesMaker(core, core.Budget(k=config.num_retrieved, **options), **shape)


def resolve_index(kind: str, core: Any) -> str:
    """`auto`: the native codes where the C++ core is at hand, else hnswlib's graph."""
    if kind != "auto":
        return kind
    if core is not None:
        return "rabitq"
    logger.warning("no C++ core here: falling back to the hnsw index, which takes minutes to build")
    return "hnsw"
