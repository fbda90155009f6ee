"""Checksummed safetensors files: written piece by piece, read and checked block by block.

Owns the container: its header, the checksums and what counts as damage. Knows nothing of what the tensors
mean, nor of rename, directories or quotas, which are the caller's. Any thread, one per object.

The header is safetensors' own, so any safetensors reader opens the files. `__metadata__` holds a JSON
`description` with the digest (XXH3-128) of every block, and the digest of the header itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import xxhash

FORMAT_VERSION = 1
ALIGNMENT = 64  # of the first tensor in the file
MAX_HEADER_BYTES = 64 * 2**20  # a longer one is not ours
NO_DIGEST = "0" * 32

Reason = Literal["damaged", "format", "model", "unreadable"]
Buffer = memoryview | bytes


class TensorFileError(Exception):
    """A file that cannot be used, and why: damaged, another format version or model, or unreadable."""

    def __init__(self, path: Path, reason: Reason, text: str) -> None:
        super().__init__(f"{path}: {text}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor to write: its blocks, each in pieces, taken once; every block gets a checksum of its own."""

    name: str
    dtype: str  # as safetensors names it: BF16, I8, ...
    shape: tuple[int, ...]
    num_bytes: int
    num_blocks: int
    blocks: Iterable[Iterable[Buffer]]


def write_tensor_file(path: Path, description: dict[str, Any], tensors: Sequence[TensorSource]) -> int:
    """Write a file and wait until it is on the disk; returns its bytes. What is there already is replaced."""
    digests = {tensor.name: [NO_DIGEST] * tensor.num_blocks for tensor in tensors}
    header_bytes = len(_header(description, tensors, digests))
    with os.fdopen(_open_private(path), "wb", buffering=0) as file:
        file.seek(8 + header_bytes)  # the header comes last: the digests are known then
        for tensor in tensors:
            begin = file.tell()
            digests[tensor.name] = [_write_block(file, block) for block in tensor.blocks]
            assert (len(digests[tensor.name]), file.tell() - begin) == (tensor.num_blocks, tensor.num_bytes)
        header = _header(description, tensors, digests)
        assert len(header) == header_bytes
        file.seek(0)
        _write_all(file, len(header).to_bytes(8, "little") + header)
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def count_bytes(description: dict[str, Any], tensors: Sequence[TensorSource]) -> int:
    """Bytes of the file that `write_tensor_file` would write."""
    digests = {tensor.name: [NO_DIGEST] * tensor.num_blocks for tensor in tensors}
    return 8 + len(_header(description, tensors, digests)) + sum(tensor.num_bytes for tensor in tensors)


class TensorFileReader:
    """An open file whose header is right; `read_block` fills memory with a block that is right."""

    def __init__(self, path: Path) -> None:
        """Raises `TensorFileError` on a file that is not there or not whole."""
        self._path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise TensorFileError(path, "unreadable", f"cannot be opened: {error}") from error
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        header_bytes = int.from_bytes(self._exactly(8), "little")
        if not 0 < header_bytes <= min(MAX_HEADER_BYTES, size - 8):
            raise self.damaged("its header is cut off")
        try:
            header: dict[str, Any] = json.loads(self._exactly(header_bytes))
            metadata = header.pop("__metadata__")
            text, digest = metadata["description"], metadata["header"]
            if digest != _header_digest(text, header):
                raise self.damaged("its header's checksum does not match")
            description = json.loads(text)
            version = description.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self.damaged(f"its header cannot be read ({error!r})") from error
        if version != FORMAT_VERSION:
            raise TensorFileError(self._path, "format", f"is of format {version}, not {FORMAT_VERSION}")
        self._digests: dict[str, list[str]] = description.pop("blocks")
        self._tensors: dict[str, dict[str, Any]] = header
        self.description: dict[str, Any] = description
        self._data_begin = 8 + header_bytes
        if size != self._data_begin + max((t["data_offsets"][1] for t in header.values()), default=0):
            raise self.damaged("it is torn: its size is not what its header says")

    def damaged(self, text: str) -> TensorFileError:
        """The error that says so of this file."""
        return TensorFileError(self._path, "damaged", text)

    def names(self) -> list[str]:
        """Tensors held."""
        return list(self._tensors)

    def check(self, name: str, dtype: str, shape: Sequence[int], num_blocks: int) -> None:
        """Raise `TensorFileError` unless the tensor is there in that form."""
        entry = self._tensors.get(name)
        if entry is None or (entry["dtype"], entry["shape"]) != (dtype, list(shape)):
            raise self.damaged(f"it holds no tensor {name} of {dtype} {list(shape)}")
        if len(self._digests.get(name, [])) != num_blocks:
            raise self.damaged(f"its tensor {name} is not in {num_blocks} blocks")

    def num_bytes(self, name: str) -> int:
        """Bytes of one tensor."""
        begin, end = self._tensors[name]["data_offsets"]
        return int(end - begin)

    def read_block(self, name: str, block: int, out: memoryview) -> None:
        """Fill `out` with one block (all blocks of a tensor have one size); raises if its bytes are not what was
        written. The bytes are checked where they will be used, so that no later change of the file matters."""
        begin = self._tensors[name]["data_offsets"][0] + block * out.nbytes
        try:
            self._file.seek(self._data_begin + begin)
            self._fill(out)
        except OSError as error:
            raise TensorFileError(self._path, "unreadable", f"cannot be read: {error}") from error
        if xxhash.xxh3_128_hexdigest(out) != self._digests[name][block]:
            raise self.damaged(f"a checksum of its tensor {name} does not match")

    def verify(self) -> None:
        """Read and check every block; raises on the first that is not what was written."""
        for name in self._tensors:
            num_blocks = max(1, len(self._digests[name]))
            out = memoryview(bytearray(self.num_bytes(name) // num_blocks))
            for block in range(num_blocks):
                self.read_block(name, block, out)

    def _exactly(self, count: int) -> bytes:
        out = bytearray(count)
        try:
            self._fill(memoryview(out))
        except OSError as error:
            raise TensorFileError(self._path, "unreadable", f"cannot be read: {error}") from error
        return bytes(out)

    def _fill(self, out: memoryview) -> None:
        while out.nbytes:
            count = self._file.readinto(out)
            if not count:
                raise self.damaged("it ends too early")
            out = out[count:]


def _open_private(path: Path) -> int:
    """For its owner alone: keys and values tell what the prompt was."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)


def _header(description: dict[str, Any], tensors: Sequence[TensorSource], digests: dict[str, list[str]]) -> bytes:
    """Safetensors' header, padded with spaces so that the data are aligned."""
    text = json.dumps({"format": FORMAT_VERSION, **description, "blocks": digests})
    entries: dict[str, Any] = {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    metadata = {"description": text, "header": _header_digest(text, entries)}
    encoded = json.dumps({"__metadata__": metadata, **entries}).encode()
    return encoded + b" " * (-(len(encoded) + 8) % ALIGNMENT)


def _header_digest(text: str, entries: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest((text + json.dumps(entries, sort_keys=True)).encode())


def _write_block(file: Any, pieces: Iterable[Buffer]) -> str:
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
        _write_all(file, piece)
    return digest.hexdigest()


def _write_all(file: Any, data: Buffer) -> None:
    """A raw write may take less than all of it, as on a disk that is filling up."""
    left = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
    while left.nbytes:
        left = left[file.write(left) :]
