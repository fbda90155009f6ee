"""StreamingLLM (arXiv 2309.17453): sink and window only; what lies between is never seen."""

from __future__ import annotations

from retrieval.context import Context, Run
from retrieval.methods.base import AttentionMethod, clip_runs


class StreamingAttention(AttentionMethod):
    """Sink and window. Deviation: positions are the true ones, not renumbered within the cache."""

    name = "streaming"

    def select(self, context: Context) -> list[Run]:
        """The first `num_sink_tokens` and the last `window_size` positions, present token included."""
        runs = context.runs(num_new=1)
        window_begin = context.num_tokens + 1 - context.static.window_size
        if window_begin <= context.static.num_sink_tokens:
            return runs
        return [*clip_runs(runs, 0, context.static.num_sink_tokens), *clip_runs(runs, window_begin)]
