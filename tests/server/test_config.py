"""Settings: sources and their priority, errors that name the key, and the documented default file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from server.config import Settings, load
from server.engine.config import EngineConfig

DEFAULT_FILE = Path(__file__).parents[2] / "configs" / "default.yaml"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"RETRIEVAL_{name.upper()}", raising=False)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    return file


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "port: 1\nhost: file\nseed: 7\n")
    monkeypatch.setenv("RETRIEVAL_PORT", "2")
    monkeypatch.setenv("RETRIEVAL_HOST", "environment")
    settings = load(["--config", str(file), "--port", "3"])
    assert (settings.port, settings.host, settings.seed, settings.max_num_seqs) == (3, "environment", 7, 16)


def test_config_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRIEVAL_CONFIG", str(write(tmp_path, "port: 11\n")))
    assert load().port == 11


def test_unknown_key_in_the_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="prot"):
        load(["--config", str(write(tmp_path, "prot: 1\n"))])


def test_unknown_environment_variable_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRIEVAL_PROT", "1")
    with pytest.raises(ValueError, match="RETRIEVAL_PROT"):
        load()


def test_unknown_flag_exits_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        load(["--prot", "1"])
    assert exit_info.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_missing_config_file_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such file"):
        load(["--config", "/nowhere.yaml"])


def test_value_out_of_range_names_the_key() -> None:
    with pytest.raises(ValidationError, match="port"):
        load(["--port", "70000"])


def test_sizes_take_units() -> None:
    assert load(["--kv-host-memory", "8GiB"]).engine_config().kv_host_memory == 8 * 2**30


def test_disk_space_needs_a_place() -> None:
    config = load(["--kv-disk", "1GiB", "--kv-disk-path", "/cache"]).engine_config()
    assert (config.kv_disk, config.kv_disk_path) == (2**30, "/cache")
    with pytest.raises(ValueError, match="--kv-disk-path"):
        load(["--kv-disk", "1GiB"])


def test_keys_add_up_over_flags_and_commas_and_are_not_printed() -> None:
    settings = load(["--api-key", "alpha", "--api-key", "beta,gamma"])
    assert settings.api_keys == ("alpha", "beta", "gamma")
    assert "alpha" not in repr(settings)


def test_without_a_model_the_bundled_one_is_served_as_demo() -> None:
    settings = load()
    assert settings.model is None
    assert settings.model_names == ("demo",)
    assert Path(settings.engine_config().model).name == "demo_model"


def test_the_model_is_its_own_name_unless_served_under_others() -> None:
    assert load(["--model", "m"]).model_names == ("m",)
    assert load(["--model", "m", "--served-model-name", "a,b"]).model_names == ("a", "b")


def test_engine_config_has_the_same_defaults() -> None:
    config, plain = load().engine_config(), EngineConfig(model="")
    for field in dataclasses.fields(EngineConfig):
        if field.name != "model":
            assert getattr(config, field.name) == getattr(plain, field.name), field.name


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(["--help"])
    text = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description


def test_default_file_has_every_key_with_its_default_and_reason(tmp_path: Path) -> None:
    text = DEFAULT_FILE.read_text()
    assert list(yaml.safe_load(text)) == list(Settings.model_fields)
    assert load(["--config", str(DEFAULT_FILE)]).model_dump() == load().model_dump()
    flat = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    for name, field in Settings.model_fields.items():
        assert " ".join((field.description or "").split()) in flat, name
