"""Where the C++ core enters: loaded on first use, missed once in the log and counted.

Owns nothing but the answer to "is the core there". Any thread may call.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class CoreUse:
    """How often the core was asked for and missing; exported as a metric."""

    num_missed: int = 0


core_use = CoreUse()  # one process has one core


def core() -> ModuleType | None:
    """`retrieval._core`, or None where it was not built; the caller then takes its torch path."""
    module = _load()
    if module is None:
        core_use.num_missed += 1
    return module


@cache
def _load() -> ModuleType | None:
    try:
        return importlib.import_module("retrieval._core")
    except ImportError as error:
        logger.warning("the C++ core is missing (%s): attention runs in torch, and `rabitq` and `roar` are off", error)
        return None
