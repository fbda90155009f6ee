"""Records of saved sessions: read back as written, and passed over when they are not to be trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server.sessions.records import SessionRecord, SessionRecords, tenant_tag


def record(name: str = "doc", tenant: str = "t", num_tokens: int = 5) -> SessionRecord:
    return SessionRecord(tenant, name, 1.5, 2.5, np.arange(num_tokens, dtype=np.int32))


def loaded(folder: Path, model: str = "m") -> dict[tuple[str, str], SessionRecord]:
    return {(r.tenant, r.name): r for r in SessionRecords(folder, model).load()}


def test_what_is_written_is_read_by_the_next_process(tmp_path: Path) -> None:
    records = SessionRecords(tmp_path / "new", "m")
    records.write(record("a", num_tokens=0))
    records.write(record("a", num_tokens=7))
    records.write(record("ü/..", tenant="u"))
    found = loaded(tmp_path / "new")
    assert set(found) == {("t", "a"), ("u", "ü/..")}
    assert found["t", "a"].token_ids.tolist() == list(range(7))
    assert found["t", "a"].token_ids.dtype == np.int32
    assert (found["t", "a"].created, found["t", "a"].saved_at) == (1.5, 2.5)


@pytest.mark.parametrize("name", ["../../etc/x", "/x", ".", "..", "a\\b", "con", "x" * 512])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "records"
    SessionRecords(folder, "m").write(record(name))
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert file.parent == folder
    assert file.stat().st_mode & 0o077 == 0, "tokens are the user's text"


def test_deleted_records_are_gone_and_deleting_twice_is_no_error(tmp_path: Path) -> None:
    records = SessionRecords(tmp_path, "m")
    records.write(record())
    records.delete("t", "doc")
    records.delete("t", "doc")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert SessionRecords(tmp_path / "none", "m").load() == []
    SessionRecords(tmp_path / "none", "m").delete("t", "doc")


@pytest.mark.parametrize("spoil", ["flip", "cut", "empty", "rename", "other model"])
def test_what_is_damaged_or_anothers_is_passed_over(tmp_path: Path, spoil: str) -> None:
    SessionRecords(tmp_path, "m").write(record())
    SessionRecords(tmp_path, "m").write(record("good"))
    file = next(p for p in tmp_path.iterdir() if b'"doc"' in p.read_bytes())
    content = bytearray(file.read_bytes())
    if spoil == "flip":
        content[len(content) // 2] ^= 4
    elif spoil == "cut":
        content = content[: len(content) // 2]
    elif spoil == "empty":
        content = bytearray()
    file.write_bytes(content)
    if spoil == "rename":
        file.rename(tmp_path / f"{'0' * 40}.session")
    if spoil == "other model":
        assert loaded(tmp_path, "other") == {}
        return
    assert set(loaded(tmp_path)) == {("t", "good")}


def test_tenants_are_told_apart_and_not_named() -> None:
    tags = {tenant_tag(owner, salt) for owner, salt in [("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc")]}
    assert len(tags) == 5
    assert "secret" not in tenant_tag("", "secret")
