"""Puts an engine together from its settings. The one place where all its parts meet."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from retrieval import native
from retrieval.builder import IndexBuilder
from retrieval.context import StaticSet
from retrieval.decode import Decoder, NativeDecoder, TorchDecoder
from retrieval.index import kind_class
from retrieval.index_files import IndexFiles
from retrieval.methods import make_method
from retrieval.probe import LiveProbe
from retrieval.segment_index import CodesMaker
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner
from server.engine.recorder import Recorder
from server.sessions.budget import Budget, default_host_budget
from server.sessions.disk import Disk, open_disk
from server.sessions.disk_files import DiskLockedError
from server.sessions.manager import SessionManager
from server.sessions.records import SessionRecords
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
    files = IndexFiles(kind, config.index_options, config.num_sink_tokens, codes) if builder is not None else None
    disk = open_disk_tier(config, runner, files, recorder)
    manager = SessionManager(
        runner.geometry,
        StaticSet(config.num_sink_tokens, config.window_size, config.seal_tokens),
        builder,
        Budget(config.kv_host_memory or default_host_budget()),
        recorder,
        device=runner.device,
        prefix_caching=config.prefix_caching,
        compacts=builder is None or kind not in ATTENTION_AWARE,
        disk=disk,
    )
    records = SessionRecords(disk.folder / "sessions", disk.model) if disk is not None else None
    sessions = SessionRegistry(manager, recorder, max_sessions=config.max_sessions, records=records)
    return Engine(config, runner, manager, sessions, recorder)


def open_disk_tier(
    config: EngineConfig, runner: ModelRunner, indexes: IndexFiles | None, recorder: Recorder
) -> Disk | None:
    """The disk tier, where one is asked for; a directory that cannot be used is counted, one in use is an error."""
    if config.kv_disk_path is None or not config.prefix_caching:
        return None
    started, directory = time.perf_counter(), Path(config.kv_disk_path)
    try:
        disk = open_disk(
            directory,
            config.kv_disk,
            runner.fingerprint(),
            runner.geometry,
            indexes,
            recorder,
            pin_memory=runner.device.type == "cuda",
        )
    except DiskLockedError:
        raise
    except OSError as error:
        logger.warning("nothing will be kept on disk: %s", error)
        recorder.degraded("kv_disk_unusable")
        return None
    seconds, stats = time.perf_counter() - started, disk.stats()
    logger.info("found %d segments in %s, %.1f s", stats.num_segments, directory, seconds)
    return disk


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
