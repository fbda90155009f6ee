"""What `roar` promises beyond the contract: it follows the queries it was built from, hints, and few keys scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrieval.index import IndexInputError, build, kind_class
from retrieval.index.index_file import write_index_file

_core = pytest.importorskip("retrieval._core", reason="needs the C++ core")
from retrieval.index.roar import LISTED_PER_KEY, WIDTHS, exact_lists, fit_lists  # noqa: E402

NUM_KEYS, HEAD_DIM = 20_000, 64


def keys_and_queries(num_queries: int) -> tuple[Tensor, Tensor]:
    """Keys round 50 centres; queries far from all keys, each between a few centres, as attention's are."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(50, HEAD_DIM, generator=generator)
    which = torch.randint(0, 50, (NUM_KEYS,), generator=generator)
    keys = centres[which] * 1.5 + torch.randn(NUM_KEYS, HEAD_DIM, generator=generator) * 0.7
    mixed = torch.rand(num_queries, 50, generator=generator).pow(8) @ centres
    queries = mixed + torch.randn(num_queries, HEAD_DIM, generator=generator) * 0.3 + 2.0
    return keys.bfloat16(), queries.bfloat16()


def recall(found: Tensor, expected: Tensor) -> float:
    return float((expected[:, :, None] == found[:, None, :]).any(dim=2).float().mean())


def test_queries_like_those_of_the_build_find_what_flat_finds() -> None:
    keys, queries = keys_and_queries(2100)
    index = build("roar", keys, queries[100:])
    found, _ = index.search(queries[:100], 100)
    expected, _ = build("flat", keys, queries[:0]).search(queries[:100], 100)
    assert recall(found, expected) >= 0.95
    assert index.count_scored(1, 100, NUM_KEYS) < 0.1 * NUM_KEYS


def test_inserted_keys_are_found() -> None:
    keys, queries = keys_and_queries(2100)
    index = build("roar", keys[: NUM_KEYS // 2], queries[100:])
    for part in keys[NUM_KEYS // 2 :].split(3000):
        index.insert(part)
    found, _ = index.search(queries[:100], 100)
    expected, _ = build("flat", keys, queries[:0]).search(queries[:100], 100)
    assert recall(found, expected) >= 0.95
    is_inserted = expected >= NUM_KEYS // 2
    assert recall(found, expected.masked_fill(~is_inserted, -2)) >= 0.95 * float(is_inserted.float().mean())


def test_edges_lead_to_the_keys_that_queries_score_most_alike() -> None:
    keys, queries = keys_and_queries(500)
    graph = _core.Graph(degree=8, extra_degree=0)
    lists = exact_lists(keys.float(), queries, 50).int()
    graph.build(keys, queries.float(), lists)
    edges = torch.frombuffer(bytearray(graph.save()[0]), dtype=torch.int32).reshape(NUM_KEYS, 8).long()
    sample = torch.arange(0, NUM_KEYS, 100)
    scores = keys.float() @ queries.float().T
    scores -= scores.mean(dim=0)  # a constant tells no keys apart
    apart = torch.cdist(scores[sample], scores)
    apart[torch.arange(len(sample)), sample] = torch.inf
    nearest = apart.topk(8, largest=False).indices
    assert recall(edges[sample], nearest) >= 0.8
    assert not bool((edges[sample] == sample[:, None]).any())


def test_thousands_of_equal_keys_are_no_more_work_than_others() -> None:
    keys, queries = keys_and_queries(200)
    keys[1:] = keys[0]
    index: Any = build("roar", keys, queries)
    positions, scores = index.search(queries[:3], 10)
    assert all(len(set(row.tolist())) == 10 for row in positions)
    assert torch.allclose(scores, (queries[:3].float() @ keys[0].float())[:, None].expand(3, 10), rtol=1e-3)


def test_the_graph_is_the_same_for_any_number_of_threads() -> None:
    keys, queries = keys_and_queries(600)
    before, states = _core.num_threads(), []
    for count in (1, 3):
        _core.set_num_threads(count)
        index: Any = build("roar", keys[:5000], queries)
        states.append(index._structure.save())
    _core.set_num_threads(before)
    assert states[0] == states[1]


def test_hints_are_where_a_search_may_begin() -> None:
    keys, queries = keys_and_queries(10)
    graph = _core.Graph(num_voters=1)
    graph.build(keys, queries[:1].float(), torch.zeros(1, 1, dtype=torch.int32))
    expected = torch.topk(queries.float() @ keys.float().T, 1).indices
    positions, scores = torch.empty(10, 1, dtype=torch.int64), torch.empty(10, 1)
    graph.search(keys, queries.float(), 1, NUM_KEYS, positions, scores, expected.tolist())
    assert torch.equal(positions, expected)


def test_lists_are_the_exact_best_keys() -> None:
    keys, queries = keys_and_queries(70)
    for count in (1, 99, 5000, NUM_KEYS - 7):
        expected, _ = build("flat", keys[:count], queries[:0]).search(queries, 20)
        assert torch.equal(exact_lists(keys[:count].float(), queries, 20), expected)


def test_lists_take_no_more_room_than_the_keys_warrant() -> None:
    for num_queries, num_keys in ((8192, 131_072), (8192, 30_000), (8192, 1024), (10, 1024), (0, 1024)):
        list_size, stride = fit_lists(num_queries, 512, num_keys)
        assert 100 <= list_size <= 512
        assert len(range(0, num_queries, stride)) * list_size <= (LISTED_PER_KEY + 1) * num_keys
    assert fit_lists(8192, 512, 131_072) == (512, 1)
    keys, queries = keys_and_queries(8192)
    assert build("roar", keys[:2000], queries).nbytes < 1000 * 2000


def test_the_width_of_a_search_follows_from_queries_kept_out_of_the_graph() -> None:
    keys, queries = keys_and_queries(2000)
    chosen: Any = build("roar", keys, queries)
    bounded: Any = build("roar", keys, queries, max_share=0.0)
    assert bounded._width == min(WIDTHS) <= chosen._width
    given: Any = build("roar", keys, queries, ef_search=333)
    assert given._width == 333


def test_a_saved_graph_searches_as_before(tmp_path: Path) -> None:
    keys, queries = keys_and_queries(1100)
    index: Any = build("roar", keys[:5000], queries[100:])
    index.save(tmp_path / "index")
    loaded: Any = type(index).load(tmp_path / "index", keys[:5000])
    assert loaded._width == index._width
    for found, expected in zip(loaded.search(queries[:100], 20), index.search(queries[:100], 20), strict=True):
        assert torch.equal(found, expected)


def test_a_file_of_other_options_is_refused(tmp_path: Path) -> None:
    keys, _ = keys_and_queries(1)
    write_index_file(tmp_path / "index", "roar", keys, {"min_calls": 2}, b"payload")
    with pytest.raises(IndexInputError, match="other options"):
        kind_class("roar").load(tmp_path / "index", keys)


def test_the_next_step_begins_with_the_last_steps_hits() -> None:
    keys, queries = keys_and_queries(4)
    sought = (keys.float() @ queries[:1].float().T)[:, 0].argmin()  # what no search would come by
    index: Any = build("roar", keys, queries, ef_search=20)
    index.attend(-queries[:1], keys, 5, 0.1)
    before = index._last_hits[0]
    index.attend(queries[:1], keys, 5, 0.1)
    assert sought not in index._last_hits[0]
    assert before != index._last_hits[0]
    index._last_hits = [[int(sought)]]
    assert sought in index.search(-queries[:1], 5)[0]


def test_impossible_graphs_and_options_are_refused() -> None:
    keys, queries = keys_and_queries(4)
    graph = _core.Graph()
    with pytest.raises(ValueError, match="positions"):
        graph.build(keys, queries.float(), torch.full((4, 2), NUM_KEYS, dtype=torch.int32))
    with pytest.raises(ValueError, match="not a graph"):
        graph.restore(b"\0" * 12, b"", b"", b"", b"", b"", 5, HEAD_DIM)
    with pytest.raises(ValueError, match="out of range"):
        _core.Graph(degree=0)
    with pytest.raises(TypeError):
        build("roar", keys, queries, edges=3)
