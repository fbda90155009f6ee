"""Attention methods: one file each behind one base."""

from retrieval.methods.base import AttentionMethod
from retrieval.methods.full import FullAttention
from retrieval.methods.retrieval import RetrievalAttention
from retrieval.methods.snapkv import SnapKvAttention
from retrieval.methods.streaming import StreamingAttention

METHODS = ("retrieval", "full", "streaming", "snapkv")

__all__ = ["METHODS", "AttentionMethod", "make_method"]


def make_method(name: str, *, num_retrieved: int, num_index_queries: int = 0) -> AttentionMethod:
    """The method of that name. Raises `ValueError` on an unknown one."""
    match name:
        case "retrieval":
            return RetrievalAttention(num_index_queries)
        case "full":
            return FullAttention()
        case "streaming":
            return StreamingAttention()
        case "snapkv":
            return SnapKvAttention(num_kept=num_retrieved)
    raise ValueError(f"unknown attention method {name!r}; known: {', '.join(METHODS)}")
