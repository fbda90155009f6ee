"""`/v1/models`, with vLLM's `max_model_len` and `root`."""

from __future__ import annotations

from typing import Literal

from server.api.wire.base import WireResponse


class ModelCard(WireResponse):
    """One name under which the model is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "retrieval-server"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(WireResponse):
    """All names, the reported one first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
