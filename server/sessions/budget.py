"""The host memory budget: what is reserved by running requests and held by segments. Pure bookkeeping."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def default_host_budget(share: float = 0.6, root: Path = Path("/")) -> int:
    """Bytes: a share of the machine's memory, or of the lowest limit of the cgroups that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(share * min([total, *_cgroup_limits(root)]))


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Memory limits from our own cgroup up to the top, of version 2 and 1; a container may see its own as the top."""
    mount, own = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    names = [mount / "memory.max", mount / "memory/memory.limit_in_bytes"]
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (mount / "memory", "memory.limit_in_bytes") if controllers else (mount, "memory.max")
        group = base / path.lstrip("/")
        names += [parent / name for parent in (group, *group.parents) if parent.is_relative_to(base)]
    for file in names:
        text = file.read_text().strip() if file.is_file() else ""
        if text.isdigit():
            yield int(text)


@dataclass(slots=True)
class Budget:
    """Reserved bytes never exceed the limit; idle segments fill what is left and give way to reservations."""

    limit_bytes: int
    reserved_bytes: int = 0  # worst case of running requests that no segment holds yet
    overhead_bytes: int = 0  # what the process takes besides, as last seen; idle segments give way to it

    def fits_ever(self, num_bytes: int) -> bool:
        """Whether an empty server could run it."""
        return num_bytes <= self.limit_bytes

    def shortfall(self, num_bytes: int, held_bytes: int) -> int:
        """Bytes to free before `num_bytes` more can be reserved while segments hold `held_bytes`."""
        return max(0, self.reserved_bytes + held_bytes + num_bytes - self.limit_bytes)

    def excess(self, held_bytes: int) -> int:
        """Bytes of idle segments that should go, the overhead counted: it evicts, but refuses nobody."""
        return self.shortfall(min(self.overhead_bytes, self.limit_bytes // 4), held_bytes)

    def reserve(self, num_bytes: int) -> None:
        """Take bytes; the caller has checked that they fit."""
        self.reserved_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Give bytes back."""
        self.reserved_bytes -= num_bytes
        assert self.reserved_bytes >= 0, "more was released than reserved"
