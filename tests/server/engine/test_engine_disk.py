"""Engines that end and begin again over one directory: the same tokens as without any cache."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from server.errors import MemoryExhaustedError


@pytest.fixture(autouse=True)
def reading_always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of these tests are computed faster than a file of theirs is opened."""
    monkeypatch.setattr("server.sessions.disk_tier.MIN_SAVED_TOKENS", 16)
    monkeypatch.setattr("server.sessions.manager.read_seconds", lambda _: 0.0)


@pytest.mark.parametrize(("index", "kv_cache_dtype"), [("flat", "auto"), ("rabitq", "auto"), ("rabitq", "int8")])
async def test_a_restarted_engine_answers_from_disk_as_one_without_a_cache(
    index, kv_cache_dtype, tmp_path, make_engine, prompt, run, tokens_of
):
    ids, kept = prompt(300), {"kv_disk_path": str(tmp_path), "kv_cache_dtype": kv_cache_dtype, "index": index}
    alone = make_engine(attention="full", prefix_caching=False, kv_cache_dtype=kv_cache_dtype)
    expected = {cut: tokens_of(await run(alone, ids[:cut] + prompt(20, seed=cut))) for cut in (300, 200)}
    first = make_engine(num_retrieved=4096, **kept)
    await run(first, ids)
    await first.stop(0)
    for _ in range(2):
        again = make_engine(num_retrieved=4096, **kept)
        for cut, tokens in expected.items():
            events = await run(again, ids[:cut] + prompt(20, seed=cut))
            assert events[-1].usage.num_cached_tokens >= cut
            assert tokens_of(events) == tokens
        await again.stop(0)


async def test_documents_that_do_not_fit_memory_together_go_round_by_disk(
    tmp_path, make_engine, prompt, run, tokens_of
):
    documents = [prompt(250, seed=seed) for seed in range(6)]
    alone = make_engine(attention="full", prefix_caching=False)
    expected = [tokens_of(await run(alone, (*ids, 5, 6, 7))) for ids in documents]
    per_token = alone._manager.kv_bytes(1)
    engine = make_engine(num_retrieved=4096, kv_disk_path=str(tmp_path), kv_host_memory=800 * per_token)
    for ids in documents:
        await run(engine, ids)
    for i in random.Random(0).choices(range(6), k=20):
        events = await run(engine, (*documents[i], 5, 6, 7))
        assert events[-1].usage.num_cached_tokens >= 250
        assert tokens_of(events) == expected[i]
        assert engine._manager.held_bytes() + engine._manager.budget.reserved_bytes <= 800 * per_token
    assert engine._manager.budget.reserved_bytes == 0


def flip_a_bit_in_every_file(folder: Path, chance: random.Random) -> None:
    for path in folder.rglob("*.*"):
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)


async def test_damaged_files_change_no_answer(tmp_path, make_engine, prompt, run, tokens_of):
    ids, chance = prompt(300), random.Random(3)
    engine = make_engine(num_retrieved=4096, kv_disk_path=str(tmp_path))
    expected = tokens_of(await run(engine, ids))
    for _ in range(8):
        await engine.stop(0)
        flip_a_bit_in_every_file(tmp_path, chance)
        engine = make_engine(num_retrieved=4096, kv_disk_path=str(tmp_path))
        assert tokens_of(await run(engine, ids)) == expected


async def test_a_directory_in_use_is_an_error_and_one_that_cannot_be_used_is_counted(tmp_path, make_engine):
    make_engine(kv_disk_path=str(tmp_path / "one"))
    with pytest.raises(OSError, match="in use by another server"):
        make_engine(kv_disk_path=str(tmp_path / "one"))
    (tmp_path / "file").write_text("not a directory")
    engine = make_engine(kv_disk_path=str(tmp_path / "file"))
    assert not engine._manager.has_disk


async def test_two_models_share_a_directory_and_nothing_else(tmp_path, make_engine, prompt, run):
    ids = prompt(300)
    for options in ({}, {"kv_cache_dtype": "int8"}, {"family": "qwen2"}, {"dtype": "bfloat16"}):
        engine = make_engine(**options, kv_disk_path=str(tmp_path))
        assert (await run(engine, ids))[-1].usage.num_cached_tokens == 0, options
        await engine.stop(0)
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 4


async def test_what_memory_cannot_hold_is_refused_before_any_work(tmp_path, make_engine, prompt, run):
    engine = make_engine(kv_host_memory=100_000, kv_disk_path=str(tmp_path))
    with pytest.raises(MemoryExhaustedError, match="100000 bytes"):
        await run(engine, prompt(3000))
