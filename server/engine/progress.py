"""Shows how far long prefills are: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time

logger = logging.getLogger(__name__)

LONG_PROMPT_TOKENS = 8192  # shorter prefills are over before a bar is read
BAR_WIDTH = 30


class PrefillProgress:
    """Throttled; one instance per engine."""

    def __init__(self, interval_seconds: float = 5.0) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._interval = 0.2 if self._is_terminal else interval_seconds
        self._last = 0.0

    def show(self, request_id: str, num_done: int, num_total: int) -> None:
        """Report one prefill; the last report of each is always shown."""
        now = time.monotonic()
        if num_total < LONG_PROMPT_TOKENS or (now - self._last < self._interval and num_done < num_total):
            return
        self._last = now
        line = f"prefill {request_id} {progress_bar(num_done, num_total)}"
        if self._is_terminal:
            sys.stderr.write("\r" + line + ("\n" if num_done >= num_total else ""))
            sys.stderr.flush()
        else:
            logger.info(line)


def progress_bar(num_done: int, num_total: int) -> str:
    """`[#####.....] 65536/131072 tokens (50 %)`."""
    filled = BAR_WIDTH * num_done // max(1, num_total)
    bar = "#" * filled + "." * (BAR_WIDTH - filled)
    return f"[{bar}] {num_done}/{num_total} tokens ({100 * num_done // max(1, num_total)} %)"
