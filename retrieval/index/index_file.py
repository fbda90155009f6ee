"""The file an index is saved in: one safetensors file with a described, checksummed payload.

Owns the format version and the checks on reading. Knows nothing of what the payload means, nor of
fsync and rename, which are the caller's.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrieval.index.base import IndexInputError

FORMAT_VERSION = 1


def write_index_file(
    path: Path, kind: str, keys: Tensor, options: dict[str, Any] | None = None, payload: bytes | None = None
) -> None:
    """Write an index of `kind` over `keys`: its build `options` (JSON-able) and an opaque `payload`."""
    header = json.dumps({"format": FORMAT_VERSION, **_identity(kind, keys), "options": options or {}})
    tensor = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
    save_file({"payload": tensor}, path, metadata={"index": header, "crc32": _checksum(header, payload or b"")})


def read_index_file(path: Path, kind: str, keys: Tensor) -> tuple[dict[str, Any], bytes]:
    """The options and payload of a file written for `kind` over `keys`.

    Raises `IndexInputError` if the file is damaged, truncated, missing or was written for another kind,
    format version, or shape or dtype of keys.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text, crc32 = file.metadata()["index"], file.metadata()["crc32"]
            payload = file.get_tensor("payload").numpy().tobytes()
        header = json.loads(text)
        options = dict(header.pop("options"))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexInputError(f"{path} is not an index file: {error}") from error
    expected = {"format": FORMAT_VERSION, **_identity(kind, keys)}
    if header != expected:
        raise IndexInputError(f"{path} was written for {header}, not for {expected}")
    if crc32 != _checksum(text, payload):
        raise IndexInputError(f"{path} is damaged: its checksum does not match")
    return options, payload


def _identity(kind: str, keys: Tensor) -> dict[str, Any]:
    num_keys, head_dim = keys.shape
    return {"kind": kind, "num_keys": num_keys, "head_dim": head_dim, "dtype": str(keys.dtype)}


def _checksum(header: str, payload: bytes) -> str:
    return f"{zlib.crc32(payload, zlib.crc32(header.encode())):08x}"
