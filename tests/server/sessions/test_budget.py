"""Arithmetic of the host memory budget."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.sessions.budget import Budget, default_host_budget


def test_shortfall_counts_reservations_and_segments() -> None:
    budget = Budget(100)
    budget.reserve(30)
    assert budget.shortfall(40, held_bytes=30) == 0
    assert budget.shortfall(41, held_bytes=30) == 1
    assert budget.shortfall(0, held_bytes=90) == 20


def test_what_is_released_can_be_reserved_again() -> None:
    budget = Budget(100)
    for _ in range(5):
        assert budget.shortfall(100, held_bytes=0) == 0
        budget.reserve(100)
        assert budget.shortfall(1, held_bytes=0) == 1
        budget.release(100)
    assert budget.reserved_bytes == 0


def test_releasing_more_than_was_reserved_is_our_own_mistake() -> None:
    budget = Budget(100)
    budget.reserve(10)
    with pytest.raises(AssertionError):
        budget.release(11)


def test_what_exceeds_the_limit_never_fits() -> None:
    assert Budget(100).fits_ever(100)
    assert not Budget(100).fits_ever(101)


def test_the_default_is_a_share_of_the_machine() -> None:
    whole, half = default_host_budget(1.0), default_host_budget(0.5)
    assert 0 < half <= whole
    assert half == pytest.approx(whole / 2, abs=1)


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("", {}, None),
        ("0::/\n", {"memory.max": "1000"}, 600),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/a/b\n", {"a/memory.max": "2000", "a/b/memory.max": "max"}, 1200),
        ("3:cpu:/x\n4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "3000", "cpu/memory.max": "1"}, 1800),
        ("4:cpu,memory:/gone\n", {"memory/memory.limit_in_bytes": "4000"}, 2400),
    ],
)
def test_the_lowest_limit_of_our_cgroups_counts(
    tmp_path: Path, own: str, limits: dict[str, str], expected: int | None
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(own)
    for name, text in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    machine = int(0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    assert default_host_budget(root=tmp_path) == (expected if expected is not None else machine)
