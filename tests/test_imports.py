"""The import direction of the design, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.relative_to(ROOT) for package in ("server", "retrieval") for path in (ROOT / package).rglob("*.py")
)

# Third-party packages that only some rooms may know.
ONLY_IN = {
    "fastapi": ("server/app.py", "server/api/"),
    "starlette": ("server/app.py", "server/api/"),
    "uvicorn": ("server/run.py",),
    "prometheus_client": ("server/metrics.py",),
    "transformers": ("retrieval/adapter.py", "server/engine/model_runner.py", "server/engine/tokenizer.py"),
    "pydantic": ("server/api/", "server/config.py"),
    "pydantic_settings": ("server/config.py",),
    "llguidance": ("server/engine/grammar.py",),
    "faiss": ("retrieval/index/",),
    "hnswlib": ("retrieval/index/",),
}
# Rooms, and what they must not know.
NEVER = {
    "retrieval/": ("server",),
    "server/api/": ("torch", "retrieval", "server.app", "server.config", "server.metrics"),
    "server/engine/": ("server.api", "server.app", "server.config", "server.metrics", "fastapi"),
    "server/sessions/": ("server.api", "server.app", "server.config", "server.metrics", "server.engine.engine"),
    "server/engine/scheduler.py": ("torch", "retrieval", "server.engine.sampler", "server.engine.model_runner"),
    "server/engine/sampler.py": ("server.engine.scheduler", "server.engine.model_runner", "server.sessions"),
    "server/engine/tokenizer.py": ("server.engine.scheduler", "server.engine.model_runner", "server.sessions", "torch"),
    "server/errors.py": ("server.api", "server.engine", "fastapi"),
    "server/metrics.py": ("server.api", "server.app", "torch"),
    "retrieval/index/": ("retrieval.segments", "retrieval.attention", "retrieval.adapter"),
    "retrieval/segments.py": ("retrieval.adapter", "retrieval.attention"),
}
# The API sees of the engine only what crosses the border.
API_MAY_SEE = tuple(
    f"server.engine.{name}" for name in ("constraint", "events", "grammar", "request", "session_info", "tokenizer")
)


def imports_of(path: Path) -> set[str]:
    """Modules a file imports anywhere, also inside of functions and for types only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_module_imports_only_what_its_room_may_know(path: Path) -> None:
    names = imports_of(path)
    for package, rooms in ONLY_IN.items():
        if not str(path).startswith(rooms):
            assert not {name for name in names if is_in(name, package)}, f"only {rooms} may import {package}"
    for room, packages in NEVER.items():
        if str(path).startswith(room):
            assert not {name for name in names for package in packages if is_in(name, package)}


@pytest.mark.parametrize("path", [path for path in MODULES if str(path).startswith("server/api/")], ids=str)
def test_api_sees_only_the_engines_public_face(path: Path) -> None:
    seen = {name for name in imports_of(path) if is_in(name, "server.engine") and name != "server.engine"}
    assert not {name for name in seen if not any(is_in(name, allowed) for allowed in API_MAY_SEE)}


def test_no_two_modules_import_each_other() -> None:
    known = {str(path.with_suffix("")).replace("/", ".").removesuffix(".__init__"): path for path in MODULES}
    graph = {name: {other for other in imports_of(path) if other in known} - {name} for name, path in known.items()}
    assert not cycle_in(graph)


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Nodes of some cycle, or nothing: what is left when nodes without successors are taken away again and again."""
    left = dict(graph)
    while leaves := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in leaves:
            del left[name]
    return sorted(left)
