"""Puts an engine together from its settings. The one place where all its parts meet."""

from __future__ import annotations

import importlib.util
import logging

import torch

from retrieval import native
from retrieval.builder import IndexBuilder
from retrieval.context import StaticSet
from retrieval.decode import Decoder, NativeDecoder, TorchDecoder
from retrieval.index import kind_class
from retrieval.methods import make_method
from retrieval.probe import LiveProbe
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner, resolve_device
from server.engine.recorder import Recorder
from server.sessions.budget import Budget, default_host_budget
from server.sessions.manager import SessionManager

logger = logging.getLogger(__name__)

ATTENTION_AWARE = ("roar",)  # kinds that are built from sampled queries


def build_engine(config: EngineConfig, recorder: Recorder) -> Engine:
    """Load the model and make an engine that `start` sets going. Raises OSError or ValueError on a bad model."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    kind = resolve_index(config.index)
    num_queries = config.num_index_queries if kind in ATTENTION_AWARE else 0
    method = make_method(config.attention, num_retrieved=config.num_retrieved, num_index_queries=num_queries)
    runner = ModelRunner(config, method, make_decoder(config, recorder))
    builder = None
    if method.uses_index:
        kind_class(kind)  # a missing library is an error now, not on a background thread
        if config.live_recall_interval:
            runner.probe = LiveProbe(config.num_retrieved, runner.scale, recorder.live_recall)
        builder = IndexBuilder(kind, config.index_options, config.num_sink_tokens, recorder.index_build)
    static = StaticSet(config.num_sink_tokens, config.window_size, config.seal_tokens)
    budget = Budget(config.kv_host_memory or default_host_budget())
    manager = SessionManager(
        runner.geometry,
        static,
        builder,
        budget,
        recorder,
        device=runner.device,
        prefix_caching=config.prefix_caching,
    )
    return Engine(config, runner, manager, recorder)


def make_decoder(config: EngineConfig, recorder: Recorder) -> Decoder:
    """The C++ core's decoder on a CPU; torch's on other devices, or where the core was not built."""
    if resolve_device(config.device).type != "cpu":
        return TorchDecoder(config.num_retrieved)
    core = native.load()
    if core is None:
        recorder.degraded("no_native_core")
        return TorchDecoder(config.num_retrieved)
    if config.num_threads:
        core.set_num_threads(config.num_threads)
    return NativeDecoder(config.num_retrieved, core)


def resolve_index(kind: str) -> str:
    """`auto`: the native codes where the C++ core is installed, else hnswlib's graph."""
    if kind != "auto":
        return kind
    if importlib.util.find_spec("retrieval._core") is not None:
        return "rabitq"
    logger.warning("the C++ core is not installed; falling back to the hnsw index, which takes minutes to build")
    return "hnsw"
