"""The index benchmark end to end on small made-up vectors, and the figures it derives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts.bench import index as subject
from scripts.bench.index_bench import report
from scripts.bench.index_bench.contestants import Plan, make
from scripts.bench.index_bench.layers import captured_layers, query_key_gap, spread, synthetic_layers
from scripts.bench.index_bench.measure import Result, exact_answers, measure_quality


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    subject.main(["--num-keys", "4000", "--heads", "0", "--rows", "3", "--repeats", "2", "--threads", "1", *argv])
    lines = capsys.readouterr().out.strip().splitlines()
    return {"table": "\n".join(lines[:-1]), **json.loads(lines[-1])}


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    subject.set_threads(before)


def test_benchmark_shows_every_kind_on_both_sets(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["sdpa", "sdpa:grouped=1", "flat", "ivf:num_probes=8", "ivf", "pq", "hnsw"]
    shown = run(capsys, "--kinds", *kinds)
    assert set(shown["results"]) == {"same", "later"}
    assert {"commit", "hardware", "config", "vectors", "query_key_gap"} <= set(shown)
    for rows in shown["results"].values():
        assert [row["name"] for row in rows] == kinds
        by_name = {row["name"]: row for row in rows}
        assert by_name["sdpa"]["error_worst"] < 0.02  # bfloat16
        assert by_name["flat"]["recall"] == pytest.approx(1.0)
        assert by_name["flat"]["mass_worst"] == pytest.approx(1.0, abs=1e-4)
        assert by_name["flat"]["share_scored"] == 1.0
        assert by_name["flat"]["times_flat"] == 1.0
        assert by_name["ivf"]["share_scored"] < 0.5
        assert by_name["hnsw"]["mass_mean"] > 0.8
        assert all(row["build_seconds_per_layer"] >= 0 for row in rows)
    assert "same prompt" in shown["table"]
    assert "asked later" in shown["table"]


def test_core_over_all_keys_is_full_attention(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("retrieval._core")
    shown = run(capsys, "--kinds", "core:bits=0", "core:k=100")
    for exact, by_codes in shown["results"].values():
        assert exact["error_worst"] < 5e-3  # the static set is attended in bfloat16
        assert by_codes["mass_mean"] > 0.99


def test_the_library_to_beat_and_the_relations_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("retrieval._core")
    shown = run(capsys, "--kinds", "faiss_rabitq", "faiss_rabitq:bits=4,num_rescored=4000", "core:bits=0", "core")
    for rows in shown["results"].values():
        library, everything, _, core = rows
        assert 0.5 < library["recall"] <= everything["recall"] == pytest.approx(1.0)
        assert library["share_scored"] == pytest.approx(500 / 3360)
        assert 0.05 < library["bytes_of_kv"] < 0.2
        assert library["times_faiss_rabitq"] == 1.0
        assert library["layer_cpu_us"] > 0
        assert core["times_faiss_rabitq"] > 0
    assert "faiss's IndexRaBitQFastScan" in shown["table"]


def test_retrieving_everything_leaves_no_error() -> None:
    _, layers = synthetic_layers(3000, None, [0], 2, gap=2.0, seed=0)
    layer = next(layers)
    contestant = make("flat", layer, Plan(num_retrieved=3000, num_sink=10, window=20))
    truth, result = exact_answers(layer, layer.asked["later"], contestant.indexed), Result("flat")
    measure_quality(contestant, layer.asked["later"], truth, result)
    assert float(torch.cat(result.error).max()) < 5e-3  # the static set is attended in bfloat16
    assert result.cost.num_retrieved == 8 * 2970


def test_gap_of_synthetic_queries_grows_with_the_option() -> None:
    gaps = []
    for gap in (1.0, 4.0):
        _, layers = synthetic_layers(4000, None, [0], 50, gap=gap, seed=0)
        gaps.append(query_key_gap(next(layers), "later"))
    assert gaps[0] < 4
    assert gaps[1] > 2 * gaps[0]


def test_captured_layers_keep_the_chosen_heads_with_their_queries(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    heads = torch.arange(4.0)[:, None, None].expand(4, 30, 8)  # query head's number everywhere
    tensors = {f"{name}.0": heads.contiguous() for name in ("train", "same", "later")}
    tensors |= {
        f"{name}.0": torch.arange(2.0)[:, None, None].expand(2, 50, 8).contiguous() for name in ("keys", "values")
    }
    about = {"num_layers": 1, "scale": 0.5}
    save_file(tensors, tmp_path / "file", metadata={"capture": json.dumps(about)})
    found, layers = captured_layers(tmp_path / "file", None, [1], num_rows=7)
    (layer,) = layers
    assert found == about
    assert layer.keys.unique().tolist() == [1.0]
    assert layer.asked["later"].shape == (2, 7, 8)
    assert layer.asked["later"].unique().tolist() == [2.0, 3.0]
    assert layer.train.shape == (2, 30, 8)


def test_spread_takes_first_and_last() -> None:
    rows = torch.arange(10.0)[None, :, None]
    assert spread(rows, 3).flatten().tolist() == [0.0, 4.0, 9.0]
    assert spread(rows, 20).shape[1] == 10


def test_ratios_hold_equal_quality_against_each_other() -> None:
    def row(name: str, mass: float, time: float) -> dict:
        return {"name": name, "mass_mean": mass, "layer_us_p50": time}

    rows = [{"name": "sdpa", "layer_us_p50": 200.0}, row("flat", 1.0, 100.0), row("core:bits=0", 1.0, 50.0)]
    rows += [row("ivf:num_probes=8", 0.9, 10.0), row("ivf", 0.99, 40.0), row("core", 0.95, 5.0)]
    report.add_ratios(rows)
    core = rows[-1]
    assert core["times_flat"] == 10.0  # the core's own scan
    assert core["times_sdpa"] == 40.0
    assert core["times_ivf"] == 8.0  # the faster list scan misses too much


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {
        "name": "flat",
        "mass_mean": 1.0,
        "mass_worst": 0.9,
        "layer_us_p50": 10.0,
        "recall": 1.0,
        "share_scored": 1.0,
    }
    (path,) = report.plot({"same": [row], "later": [row]}, tmp_path)
    assert path.stat().st_size > 1000


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown kind"):
        subject.is_available("no-such-kind:m=1")
