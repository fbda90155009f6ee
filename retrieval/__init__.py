"""Retrieval attention: a segmented KV store in host memory and vector indexes over its keys."""
