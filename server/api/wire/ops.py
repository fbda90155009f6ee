"""`/health` and `/version`."""

from __future__ import annotations

from typing import Literal

from server.api.wire.base import WireResponse


class Health(WireResponse):
    """The engine runs."""

    status: Literal["ok"] = "ok"


class Version(WireResponse):
    """The package's version."""

    version: str
