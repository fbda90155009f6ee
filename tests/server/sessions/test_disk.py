"""The disk tier under a manager: what leaves memory comes back the same, or not at all."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrieval import native
from retrieval.builder import IndexBuilder
from retrieval.context import Context, StaticSet
from retrieval.geometry import Geometry
from retrieval.index_files import IndexFiles
from retrieval.segment_index import CodesMaker
from server.engine.recorder import NullRecorder
from server.errors import DiskUnavailableError
from server.sessions import disk_tier, policy
from server.sessions.budget import Budget
from server.sessions.disk import Disk, open_disk
from server.sessions.disk_files import DiskLockedError
from server.sessions.manager import SessionManager

GEOMETRY = Geometry(2, 4, 2, 8, torch.float32, (None, None))
STATIC = StaticSet(num_sink_tokens=4, window_size=8, seal_tokens=32)
TOKEN_BYTES = GEOMETRY.kv_bytes_per_token
MODEL = "f" * 32


class Recorder(NullRecorder):
    """Keeps what went wrong and what was evicted."""

    def __init__(self) -> None:
        self.degradations: Counter[str] = Counter()
        self.evictions: Counter[tuple[str, str]] = Counter()

    def degraded(self, reason: str) -> None:
        self.degradations[reason] += 1

    def eviction(self, tier: str, reason: str, num_bytes: int) -> None:
        self.evictions[tier, reason] += 1


@cache
def rows_of(salt: str, position: int, token: int) -> torch.Tensor:
    """K and V of one token, all layers: depends on what a model's would, but for the tokens before it."""
    seed = hash((salt, position, token)) & 0x7FFFFFFF
    return torch.randn(
        2, GEOMETRY.num_layers, GEOMETRY.num_kv_heads, GEOMETRY.head_dim, generator=torch.Generator().manual_seed(seed)
    )


@dataclass
class Server:
    """A manager over a directory, and a stand-in for the engine whose K and V can be checked."""

    manager: SessionManager
    disk: Disk | None
    recorder: Recorder
    salt: str = ""
    opened: list[Context] = field(default_factory=list)

    def open(self, tokens: list[int]) -> Context:
        """What admission does."""
        for _ in range(5000):
            self.manager.settle()
            if self.manager.prepare(tokens, self.salt):
                return self.manager.open(tokens, self.salt, len(tokens) + 100)
            time.sleep(0.001)
        raise AssertionError("the prompt was never ready")

    def read(self, tokens: list[int]) -> int:
        """A whole request over a prompt; returns the cached tokens, all of which are checked."""
        needed = self.manager.worst_case_bytes(len(tokens) + 1)
        context = self.open(tokens)
        self.check(context, tokens)
        num_cached = context.num_tokens
        while not self.manager.reserve(needed):
            assert self.manager.num_pending, "no memory, and nothing that will free any"
            self.manager.settle()
        for layer_idx in range(GEOMETRY.num_layers):
            new = torch.stack([rows_of(self.salt, p, tokens[p])[:, layer_idx] for p in range(num_cached, len(tokens))])
            context.tail.reserve(len(new))
            context.tail.write(layer_idx, *new.permute(1, 2, 0, 3))
        context.tail.commit(len(tokens) - num_cached)
        self.manager.prompt_done(context, tokens)
        self.manager.close(context, tokens)
        self.manager.release(needed)
        self.manager.wait_for_indexes()
        return num_cached

    def check(self, context: Context, tokens: list[int]) -> None:
        """Every token of K and V that a context starts with is the one of its position."""
        position = 0
        for run in context.runs():
            for offset in range(run.begin, run.end):
                expected = rows_of(self.salt, position, tokens[position])
                assert torch.equal(run.kv.keys[:, :, offset], expected[0]), position
                assert torch.equal(run.kv.values[:, :, offset], expected[1]), position
                position += 1
        assert position == context.num_tokens

    def settle(self) -> None:
        """Until no thread has anything left to do."""
        while self.manager.is_settling:
            self.manager.settle()
            time.sleep(0.001)


@pytest.fixture(autouse=True)
def short_segments_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_tier, "MIN_SAVED_TOKENS", 16)
    monkeypatch.setattr("server.sessions.policy.read_seconds", lambda _: 0.0)
    monkeypatch.setattr("server.sessions.manager.read_seconds", lambda _: 0.0)


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[SessionManager] = []

    def make(
        limit_tokens: int = 1 << 20,
        disk_bytes: int = 1 << 30,
        salt: str = "",
        model: str = MODEL,
        has_disk: bool = True,
        has_index: bool = False,
        directory: Path = tmp_path / "disk",
    ) -> Server:
        recorder, codes = Recorder(), None
        if native.core() is not None:
            codes = CodesMaker(native.core(), native.core().Budget(k=8))
        kind = "flat" if codes is None else "rabitq"
        builder = IndexBuilder(kind, {}, STATIC.num_sink_tokens, recorder.index_build, codes) if has_index else None
        files = IndexFiles(kind, {}, STATIC.num_sink_tokens, codes) if has_index else None
        disk = open_disk(directory, disk_bytes, model, GEOMETRY, files, recorder) if has_disk else None
        budget, device = Budget(limit_tokens * TOKEN_BYTES), torch.device("cpu")
        manager = SessionManager(GEOMETRY, STATIC, builder, budget, recorder, device=device, compacts=False, disk=disk)
        made.append(manager)
        return Server(manager, disk, recorder, salt)

    yield make
    for manager in made:
        manager.shutdown()


def prompt(seed: int, num_tokens: int = 60) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, num_tokens).tolist()


# --- restarts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_index", [False, True])
def test_a_prompt_survives_a_restart(make_server: Any, has_index: bool) -> None:
    first = make_server(has_index=has_index)
    tokens = prompt(1)
    assert first.read(tokens) == 0
    first.manager.shutdown()
    second = make_server(has_index=has_index)
    assert second.read([*tokens, 7]) == 60
    (segment,) = [s for s in second.manager.store if s.num_tokens == 60]
    assert (segment.index is not None) == has_index
    assert second.recorder.degradations == {}


def test_an_index_comes_from_the_file_and_is_built_anew_where_there_is_none(make_server: Any, tmp_path: Path) -> None:
    first, tokens = make_server(has_index=True), prompt(1)
    first.read(tokens)
    first.manager.shutdown()
    builds: list[int] = []
    second = make_server(has_index=True)
    second.manager._builder._on_built = lambda kind, seconds, keys: builds.append(keys)
    second.read([*tokens, 7])
    assert builds == []
    second.manager.shutdown()
    for path in (tmp_path / "disk").rglob("*.index"):
        path.unlink()
    third = make_server(has_index=True)
    third.manager._builder._on_built = lambda kind, seconds, keys: builds.append(keys)
    third.read([*tokens, 7])
    assert builds == [60]
    third.manager.shutdown()
    assert list((tmp_path / "disk").rglob("*.index")), "what was missing is on disk again"


def test_a_path_of_several_segments_comes_back_as_one_prefix(make_server: Any) -> None:
    first, tokens = make_server(), prompt(1, 200)
    for end in (60, 120, 200):
        first.read(tokens[:end])
    assert len(first.manager.store) == 3
    first.manager.shutdown()
    second = make_server()
    assert second.read([*tokens, 7]) == 200
    assert second.read([*tokens[:100], 1001]) == 100, "a prefix that ends inside one"


def test_what_is_used_again_is_written_before_the_server_ends(make_server: Any, tmp_path: Path) -> None:
    server, tokens = make_server(), prompt(1)
    server.read(tokens)
    server.settle()
    assert server.disk.stats().num_segments == 0, "a prompt that nobody asks again costs no write"
    server.read([*tokens, 7])
    server.settle()
    assert server.disk.stats().num_segments == 1
    copy = tmp_path / "as after a kill"
    shutil.copytree(tmp_path / "disk", copy)
    assert make_server(directory=copy).read([*tokens, 8]) == 60


def test_salts_see_nothing_of_each_other_on_disk_and_are_not_written(make_server: Any, tmp_path: Path) -> None:
    first, tokens = make_server(salt="a tenant's secret"), prompt(1)
    first.read(tokens)
    first.manager.shutdown()
    for path in (tmp_path / "disk").rglob("*.*"):
        assert b"a tenant's secret" not in path.read_bytes()
    other = make_server(salt="another tenant's")
    assert other.read(tokens) == 0
    other.manager.shutdown()
    assert make_server(salt="a tenant's secret").read([*tokens, 7]) == 60


def test_another_model_finds_nothing_and_leaves_everything(make_server: Any, tmp_path: Path) -> None:
    first, tokens = make_server(), prompt(1)
    first.read(tokens)
    first.manager.shutdown()
    before = sorted((p, p.read_bytes()) for p in (tmp_path / "disk" / MODEL).iterdir())
    other = make_server(model="e" * 32)
    assert other.recorder.degradations == {"kv_disk_model": 1}
    assert other.read(tokens) == 0
    other.manager.shutdown()
    assert sorted((p, p.read_bytes()) for p in (tmp_path / "disk" / MODEL).iterdir()) == before
    shutil.copytree(tmp_path / "disk" / MODEL, tmp_path / "disk" / ("e" * 32), dirs_exist_ok=True)
    moved = make_server(model="e" * 32)
    assert moved.recorder.degradations["kv_disk_model"] >= 2, "the files say so themselves"


def test_one_server_per_directory(make_server: Any, tmp_path: Path) -> None:
    first = make_server()
    with pytest.raises(DiskLockedError, match="in use by another server"):
        make_server()
    first.manager.shutdown()
    make_server()


def test_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from server.sessions.disk_files import lock_directory; "
        "lock = lock_directory(pathlib.Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        from server.sessions.disk_files import lock_directory

        with pytest.raises(DiskLockedError):
            lock_directory(tmp_path)
        process.kill()
        process.wait()
    lock_directory(tmp_path).close()


def test_what_a_killed_server_left_half_written_is_removed(make_server: Any, tmp_path: Path) -> None:
    first = make_server()
    first.read(prompt(1))
    first.manager.shutdown()
    folder = tmp_path / "disk" / MODEL
    for name in ("aa.segment.tmp", "bb.index.tmp", "cc.index", "dd.keep"):
        (folder / name).write_bytes(b"half")
    (folder / "scratch.tmp").mkdir()
    second = make_server()
    assert sorted(p.suffix for p in folder.iterdir()) == [".segment"]
    assert second.recorder.degradations == {}


def test_a_long_file_is_not_read_for_a_few_tokens(make_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, tokens = make_server(), prompt(1)
    first.read(tokens)
    first.manager.shutdown()
    monkeypatch.setattr("server.sessions.manager.read_seconds", lambda _: policy.prefill_seconds(0, 30))
    second = make_server()
    assert second.read([*tokens[:29], 1001]) == 0
    assert second.read([*tokens[:50], 1001]) == 29, "21 tokens more are not worth it"
    second.manager.shutdown()
    third = make_server()
    assert third.read([*tokens[:40], 1001]) == 40


# --- eviction -------------------------------------------------------------------------------------------


def test_an_index_is_given_up_before_its_segment_and_built_again_when_used(
    make_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a disk, where the bytes of indexes suffice and building one costs little."""
    monkeypatch.setattr("server.sessions.eviction.index_seconds", lambda _: 0.0)
    server = make_server(has_disk=False, has_index=True)
    document = prompt(1, 200)
    server.read(document)
    (segment,) = server.manager.store
    assert segment.index_state == "ready"
    server.manager.budget.limit_bytes = server.manager.held_bytes()
    assert server.manager.reserve(segment.index_bytes)
    assert (segment.index, segment.index_state) == (None, "none")
    assert server.recorder.evictions == {("host", "index"): 1}
    server.manager.release(server.manager.budget.reserved_bytes)
    server.manager.budget.limit_bytes *= 10
    assert server.read([*document, 7]) == 200
    assert segment.index_state == "ready"


def test_memory_moves_to_disk_and_comes_back(make_server: Any) -> None:
    server = make_server(limit_tokens=150)
    prompts = [prompt(seed) for seed in range(5)]
    for tokens in prompts:
        assert server.read(tokens) == 0
    for tokens in random.Random(0).choices(prompts, k=30):
        assert server.read([*tokens, 1001]) == 60
        assert server.manager.held_bytes() + server.manager.budget.reserved_bytes <= 150 * TOKEN_BYTES
    server.settle()
    assert server.recorder.evictions["host", "to_disk"] > 20
    assert server.manager.budget.reserved_bytes == 0
    assert server.recorder.degradations == {}


def test_memory_is_not_free_before_the_write_has_ended(make_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    real = Disk.write
    monkeypatch.setattr(Disk, "write", lambda *args: go_on.wait(30) and real(*args))
    server = make_server(limit_tokens=100)
    server.read(prompt(1))
    assert not server.manager.reserve(80 * TOKEN_BYTES)
    assert server.manager.held_bytes() == 60 * TOKEN_BYTES
    assert server.manager.num_pending == 1
    assert not server.manager.reserve(80 * TOKEN_BYTES), "no second victim is chosen meanwhile"
    go_on.set()
    server.settle()
    assert server.manager.held_bytes() == 0
    assert server.manager.reserve(80 * TOKEN_BYTES)
    server.manager.release(80 * TOKEN_BYTES)


def test_bytes_that_only_a_write_holds_count(make_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    real = Disk.write
    monkeypatch.setattr(Disk, "write", lambda *args: go_on.wait(30) and real(*args))
    server = make_server()
    server.read(prompt(1))
    (segment,) = server.manager.store
    server.manager.persist(server.manager.store.longest_prefix(segment.token_ids, ""))
    server.manager.discard([segment], set())
    assert (len(server.manager.store), server.manager.staging_bytes) == (0, 60 * TOKEN_BYTES)
    assert server.manager.held_bytes() == 60 * TOKEN_BYTES
    go_on.set()
    server.settle()
    assert server.manager.held_bytes() == server.manager.staging_bytes == 0


def test_what_a_context_uses_stays_though_its_write_has_ended(make_server: Any) -> None:
    server, tokens = make_server(limit_tokens=100), prompt(1)
    server.read(tokens)
    assert not server.manager.reserve(80 * TOKEN_BYTES)
    context = server.open([*tokens, 7])
    server.settle()
    assert context.num_tokens == 60
    server.check(context, tokens)
    assert len(server.manager.store) == 1
    server.manager.drop(context)
    assert server.manager.reserve(80 * TOKEN_BYTES), "on disk already: it goes at once"
    server.manager.release(80 * TOKEN_BYTES)


def test_the_quota_takes_the_least_valuable_and_leaves_what_is_kept(make_server: Any, tmp_path: Path) -> None:
    file_bytes = 60 * TOKEN_BYTES + 3000
    server = make_server(disk_bytes=3 * file_bytes)
    kept, *others = [prompt(seed) for seed in range(6)]
    server.read(kept)
    server.manager.persist(server.manager.store.longest_prefix(np.array(kept, dtype=np.int32), ""))
    server.settle()
    for tokens in others:
        server.read(tokens)
        server.read([*tokens, 1])
        server.settle()
        time.sleep(0.01)  # so that the latest is the latest on any clock
    stats = server.disk.stats()
    assert stats.kv_bytes <= server.disk.limit_bytes
    assert server.recorder.evictions["disk", "quota"] >= 2
    server.manager.shutdown()
    used = sum(p.stat().st_size for p in (tmp_path / "disk").rglob("*.*"))
    assert used <= server.disk.limit_bytes
    again = make_server()
    assert again.read([*kept, 7]) == 60
    assert again.read([*others[0], 7]) == 0


def test_what_a_longer_segment_holds_too_is_removed(make_server: Any) -> None:
    server = make_server()
    tokens = prompt(1, 100)
    for end in (40, 100):
        server.read(tokens[:end])
        server.read([*tokens[:end], 1001])
    server.settle()
    assert server.disk.stats().num_segments == 2
    chain = [s for s in server.manager.store if s.num_tokens >= 40]
    merged = server.manager.store.replace(chain, _joined(chain))
    server.manager.persist(server.manager.store.longest_prefix(merged.token_ids, ""))
    server.settle()
    assert server.disk.stats().num_segments == 1
    assert server.recorder.evictions["disk", "superseded"] == 2
    server.manager.shutdown()
    assert make_server().read([*tokens, 7]) == 100


def _joined(chain: list[Any]) -> Any:
    from retrieval.kv_buffer import KvBuffer

    kv = KvBuffer(GEOMETRY, sum(s.num_tokens for s in chain), torch.device("cpu"))
    for segment in chain:
        kv.copy_range(segment.kv, 0, segment.num_tokens)
    return kv


# --- sessions -------------------------------------------------------------------------------------------


def test_persist_and_fetch(make_server: Any) -> None:
    first, tokens = make_server(), prompt(1)
    first.read(tokens)
    path = first.manager.store.longest_prefix(np.array(tokens, dtype=np.int32), "")
    assert not first.manager.is_persisted(path[0].segment)
    first.manager.persist(path)
    first.settle()
    assert first.manager.is_persisted(path[0].segment)
    assert first.manager.disk_bytes > 60 * TOKEN_BYTES
    first.manager.shutdown()
    second = make_server()
    ids = np.array(tokens, dtype=np.int32)
    assert second.manager.num_tokens_on_disk(ids, "") == 60
    assert second.manager.num_tokens_on_disk(ids, "other") == 0
    assert second.manager.disk_bytes_of([(ids, ""), (ids[:40], "")]) == second.manager.disk_bytes
    assert fetched(second, tokens)
    path = second.manager.store.longest_prefix(ids, "")
    assert path[-1].end == 60
    hold = second.manager.pin(path)
    assert second.manager.pinned_bytes == 60 * TOKEN_BYTES
    second.manager.unpin(hold)
    assert second.manager.budget.reserved_bytes == 0


def fetched(server: Any, tokens: list[int]) -> bool:
    """Whether what is on disk of a prompt could be brought into memory, once everything under way is over."""
    while not server.manager.prepare([*tokens, 0], "", at_any_cost=True):
        if not server.manager.num_pending:
            return False
        time.sleep(0.001)
        server.manager.settle()
    return True


def test_without_a_disk_nothing_can_be_saved(make_server: Any) -> None:
    server = make_server(has_disk=False)
    server.read(prompt(1))
    with pytest.raises(DiskUnavailableError, match="--kv-disk-path"):
        server.manager.persist(())
    assert (server.manager.disk_bytes, server.manager.has_disk) == (0, False)


def test_fetching_more_than_memory_has_room_for_is_refused(make_server: Any) -> None:
    first, tokens, other = make_server(), prompt(1), prompt(2)
    first.read(tokens)
    first.manager.shutdown()
    second = make_server(limit_tokens=100)
    second.read(other)
    hold = second.manager.pin(second.manager.store.longest_prefix(np.array(other, dtype=np.int32), ""))
    assert second.manager.prepare([*tokens, 7], ""), "it could never fit beside what is pinned: computed instead"
    second.manager.unpin(hold)
    context = second.open([*other, 1])
    assert not second.manager.prepare([*tokens, 7], "")
    assert not fetched(second, tokens), "there is no room for it"
    second.manager.drop(context)
    assert fetched(second, tokens)
    assert second.manager.store.longest_prefix(np.array(tokens, dtype=np.int32), "")[-1].end == 60


# --- damage ---------------------------------------------------------------------------------------------


def test_damage_to_200_files_gives_no_wrong_key_or_value(make_server: Any, tmp_path: Path) -> None:
    """A bit of a file flipped, its end cut off, or another's bytes: what is read back is right or not there."""
    tokens = prompt(1)
    first = make_server(has_index=True)
    for end in (40, 60):
        first.read(tokens[:end])
    first.manager.shutdown()
    names = [p.name for p in (tmp_path / "disk" / MODEL).iterdir() if p.is_file()]
    assert len(names) == 3, "two segments; one is long enough for an index"
    chance, counts = random.Random(5), Counter[str]()
    for i in range(200):
        directory = tmp_path / f"damaged {i}"
        shutil.copytree(tmp_path / "disk", directory)
        target = directory / MODEL / chance.choice(names)
        damage(target, chance)
        server = make_server(directory=directory, has_index=True)
        cached = server.read([*tokens, 1001])  # checks every key and value
        counts["missed" if cached < 60 else "served"] += 1
        counts.update(server.recorder.degradations.keys())
        server.manager.shutdown()
        shutil.rmtree(directory)
    assert counts["missed"] > 50
    assert counts["kv_disk_damaged"] > 150


def damage(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        at = chance.randrange(len(data))
        data[at] ^= 1 << chance.randrange(8)
    elif chance.random() < 0.7:
        data = data[: chance.randrange(len(data))]
    else:
        begin = chance.randrange(len(data))
        data[begin : begin + 64] = chance.randbytes(len(data[begin : begin + 64]))
    path.write_bytes(data)


def test_a_file_altered_under_a_running_server_is_a_miss(make_server: Any, tmp_path: Path) -> None:
    first, tokens = make_server(), prompt(1)
    first.read(tokens)
    first.manager.shutdown()
    second = make_server()
    (path,) = (tmp_path / "disk").rglob("*.segment")
    path.write_bytes(path.read_bytes()[:-100])
    assert second.read([*tokens, 7]) == 0
    second.settle()
    assert second.recorder.degradations == {"kv_disk_damaged": 1}
    assert second.recorder.evictions["disk", "damaged"] == 1
    assert second.read([*tokens, 8]) == 61 - 1


def test_a_file_under_anothers_name_is_a_miss(make_server: Any, tmp_path: Path) -> None:
    first = make_server()
    for seed in (1, 2):
        first.read(prompt(seed))
    first.manager.shutdown()
    one, other = sorted((tmp_path / "disk").rglob("*.segment"))
    one.write_bytes(other.read_bytes())
    second = make_server()
    assert sorted(second.read([*prompt(seed), 7]) for seed in (1, 2)) == [0, 60]


def test_a_file_that_lies_about_its_tokens_is_a_miss(make_server: Any, tmp_path: Path) -> None:
    """Checksums are right, content is not what the name stands for: the address by content tells."""
    from retrieval import segment_file

    first, tokens = make_server(), prompt(1)
    first.read(tokens)
    first.manager.shutdown()
    (path,) = (tmp_path / "disk").rglob("*.segment")
    record, kv = segment_file.read_segment(path, MODEL, GEOMETRY)
    lie = segment_file.SegmentRecord(record.digest, 0, record.above, np.array(prompt(3), dtype=np.int32))
    segment_file.write_segment(path, lie, kv, MODEL)
    second = make_server()
    assert second.read([*prompt(3), 7]) == 0
    second.settle()
    assert second.recorder.degradations == {"kv_disk_damaged": 1}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_costs_only_the_cache(
    make_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    server = make_server(limit_tokens=100)
    prompts = [prompt(seed) for seed in range(3)]

    def fail(handle: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    for tokens in prompts:
        assert server.read(tokens) == 0
    reason = "kv_disk_full" if error == errno.ENOSPC else "kv_disk_write_failed"
    assert set(server.recorder.degradations) == {reason}
    assert server.recorder.evictions["host", "unsaved"] >= 1
    assert [p for p in (tmp_path / "disk" / MODEL).iterdir() if p.is_file()] == [], "nothing half-written stays"
    monkeypatch.undo()
    assert server.read(prompts[0]) == 0


def test_a_segment_larger_than_the_quota_is_given_up(make_server: Any) -> None:
    server = make_server(limit_tokens=100, disk_bytes=1000)
    for seed in range(3):
        assert server.read(prompt(seed)) == 0
    assert server.recorder.degradations["kv_disk_full"] >= 1
    assert server.recorder.evictions["host", "unsaved"] >= 1


def test_a_format_of_another_version_is_left_alone(
    make_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, tokens = make_server(), prompt(1)
    first.read(tokens)
    first.manager.shutdown()
    monkeypatch.setattr("retrieval.tensor_file.FORMAT_VERSION", 99)
    second = make_server()
    assert second.recorder.degradations == {"kv_disk_format": 1}
    assert second.read([*tokens, 7]) == 0
    assert len(list((tmp_path / "disk").rglob("*.segment"))) == 1
