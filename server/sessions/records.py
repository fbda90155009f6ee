"""Files of saved sessions: name and token ids, so that a session is known again after a restart.

One file per session, named by a hash, so that no name leads out of the folder; written beside, flushed and renamed.
A file that cannot be read, or was written for another model, is passed over. Knows nothing of K and V. Whose session
it is stands there as a digest: neither API keys nor salts are stored.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrieval.segments import TokenIds

logger = logging.getLogger(__name__)

FORMAT = 1
SUFFIX = ".session"


@dataclass(frozen=True, slots=True, eq=False)
class SessionRecord:
    """What outlives the process. Times are seconds since 1970."""

    tenant: str  # of `tenant_tag`
    name: str
    created: float
    saved_at: float
    token_ids: TokenIds


class SessionRecords:
    """A folder of records of one model; made when the first one is written. Readable by this user only."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder, self._model = folder, model

    def load(self) -> list[SessionRecord]:
        """All records of this model; what cannot be read is logged and passed over."""
        return list(self._readable())

    def write(self, record: SessionRecord) -> None:
        """Keep a record; it replaces an older one whole, or not at all. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(record.tenant, record.name)
        beside = path.with_suffix(".new")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_encoded(record, self._model))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        self._flush_folder()

    def delete(self, tenant: str, name: str) -> None:
        """Forget a record; one that is not there is forgotten already."""
        self._path(tenant, name).unlink(missing_ok=True)

    def _readable(self) -> Iterator[SessionRecord]:
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            try:
                record = _decoded(path.read_bytes(), self._model)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                logger.warning("the session in %s is passed over: %s", path, error)
                continue
            if path == self._path(record.tenant, record.name):
                yield record

    def _path(self, tenant: str, name: str) -> Path:
        return self._folder / f"{_digest(tenant, name)}{SUFFIX}"

    def _flush_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def tenant_tag(owner: str, salt: str) -> str:
    """Tells tenants apart without telling who they are."""
    return _digest(owner, salt)


def _digest(*parts: str) -> str:
    """Of all parts, each with its length, so that no two lists of them are taken for one another."""
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()


def _encoded(record: SessionRecord, model: str) -> bytes:
    """A line with the checksum of the rest, then JSON."""
    body = json.dumps(
        {
            "format": FORMAT,
            "model": model,
            "tenant": record.tenant,
            "name": record.name,
            "created": record.created,
            "saved_at": record.saved_at,
            "token_ids": base64.b64encode(record.token_ids.astype("<i4").tobytes()).decode(),
        }
    ).encode()
    return _checksum(body) + b"\n" + body


def _decoded(content: bytes, model: str) -> SessionRecord:
    """Raises ValueError, KeyError or TypeError for what `_encoded` did not write for this model."""
    checksum, _, body = content.partition(b"\n")
    if checksum != _checksum(body):
        raise ValueError("it is damaged")
    said = json.loads(body)
    if (said["format"], said["model"]) != (FORMAT, model):
        raise ValueError("it was written for another model or in another format")
    ids = np.frombuffer(base64.b64decode(said["token_ids"]), dtype="<i4").astype(np.int32)
    return SessionRecord(said["tenant"], said["name"], said["created"], said["saved_at"], ids)


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).hexdigest().encode()
