"""What the engine needs to know, as plain values; `server.config` fills it from YAML, environment and flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Field names are the configuration keys; `configs/default.yaml` holds the defaults and their reasons."""

    model: str  # folder or hub name
    revision: str | None = None
    dtype: str = "auto"  # auto (the checkpoint's), bfloat16, float16, float32
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    trust_remote_code: bool = False
    enforce_eager: bool = False  # run transformers' own forward even where the fused one knows the model
    seed: int = 0

    max_model_len: int | None = None  # tokens; None: the model's max_position_embeddings
    max_num_seqs: int = 16  # sequences running at once
    max_num_batched_tokens: int = 2048  # tokens of one step (decodes + one prefill chunk)
    max_queue_len: int = 256  # requests waiting
    max_queued_tokens: int | None = None  # prompt tokens waiting; None: no limit
    step_time_budget_ms: int = 100  # while others decode, a prefill chunk is sized to about this; 0: off

    attention: str = "retrieval"  # retrieval, full, streaming, snapkv
    index: str = "auto"  # auto (best the machine has), flat, ivf, pq, hnsw, roar, rabitq
    index_options: dict[str, Any] = field(default_factory=dict)
    num_sink_tokens: int = 128
    window_size: int = 512  # newest tokens, always attended exactly
    num_retrieved: int = 0  # keys fetched per head and query; 0: as many as matter (rabitq), 256 (other kinds)
    seal_tokens: int = 2048  # a tail longer than window_size + this is sealed and indexed
    num_index_queries: int = 8192  # prefill queries sampled per layer and KV head for attention-aware kinds
    live_recall_interval: int = 64  # decode steps between two exact checks, at least; 0: off

    kv_cache_dtype: str = "auto"  # auto (the model's dtype) or int8
    kv_host_memory: int = 0  # bytes for K, V and indexes in host memory; 0: from the machine
    kv_disk: int = 0  # bytes for them on disk; 0: half of what is free there
    kv_disk_path: str | None = None  # directory; None: nothing is kept on disk
    max_sessions: int = 1024  # names known at once that are neither pinned nor saved
    prefix_caching: bool = True  # reuse segments between requests
    num_threads: int = 0  # compute threads; 0: physical cores
