"""The command line: `retrieval-server serve [flags]`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from server import config, memory
from server.config import Settings

USAGE = """usage: retrieval-server serve [flags]

  serve    serve a model behind OpenAI's API; `retrieval-server serve --help` explains every flag
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after an orderly end, 1 after a failure, 2 for wrong arguments."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] != ["serve"]:
        wants_help = given[:1] in (["-h"], ["--help"])
        (sys.stdout if wants_help else sys.stderr).write(USAGE)
        return 0 if wants_help else 2
    try:
        settings = config.load(given[1:])
    except ValueError as error:
        sys.stderr.write(f"retrieval-server: {error}\n")
        return 2
    return serve(settings)


def serve(settings: Settings) -> int:
    """Loads the model, then listens until SIGTERM, SIGINT or the engine's death."""
    level = "DEBUG" if settings.uvicorn_log_level == "trace" else settings.uvicorn_log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    limit_kernel_caches()
    limit_spinning()
    memory.limit_arenas()
    memory.map_large_blocks()
    from server.run import run  # torch and transformers take seconds to import, which --help need not wait for

    return run(settings)


def limit_kernel_caches(num_shapes: int = 32) -> None:
    """Bound what torch's CPU backend keeps of compiled products: half a megabyte for every number of rows ever seen.

    Both of its caches hold 1024 by default, and are sized once, when torch first computes.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(num_shapes))


def limit_spinning(num_turns: int = 1000) -> None:
    """Let torch's threads sleep soon when they wait for each other, instead of holding a core for milliseconds that
    the event loop, the native threads or other processes need; on two busy cores that costs ten times the work."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(num_turns))


if __name__ == "__main__":
    sys.exit(main())
