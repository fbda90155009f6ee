"""Prometheus metrics: the only place that knows prometheus_client.

Implements the engine's `Recorder`; called on the engine thread and on index build threads, read on the event loop.
Names follow vLLM's with the prefix `retrieval_`; base units; no ids as labels. One registry per instance.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.engine.recorder import Content, RequestTimes, Tier
from server.memory import Heap, resident_bytes

logger = logging.getLogger("server.metrics")

# A cold 128K prompt may take minutes on a CPU, a warm short one milliseconds.
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120)
_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 40)
_LAYER = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
_LENGTH = tuple(float(2**power) for power in range(0, 21, 2))
_SHARE = (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)


class Metrics:
    """Everything an operator can see, and the text Prometheus reads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._warned: set[str] = set()
        self._warned_lock = threading.Lock()
        self._heap = Heap()
        self._base_heap_bytes: int | None = None  # of the heap when the process held nothing of anybody
        self._define_requests()
        self._define_steps()
        self._define_retrieval()
        self._define_memory()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    # Definitions

    def _define_requests(self) -> None:
        self._running = self._gauge("num_requests_running", "Requests being answered.")
        self._waiting = self._gauge("num_requests_waiting", "Requests in the queue.")
        self._waiting_tokens = self._gauge("num_waiting_tokens", "Prompt tokens in the queue.")
        self._first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _LONG)
        self._inter_token = self._histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", _TOKEN)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to end.", _LONG)
        self._queue = self._histogram("request_queue_time_seconds", "Time in the queue.", _LONG)
        self._prefill = self._histogram("request_prefill_time_seconds", "Time of reading the prompt.", _LONG)
        self._decode = self._histogram("request_decode_time_seconds", "Time of generating.", _LONG)
        self._prompt_length = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _LENGTH)
        self._answer_length = self._histogram("request_generation_tokens", "Tokens generated for a request.", _LENGTH)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that were read to their end.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Those among them that were not read again.")
        self._generated_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._ended = self._counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self._preemptions = self._counter("num_preemptions", "Sequences put back into the queue.")
        for reason in ("stop", "length", "abort", "error"):
            self._ended.labels(reason)

    def _define_steps(self) -> None:
        self._step_seconds = self._histogram("step_seconds", "One forward pass over the packed batch.", _TOKEN)
        step_tokens = self._counter("step_tokens", "Tokens computed, by phase.", "phase")
        self._prefill_done = self._gauge("prefill_progress_tokens", "Tokens read of the prompts being read.")
        self._prefill_total = self._gauge("prefill_total_tokens", "Tokens of the prompts being read.")
        self._prefill_tokens, self._decode_tokens = (step_tokens.labels(p) for p in ("prefill", "decode"))

    def _define_retrieval(self) -> None:
        self._index_seconds = self._histogram("index_build_seconds", "Building a segment's indexes.", _LONG, "kind")
        self._index_pending = self._gauge("index_builds_pending", "Segments waiting for an index or being indexed.")
        self._indexed_keys = self._counter("index_keys", "Keys indexed, per segment.", "kind")
        self._layer_seconds = self._histogram("attention_layer_seconds", "Decode attention of one layer.", _LAYER)
        self._visible = self._counter("keys_visible", "Keys decode steps could see.")
        self._scored = self._counter("keys_scored", "Those whose score was computed exactly.")
        self._retrieved = self._counter("keys_retrieved", "Those an index returned.")
        self._recall = self._histogram("live_recall", "Found share of the exact top keys, on a sample.", _SHARE)
        self._mass = self._histogram("live_captured_mass", "Their share of softmax mass, on a sample.", _SHARE)
        self._last_recall = self._gauge("live_recall_last", "The newest sample of live recall.")
        self._last_mass = self._gauge("live_captured_mass_last", "The newest sample of captured mass.")

    def _define_memory(self) -> None:
        self._bytes = self._gauge("memory_bytes", "Bytes held, by tier and content.", "tier", "content")
        self._sessions = self._gauge("num_sessions", "Named sessions, by state.", "state")
        self._pinned = self._gauge("num_sessions_pinned", "Sessions whose context may not be evicted.")
        self._reserved = self._gauge("memory_reserved_bytes", "Promised to running requests and merges.", "tier")
        self._limit = self._gauge("memory_limit_bytes", "The budget for what is held and promised.", "tier")
        self._base = self._gauge("process_base_bytes", "Resident memory after warming up, with nothing held.")
        self._step = self._gauge("process_step_bytes", "Working memory of a full prefill step, taken while one runs.")
        resident = self._gauge("process_resident_bytes", "Resident memory of the process now.")
        resident.set_function(resident_bytes)
        self._bytes.labels("host", "heap").set_function(self._heap_growth)  # at the same moment as what is resident
        self._segments = self._gauge("segments", "Segments held, by tier.", "tier")
        self._compactions = self._histogram("compaction_seconds", "Merging a chain of segments into one.", _LONG)
        self._compacted_tokens = self._counter("compacted_tokens", "Tokens copied by merging segments.")
        self._disk_seconds = self._histogram(
            "disk_seconds", "Reading or writing a segment's files.", _LONG, "operation"
        )
        self._disk_bytes = self._counter("disk_bytes", "Bytes read or written.", "operation")
        self._evictions = self._counter("evictions", "Segments or indexes evicted.", "tier", "reason")
        self._evicted_bytes = self._counter("evicted_bytes", "Bytes evicted.", "tier", "reason")
        self._degraded = self._counter("degraded", "Times a degraded path ran.", "reason")
        self._segments.labels("host")
        for content in ("kv", "index", "staging", "step"):
            self._bytes.labels("host", content)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"retrieval_{name}", text, labels, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"retrieval_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"retrieval_{name}", text, labels, registry=self._registry, buckets=buckets)

    # Recorder

    def running(self, num_running: int, num_waiting: int, num_waiting_tokens: int) -> None:
        self._running.set(num_running)
        self._waiting.set(num_waiting)
        self._waiting_tokens.set(num_waiting_tokens)

    def step(self, seconds: float, num_decode_tokens: int, num_prefill_tokens: int) -> None:
        self._step_seconds.observe(seconds)
        self._decode_tokens.inc(num_decode_tokens)
        self._prefill_tokens.inc(num_prefill_tokens)

    def prefill_progress(self, num_done_tokens: int, num_total_tokens: int) -> None:
        self._prefill_done.set(num_done_tokens)
        self._prefill_total.set(num_total_tokens)

    def prompt(self, num_tokens: int, num_cached_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)
        self._cached_tokens.inc(num_cached_tokens)
        self._prompt_length.observe(num_tokens)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def ended(self, reason: str, num_generated_tokens: int, times: RequestTimes) -> None:
        self._ended.labels(reason).inc()
        self._generated_tokens.inc(num_generated_tokens)
        self._answer_length.observe(num_generated_tokens)
        self._e2e.observe(times.e2e_seconds)
        phases = (
            (self._queue, times.queue_seconds),
            (self._prefill, times.prefill_seconds),
            (self._decode, times.decode_seconds),
        )
        for histogram, seconds in phases:
            if seconds is not None:
                histogram.observe(seconds)

    def preemption(self) -> None:
        self._preemptions.inc()

    def index_build(self, kind: str, seconds: float, num_keys: int) -> None:
        self._index_seconds.labels(kind).observe(seconds)
        self._indexed_keys.labels(kind).inc(num_keys)

    def index_builds_pending(self, num_segments: int) -> None:
        self._index_pending.set(num_segments)

    def compaction(self, num_segments: int, num_tokens: int, seconds: float) -> None:
        self._compactions.observe(seconds)
        self._compacted_tokens.inc(num_tokens)

    def disk(self, operation: Literal["read", "write"], num_bytes: int, seconds: float) -> None:
        self._disk_seconds.labels(operation).observe(seconds)
        self._disk_bytes.labels(operation).inc(num_bytes)

    def attention(self, layer_seconds: float, num_visible: int, num_scored: int, num_retrieved: int) -> None:
        self._layer_seconds.observe(layer_seconds)
        self._visible.inc(num_visible)
        self._scored.inc(num_scored)
        self._retrieved.inc(num_retrieved)

    def live_recall(self, recall: float, captured_mass: float) -> None:
        self._recall.observe(recall)
        self._mass.observe(captured_mass)
        self._last_recall.set(recall)
        self._last_mass.set(captured_mass)

    def memory(self, tier: Tier, content: Content, num_bytes: int) -> None:
        self._bytes.labels(tier, content).set(num_bytes)

    def memory_budget(self, tier: Tier, num_reserved_bytes: int, limit_bytes: int) -> None:
        self._reserved.labels(tier).set(num_reserved_bytes)
        self._limit.labels(tier).set(limit_bytes)

    def process_base(self, num_bytes: int, step_bytes: int) -> None:
        """Resident memory of the process before it holds anything of anybody, and what a full step takes besides."""
        self._base.set(num_bytes)
        self._step.set(step_bytes)
        self._base_heap_bytes = self._heap.resident_bytes()

    def _heap_growth(self) -> int:
        """Small blocks of whatever owner and the holes between them, beyond what there was at the start."""
        if self._base_heap_bytes is None:
            return 0
        return max(0, self._heap.resident_bytes() - self._base_heap_bytes)

    def segments(self, tier: Tier, num_segments: int) -> None:
        self._segments.labels(tier).set(num_segments)

    def sessions(self, num_by_state: Mapping[str, int], num_pinned: int) -> None:
        for state, number in num_by_state.items():
            self._sessions.labels(state).set(number)
        self._pinned.set(num_pinned)

    def eviction(self, tier: Tier, reason: str, num_bytes: int) -> None:
        self._evictions.labels(tier, reason).inc()
        self._evicted_bytes.labels(tier, reason).inc(num_bytes)

    def degraded(self, reason: str) -> None:
        self._degraded.labels(reason).inc()
        with self._warned_lock:
            is_new = reason not in self._warned
            self._warned.add(reason)
        if is_new:
            logger.warning("degraded: %s", reason)
