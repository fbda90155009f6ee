"""The host memory budget: what is reserved by running requests and held by segments. Pure bookkeeping."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def default_host_budget(share: float = 0.6) -> int:
    """Bytes: a share of the machine's memory, or of the cgroup's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            total = min(total, int(text))
    return int(share * total)


@dataclass(slots=True)
class Budget:
    """Reserved bytes never exceed the limit; idle segments fill what is left and give way to reservations."""

    limit_bytes: int
    reserved_bytes: int = 0  # worst case of running requests that no segment holds yet

    def fits_ever(self, num_bytes: int) -> bool:
        """Whether an empty server could run it."""
        return num_bytes <= self.limit_bytes

    def shortfall(self, num_bytes: int, held_bytes: int) -> int:
        """Bytes to free before `num_bytes` more can be reserved while segments hold `held_bytes`."""
        return max(0, self.reserved_bytes + held_bytes + num_bytes - self.limit_bytes)

    def reserve(self, num_bytes: int) -> None:
        """Take bytes; the caller has checked that they fit."""
        self.reserved_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Give bytes back."""
        self.reserved_bytes -= num_bytes
        assert self.reserved_bytes >= 0, "more was released than reserved"
