"""What the kinds built on faiss share: growing, counting and writing a `faiss.Index`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np

from retrieval.index.library import Floats, LibraryIndex


class FaissIndex(LibraryIndex):
    """A kind whose structure is a `faiss.Index` with inner products as its metric."""

    def _append(self, structure: Any, vectors: Floats) -> None:
        structure.add(vectors)

    def _dump(self, structure: Any) -> bytes:
        return bytes(faiss.serialize_index(structure).data)

    def _restore(self, payload: bytes) -> Any:
        return faiss.deserialize_index(np.frombuffer(payload, dtype=np.uint8))


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep faiss to the calling thread: many tiny parallel loops spend their time waiting for each other,
    the more so while a model runs on the other cores. OpenMP keeps this setting per calling thread."""
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(num_threads)
