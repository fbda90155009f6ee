"""The core's scheduler by itself, under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "retrieval" / "csrc"
ROUNDS = 500


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("chains")
    options = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread"]
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    # Older ones end programs at start where the kernel spreads addresses widely.
    for command in ([compiler, *options, empty, "-o", folder / "empty"], [folder / "empty"]):
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no ThreadSanitizer here")
    program = folder / "stress"
    sources = [Path(__file__).with_name("chains_stress.cpp"), CORE / "chains.cpp", CORE / "thread_pool.cpp"]
    subprocess.run([compiler, *options, f"-I{CORE}", *sources, "-o", program], check=True)
    return program


def test_chains_run_in_order_and_once(stress: Path) -> None:
    ended = subprocess.run([stress, str(ROUNDS)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
