"""What may restrict a sequence's next token, such as a grammar; the engine knows only this protocol.

Made by the API, used on the engine thread: one object per sequence, since each has its own state.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class LogitsConstraint(Protocol):
    """The state of one sequence. Raises ValueError when it can no longer be satisfied: that request fails."""

    def allowed_tokens(self, vocab_size: int) -> NDArray[np.bool_]:
        """`[vocab_size]`: tokens that may come next. Never all false; only eos tokens once everything is said."""

    def accept(self, token_id: int) -> None:
        """The sampled token; call it once for each, eos tokens included."""
