"""What the engine reports for metrics, as a protocol: the engine never imports prometheus_client.

Called on the engine thread (and on index build threads); implementations must be thread-safe and cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Tier = Literal["device", "host", "disk"]
Content = Literal["kv", "index", "staging", "step"]  # staging: in the making; step: what computing takes


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Seconds of one ended request; None where it never got there."""

    queue_seconds: float | None
    prefill_seconds: float | None
    decode_seconds: float | None
    e2e_seconds: float


class Recorder(Protocol):
    """Receives what happened; one method per fact."""

    def running(self, num_running: int, num_waiting: int, num_waiting_tokens: int) -> None:
        """Requests running and waiting now, after every step."""

    def step(self, seconds: float, num_decode_tokens: int, num_prefill_tokens: int) -> None:
        """One step ran."""

    def prefill_progress(self, num_done_tokens: int, num_total_tokens: int) -> None:
        """Tokens prefilled and wanted over all running prefills; (0, 0) when none runs."""

    def prompt(self, num_tokens: int, num_cached_tokens: int) -> None:
        """A prompt was read to its end."""

    def first_token(self, seconds: float) -> None:
        """Seconds from arrival to the first token."""

    def inter_token(self, seconds: float) -> None:
        """Seconds between two tokens of one sequence."""

    def ended(self, reason: str, num_generated_tokens: int, times: RequestTimes) -> None:
        """A request ended: stop, length, abort or error."""

    def preemption(self) -> None:
        """A running sequence was put back into the queue."""

    def index_build(self, kind: str, seconds: float, num_keys: int) -> None:
        """An index over one segment (all layers and heads) was built."""

    def index_builds_pending(self, num_segments: int) -> None:
        """Segments queued for an index or being indexed now."""

    def compaction(self, num_segments: int, num_tokens: int, seconds: float) -> None:
        """A chain of segments was merged into one."""

    def disk(self, operation: Literal["read", "write"], num_bytes: int, seconds: float) -> None:
        """A segment was read from disk and checked, or written and synced."""

    def attention(self, layer_seconds: float, num_visible: int, num_scored: int, num_retrieved: int) -> None:
        """Decode attention of one layer in one step: seconds, keys visible / scored exactly / retrieved."""

    def live_recall(self, recall: float, captured_mass: float) -> None:
        """One sampled layer and head, also searched exactly."""

    def memory(self, tier: Tier, content: Content, num_bytes: int) -> None:
        """Bytes held now in one tier by one kind of content."""

    def memory_budget(self, tier: Tier, num_reserved_bytes: int, limit_bytes: int) -> None:
        """Bytes promised to running requests beyond what segments hold, and the most that both may be."""

    def segments(self, tier: Tier, num_segments: int) -> None:
        """Segments held now in one tier."""

    def sessions(self, num_by_state: Mapping[str, int], num_pinned: int) -> None:
        """Named sessions now, in each of their states, and those pinned among them."""

    def eviction(self, tier: Tier, reason: str, num_bytes: int) -> None:
        """A segment, or its index, left a tier."""

    def degraded(self, reason: str) -> None:
        """A degraded path ran (no C++ core, damaged file): counted, and logged once."""


class NullRecorder:
    """Ignores everything: for tests and scripts."""

    def running(self, num_running: int, num_waiting: int, num_waiting_tokens: int) -> None: ...
    def step(self, seconds: float, num_decode_tokens: int, num_prefill_tokens: int) -> None: ...
    def prefill_progress(self, num_done_tokens: int, num_total_tokens: int) -> None: ...
    def prompt(self, num_tokens: int, num_cached_tokens: int) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def inter_token(self, seconds: float) -> None: ...
    def ended(self, reason: str, num_generated_tokens: int, times: RequestTimes) -> None: ...
    def preemption(self) -> None: ...
    def index_build(self, kind: str, seconds: float, num_keys: int) -> None: ...
    def index_builds_pending(self, num_segments: int) -> None: ...
    def compaction(self, num_segments: int, num_tokens: int, seconds: float) -> None: ...
    def disk(self, operation: Literal["read", "write"], num_bytes: int, seconds: float) -> None: ...
    def attention(self, layer_seconds: float, num_visible: int, num_scored: int, num_retrieved: int) -> None: ...
    def live_recall(self, recall: float, captured_mass: float) -> None: ...
    def memory(self, tier: Tier, content: Content, num_bytes: int) -> None: ...
    def memory_budget(self, tier: Tier, num_reserved_bytes: int, limit_bytes: int) -> None: ...
    def segments(self, tier: Tier, num_segments: int) -> None: ...
    def sessions(self, num_by_state: Mapping[str, int], num_pinned: int) -> None: ...
    def eviction(self, tier: Tier, reason: str, num_bytes: int) -> None: ...
    def degraded(self, reason: str) -> None: ...
