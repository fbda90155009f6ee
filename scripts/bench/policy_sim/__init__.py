"""Traces of requests and a cache under them, for comparing eviction policies."""
