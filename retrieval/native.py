"""Where the C++ core enters: loaded on first use, missed once in the log.

Any thread may call. Who wants to count a missing core does so where it is asked for.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

logger = logging.getLogger(__name__)


@cache
def core() -> ModuleType | None:
    """`retrieval._core`, or None where it was not built; the caller then takes its torch path."""
    try:
        return importlib.import_module("retrieval._core")
    except ImportError as error:
        logger.warning("the C++ core is missing (%s): attention runs in torch, and `rabitq` and `roar` are off", error)
        return None
