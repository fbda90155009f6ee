"""Vector indexes over the keys of one layer and KV head, all behind one contract (`base`)."""

from retrieval.index.base import AttendStats, IndexInputError, KeyIndex, UnknownIndexKindError, build, kind_class

__all__ = ["AttendStats", "IndexInputError", "KeyIndex", "UnknownIndexKindError", "build", "kind_class"]
