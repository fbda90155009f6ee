"""Where the C++ core enters: loaded on first use, missed once in the log.

Any thread may call. Who wants to count a missing core does so where it is asked for.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)


@cache
def core() -> ModuleType | None:
    """`retrieval._core`, or None where it was not built; the caller then takes its torch path."""
    try:
        return importlib.import_module("retrieval._core")
    except ImportError as error:
        logger.warning("the C++ core is missing (%s): attention runs in torch, and `rabitq` and `roar` are off", error)
        return None


class Lent:
    """A tensor as the core takes it, at a third of the cost: torch's own `__dlpack__` checks for other libraries what
    here is known."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return to_dlpack(self._tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # the CPU
