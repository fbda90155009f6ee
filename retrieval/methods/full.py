"""Full attention: every key, every step. The oracle of the other methods."""

from __future__ import annotations

from retrieval.context import Context, Run
from retrieval.methods.base import AttentionMethod


class FullAttention(AttentionMethod):
    """All positions, exactly."""

    name = "full"

    def select(self, context: Context) -> list[Run]:
        """Everything."""
        return context.runs(num_new=1)
