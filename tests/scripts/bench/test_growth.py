"""The growth benchmark end to end on small made-up vectors."""

from __future__ import annotations

import json

import pytest
import torch

from scripts.bench import growth as subject
from scripts.bench.index import set_threads

pytest.importorskip("retrieval._core")


def test_lengths_are_compared_kind_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    kinds = ["core:reach_products=4000000", "core:reach=0"]
    try:
        subject.main(["--lengths", "6000", "40000", "--heads", "0", "--rows", "3", "--repeats", "2", "--kinds", *kinds])
    finally:
        set_threads(before)
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"]
    assert [(row["name"], row["num_keys"]) for row in rows] == [(kind, n) for kind in kinds for n in (6000, 40000)]
    assert all(row["mass_mean"] > 0.99 for row in rows)
    assert rows[0]["growth"] == rows[2]["growth"] == 1.0
    assert rows[1]["kilobytes_read_per_query"] < rows[3]["kilobytes_read_per_query"]  # some runs are left out
