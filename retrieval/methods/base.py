"""What an attention method decides: which positions a decode step sees. Prefill is exact for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from retrieval.context import Context, Run


class AttentionMethod(ABC):
    """Chooses the key set of decode steps; one override each, two hooks for those that watch the prefill."""

    name: ClassVar[str]
    uses_index: ClassVar[bool] = False

    @abstractmethod
    def select(self, context: Context) -> list[Run]:
        """Disjoint runs the newest token attends to; it is written to the tail but not committed yet."""

    def observe(self, context: Context, layer_idx: int, queries: Tensor) -> None:  # noqa: B027 - a hook, not a duty
        """See the queries `[num_q_heads, n, head_dim]` of a prefill chunk, before it is committed."""

    def prefill_done(self, context: Context, scale: float) -> None:  # noqa: B027 - a hook, not a duty
        """The whole prompt is committed (and not sealed yet); decoding follows."""


def clip_runs(runs: list[Run], first: int, end: int | None = None) -> list[Run]:
    """Only positions from absolute position `first` on, before `end` if given; `runs` cover 0 .. in order."""
    clipped, offset = [], 0
    for run in runs:
        begin = max(run.begin, run.begin + first - offset)
        stop = run.end if end is None else min(run.end, run.begin + end - offset)
        if begin < stop:
            clipped.append(Run(run.kv, begin, stop, run.indexed))
        offset += run.end - run.begin
    return clipped
