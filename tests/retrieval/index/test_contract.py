"""One contract for every index kind, with `flat` and plain torch as the oracles.

Sizes lie on both sides of what a kind treats apart: nothing, one key, less than a block, enough to train.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import pytest
import torch
from torch import Tensor

from retrieval.index import IndexInputError, KeyIndex, UnknownIndexKindError, build, kind_class
from retrieval.index.base import KINDS

HEAD_DIM = 64
NUM_KEYS = 3000
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCORE_TOLERANCE = 1e-3  # of |query| |key|: float32 sums in another order, or half-precision products

# Share of flat's top 10 that a kind must find, on keys in clusters with queries near keys. What each
# reaches here is well above; a fall below means something broke, not that the data are unlucky.
RECALL_FLOORS = {"flat": 1.0, "ivf": 0.9, "pq": 0.95, "hnsw": 0.9, "roar": 0.9, "rabitq": 0.95}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """So that graphs come out the same each time, and small loops do not wait for each other's threads."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(KINDS[request.param].partition(":")[0], reason="needs the C++ core")
    return str(request.param)


def make_keys(num_keys: int, dtype: torch.dtype = torch.float32, seed: int = 0, head_dim: int = HEAD_DIM) -> Tensor:
    """Keys as a model makes them: clusters around a shared mean that is larger than their spread."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, head_dim, generator=generator) * 2
    which = torch.randint(0, 20, (num_keys,), generator=generator)
    spread = torch.randn(num_keys, head_dim, generator=generator)
    return (centres[which] + spread + torch.linspace(-3, 3, head_dim)).to(dtype)


def make_queries(keys: Tensor, num_queries: int, seed: int = 1) -> Tensor:
    """Queries that lie near keys, without the keys' mean."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(0, len(keys), (num_queries,), generator=generator)
    noise = torch.randn(num_queries, keys.shape[1], generator=generator)
    return (keys[which].float() - torch.linspace(-3, 3, keys.shape[1]) + noise).to(keys.dtype)


def any_queries(num_queries: int, dtype: torch.dtype = torch.float32, head_dim: int = HEAD_DIM) -> Tensor:
    return torch.randn(num_queries, head_dim, generator=torch.Generator().manual_seed(2)).to(dtype)


def check_result(
    keys: Tensor, queries: Tensor, k: int, result: tuple[Tensor, Tensor], limit: int | None = None
) -> None:
    """Shapes, dtypes, padding, order, range, and that scores are the inner products of the stored keys."""
    positions, scores = result
    num_visible = len(keys) if limit is None else min(limit, len(keys))
    assert positions.shape == scores.shape == (len(queries), k)
    assert positions.dtype == torch.int64
    assert scores.dtype == torch.float32
    for query, row, row_scores in zip(queries, positions, scores, strict=True):
        num_found = int((row >= 0).sum())
        assert num_found == num_visible if k >= num_visible else num_found > 0 or k == 0
        assert (row[num_found:] == -1).all()
        assert (row_scores[num_found:] == -torch.inf).all()
        row, row_scores = row[:num_found], row_scores[:num_found]
        assert len(row.unique()) == num_found
        assert (row < num_visible).all()
        assert (row_scores.diff() <= 0).all()
        found = keys[row].float()
        tolerance = SCORE_TOLERANCE * float(query.float().norm()) * found.norm(dim=1) + 1e-6
        assert ((row_scores - found @ query.float()).abs() <= tolerance).all()


def recall(found: Tensor, expected: Tensor) -> float:
    """Mean share of each row of `expected` that the same row of `found` holds; -1 counts nowhere."""
    hits = (expected[:, :, None] == found[:, None, :]).any(dim=2) & (expected >= 0)
    return float(hits.sum()) / max(1, int((expected >= 0).sum()))


def full_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = queries.float() @ keys.float().T * scale
    return torch.softmax(logits, dim=1) @ values.float(), torch.logsumexp(logits, dim=1)


@pytest.mark.parametrize("num_keys", [0, 1, 127, NUM_KEYS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_search_returns_padded_descending_inner_products(kind: str, dtype: torch.dtype, num_keys: int) -> None:
    keys, queries = make_keys(num_keys, dtype), any_queries(5, dtype)
    index = build(kind, keys, any_queries(64, dtype))
    assert (index.num_keys, index.head_dim, index.kind) == (num_keys, HEAD_DIM, kind)
    for k in (0, 1, 10, 200, num_keys, num_keys + 5):
        check_result(keys, queries, k, index.search(queries, k))


@pytest.mark.parametrize("head_dim", [32, 80, 96, 128])
def test_search_takes_any_usual_head_dim(kind: str, head_dim: int) -> None:
    keys, queries = make_keys(1500, head_dim=head_dim), any_queries(3, head_dim=head_dim)
    check_result(keys, queries, 20, build(kind, keys, queries).search(queries, 20))


def test_search_of_no_queries_returns_no_rows(kind: str) -> None:
    keys = make_keys(NUM_KEYS)
    index = build(kind, keys, keys[:0])
    check_result(keys, keys[:0], 7, index.search(keys[:0], 7))


def test_search_takes_views_that_are_not_contiguous(kind: str) -> None:
    keys = make_keys(2 * NUM_KEYS)[::2]
    queries = any_queries(2 * HEAD_DIM, head_dim=3).reshape(HEAD_DIM, -1).T
    check_result(keys, queries, 20, build(kind, keys, queries).search(queries, 20))


def test_search_leaves_keys_and_queries_unchanged(kind: str) -> None:
    keys, queries = make_keys(NUM_KEYS), any_queries(4)
    before = keys.clone(), queries.clone()
    build(kind, keys, queries).search(queries, 20)
    assert torch.equal(keys, before[0])
    assert torch.equal(queries, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_search_finds_what_flat_finds(kind: str, dtype: torch.dtype) -> None:
    keys = make_keys(NUM_KEYS, dtype)
    queries = make_queries(keys, 50)
    found, _ = build(kind, keys, make_queries(keys, 1000, seed=3)).search(queries, 10)
    expected, _ = build("flat", keys, queries).search(queries, 10)
    assert recall(found, expected) >= RECALL_FLOORS[kind]


def test_flat_agrees_with_torch() -> None:
    keys, queries = make_keys(20_000, torch.bfloat16), any_queries(130, torch.bfloat16)
    positions, scores = build("flat", keys, queries).search(queries, 50)
    expected = torch.topk(queries.double() @ keys.double().T, 50)
    torch.testing.assert_close(scores, expected.values.float(), rtol=1e-5, atol=1e-4)
    assert recall(positions, expected.indices) >= 0.999  # near ties may change places


@pytest.mark.parametrize("limit", [0, 1, 100, 500, 2000, NUM_KEYS, NUM_KEYS + 1000])
def test_search_sees_only_positions_below_the_limit(kind: str, limit: int) -> None:
    keys = make_keys(NUM_KEYS)
    queries = make_queries(keys, 20)
    index = build(kind, keys, make_queries(keys, 1000, seed=3))
    result = index.search(queries, 10, limit)
    check_result(keys, queries, 10, result, limit)
    expected, _ = build("flat", keys, queries).search(queries, 10, limit)
    assert limit == 0 or recall(result[0], expected) >= RECALL_FLOORS[kind] - 0.1


@pytest.mark.parametrize("num_first", [0, 1, 127, 2000])
def test_inserted_keys_are_found_behind_the_first(kind: str, num_first: int) -> None:
    keys = make_keys(NUM_KEYS)
    queries = make_queries(keys, 50)
    index = build(kind, keys[:num_first].clone(), make_queries(keys, 1000, seed=3))
    for start, end in ((num_first, 2500), (2500, 2501), (2501, NUM_KEYS)):
        index.insert(keys[start:end])
        assert index.num_keys == end
    assert torch.equal(index.keys, keys)
    result = index.search(queries, 10)
    check_result(keys, queries, 10, result)
    expected, _ = build("flat", keys, queries).search(queries, 10)
    assert recall(result[0], expected) >= RECALL_FLOORS[kind] - 0.1


def test_inserting_nothing_changes_nothing(kind: str) -> None:
    keys, queries = make_keys(NUM_KEYS), any_queries(4)
    index = build(kind, keys, queries)
    before = index.search(queries, 10)
    index.insert(keys[:0])
    torch.testing.assert_close(index.search(queries, 10), before, rtol=0, atol=0)


def test_duplicate_keys_keep_their_own_positions(kind: str) -> None:
    keys = make_keys(30).repeat(100, 1)
    queries = any_queries(4)
    index = build(kind, keys, queries)
    result = index.search(queries, 100)
    check_result(keys, queries, 100, result)
    assert (result[1][:, 0] >= (queries @ keys[:30].T).max(dim=1).values - 0.1).float().mean() >= 0.5


def test_equal_keys_are_all_as_good(kind: str) -> None:
    keys, queries = make_keys(1).repeat(NUM_KEYS, 1), any_queries(4)
    index = build(kind, keys, queries)
    check_result(keys, queries, 100, index.search(queries, 100))
    check_result(keys, queries, NUM_KEYS, index.search(queries, NUM_KEYS))


def test_zero_queries_and_zero_keys_are_vectors_like_any(kind: str) -> None:
    keys = torch.zeros(NUM_KEYS, HEAD_DIM)
    check_result(keys, keys[:2], 10, build(kind, keys, keys[:2]).search(keys[:2], 10))


@pytest.mark.parametrize("num_keys", [1, 127, NUM_KEYS])
@pytest.mark.parametrize("limit", [None, 1000])
def test_attend_is_softmax_over_what_search_found(kind: str, num_keys: int, limit: int | None) -> None:
    keys, values = make_keys(num_keys, torch.bfloat16), make_keys(num_keys + 9, torch.bfloat16, seed=4)
    queries = any_queries(6, torch.bfloat16)
    index = build(kind, keys, any_queries(64, torch.bfloat16))
    out, lse, stats = index.attend(queries, values, 50, 0.125, limit)
    positions, _ = index.search(queries, 50, limit)
    for i, row in enumerate(positions):
        chosen = row[row >= 0]
        expected_out, expected_lse = full_attention(queries[i : i + 1], keys[chosen], values[chosen], 0.125)
        torch.testing.assert_close(out[i : i + 1], expected_out, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse[i : i + 1], expected_lse, rtol=1e-3, atol=1e-3)
    assert stats.num_queries == 6
    assert stats.num_keys == min(num_keys, limit or num_keys)
    assert stats.num_retrieved == int((positions >= 0).sum())
    assert 0 < stats.share_scanned <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_to_everything_is_full_attention(kind: str, dtype: torch.dtype) -> None:
    keys, values, queries = make_keys(NUM_KEYS, dtype), make_keys(NUM_KEYS, dtype, seed=4), any_queries(6, dtype)
    out, lse, stats = build(kind, keys, queries).attend(queries, values, NUM_KEYS, 0.125)
    expected_out, expected_lse = full_attention(queries, keys, values, 0.125)
    torch.testing.assert_close(out, expected_out, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)
    assert stats.num_retrieved == 6 * NUM_KEYS


@pytest.mark.parametrize(("num_keys", "limit", "k"), [(0, None, 10), (NUM_KEYS, 0, 10), (NUM_KEYS, None, 0)])
def test_attend_to_nothing_is_empty(kind: str, num_keys: int, limit: int | None, k: int) -> None:
    keys, queries = make_keys(num_keys), any_queries(3)
    out, lse, stats = build(kind, keys, queries).attend(queries, keys, k, 0.125, limit)
    assert torch.equal(out, torch.zeros(3, HEAD_DIM))
    assert (lse == -torch.inf).all()
    assert stats.num_retrieved == 0


@pytest.mark.parametrize("num_keys", [0, 127, NUM_KEYS])
def test_saved_index_answers_as_before(kind: str, num_keys: int, tmp_path: Path) -> None:
    keys, queries = make_keys(num_keys, torch.bfloat16), any_queries(5, torch.bfloat16)
    index = build(kind, keys, any_queries(64, torch.bfloat16))
    index.save(tmp_path / "index")
    loaded = kind_class(kind).load(tmp_path / "index", keys)
    torch.testing.assert_close(loaded.search(queries, 10), index.search(queries, 10), rtol=0, atol=0)
    assert loaded.nbytes == index.nbytes
    more = make_keys(200, torch.bfloat16, seed=5)
    loaded.insert(more)
    check_result(torch.cat((keys, more)), queries, 10, loaded.search(queries, 10))


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "flipped at the end", "not an index", "missing"])
def test_damaged_file_is_refused(kind: str, damage: str, tmp_path: Path) -> None:
    keys, path = make_keys(NUM_KEYS), tmp_path / "index"
    build(kind, keys, any_queries(64)).save(path)
    content = bytearray(path.read_bytes())
    match damage:
        case "empty":
            content.clear()
        case "truncated":
            del content[len(content) * 2 // 3 :]
        case "flipped":
            content[len(content) // 2] ^= 0x10
        case "flipped at the end":
            content[-1] ^= 0x01
        case "not an index":
            content = bytearray(b"something else entirely" * 100)
    path.write_bytes(content)
    if damage == "missing":
        path.unlink()
    with pytest.raises(IndexInputError):
        kind_class(kind).load(path, keys)


def test_file_of_other_keys_or_kind_is_refused(kind: str, tmp_path: Path) -> None:
    keys, path = make_keys(NUM_KEYS), tmp_path / "index"
    build(kind, keys, any_queries(64)).save(path)
    for other in (keys[:-1], keys[:, :32].contiguous(), keys.bfloat16()):
        with pytest.raises(IndexInputError):
            kind_class(kind).load(path, other)
    build("ivf" if kind == "flat" else "flat", keys, keys[:0]).save(path)
    with pytest.raises(IndexInputError):
        kind_class(kind).load(path, keys)


def bad_vectors() -> dict[str, Tensor]:
    with_nan, with_infinity = make_keys(1200), make_keys(1200)
    with_nan[700, 3] = torch.nan
    with_infinity[700, 3] = -torch.inf
    return {
        "nan": with_nan,
        "infinity": with_infinity,
        "one dimension": torch.zeros(HEAD_DIM),
        "three dimensions": torch.zeros(1, 2, HEAD_DIM),
        "integers": torch.zeros(2, HEAD_DIM, dtype=torch.int32),
        "double": torch.zeros(2, HEAD_DIM, dtype=torch.float64),
    }


@pytest.mark.parametrize("bad", sorted(bad_vectors()))
def test_bad_vectors_are_refused_and_harm_nothing(kind: str, bad: str) -> None:
    vectors, keys, queries = bad_vectors()[bad], make_keys(NUM_KEYS), any_queries(3)
    index = build(kind, keys, queries)
    before = index.search(queries, 10)
    for refused in (
        lambda: build(kind, vectors, queries),
        lambda: build(kind, keys, vectors),
        lambda: index.insert(vectors),
        lambda: index.search(vectors, 10),
        lambda: index.attend(vectors, keys, 10, 0.125),
    ):
        with pytest.raises(IndexInputError):
            refused()
    assert index.num_keys == NUM_KEYS
    torch.testing.assert_close(index.search(queries, 10), before, rtol=0, atol=0)


def test_wrong_width_dtype_and_counts_are_refused(kind: str) -> None:
    keys, queries = make_keys(NUM_KEYS), any_queries(3)
    index = build(kind, keys, queries)
    for refused in (
        lambda: build(kind, keys, queries[:, :32]),
        lambda: index.insert(keys[:, :32]),
        lambda: index.insert(keys.bfloat16()),
        lambda: index.search(queries[:, :32], 10),
        lambda: index.search(queries, -1),
        lambda: index.search(queries, 10, -1),
    ):
        with pytest.raises(IndexInputError):
            refused()


def test_unknown_kinds_and_options_are_refused(kind: str) -> None:
    keys = make_keys(10)
    with pytest.raises(TypeError):
        build(kind, keys, keys, no_such_option=1)
    with pytest.raises(UnknownIndexKindError):
        build("no such kind", keys, keys)


def test_searches_may_run_while_another_thread_inserts(kind: str) -> None:
    keys = make_keys(NUM_KEYS, torch.bfloat16)
    queries = make_queries(keys, 8)
    index = build(kind, keys[:1500], make_queries(keys, 500, seed=3))
    errors: list[BaseException] = []
    is_inserting = threading.Event()
    is_inserting.set()

    def run(work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            errors.append(error)

    searchers = [threading.Thread(target=run, args=(search_while, index, keys, queries, is_inserting)) for _ in "ab"]
    inserter = threading.Thread(target=run, args=(insert_slowly, index, keys))
    for thread in (*searchers, inserter):
        thread.start()
    inserter.join(timeout=60)
    is_inserting.clear()
    for thread in searchers:
        thread.join(timeout=60)
    assert not inserter.is_alive()
    assert not any(thread.is_alive() for thread in searchers)
    assert errors == []
    check_result(keys, queries, 10, index.search(queries, 10))


def insert_slowly(index: KeyIndex, keys: Tensor) -> None:
    for start in range(index.num_keys, len(keys), 50):
        index.insert(keys[start : start + 50])


def search_while(index: KeyIndex, keys: Tensor, queries: Tensor, is_inserting: threading.Event) -> None:
    """Every result must be right for some number of keys between the first and the last."""
    while is_inserting.is_set():
        check_result(keys, queries, 10, index.search(queries, 10))
        out, lse, _ = index.attend(queries, keys, 10, 0.125)
        assert out.isfinite().all()
        assert lse.isfinite().all()


def test_nbytes_counts_the_index_and_grows_with_it(kind: str) -> None:
    keys = make_keys(NUM_KEYS)
    index = build(kind, keys[:2000], keys[:100])
    before = index.nbytes
    index.insert(keys[2000:])
    assert index.nbytes > before if kind != "flat" else index.nbytes == before == 0
    assert index.count_bytes_read(2, 10, NUM_KEYS) > 0


@pytest.mark.parametrize("num_keys", [0, 1, 1500, 8000])
def test_an_index_takes_no_more_bytes_than_foretold(kind: str, num_keys: int) -> None:
    keys = make_keys(num_keys, torch.bfloat16)
    index = build(kind, keys, any_queries(2048, torch.bfloat16))
    most = kind_class(kind).most_bytes(num_keys, HEAD_DIM, keys.element_size())
    assert index.nbytes <= most
    if num_keys == 8000:
        assert index.nbytes >= 0.6 * most, "nor is much more foretold"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hnsw", {"m": 4}),
        ("hnsw", {"m": 48}),
        ("ivf", {"num_lists": 500}),
        ("roar", {"degree": 24, "extra_degree": 4, "list_size": 150, "max_queries": 100}),
        ("rabitq", {"bits": 4}),
    ],
)
def test_options_are_foretold_too(kind: str, options: dict[str, int]) -> None:
    pytest.importorskip(KINDS[kind].partition(":")[0], reason="needs the C++ core")
    keys = make_keys(6000)
    index = build(kind, keys, any_queries(512), **options)
    most = kind_class(kind).most_bytes(6000, HEAD_DIM, 4, **options)
    assert 0.5 * most <= index.nbytes <= most
