"""Who calls, and what a call's headers say of its session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

from server.api.wire.base import Name, SessionName
from server.engine.session_info import SessionKey


@dataclass(frozen=True, slots=True)
class Caller:
    """Sessions are found by all three: of one owner, under one salt, by name."""

    owner: str = ""  # a digest of the API key; empty where none is asked for
    session: str | None = None  # X-Session-Id
    cache_salt: str | None = None  # X-Cache-Salt

    def salt(self, in_body: str | None = None) -> str:
        """The body's word stands before the header's."""
        return in_body or self.cache_salt or ""

    def key(self, name: str, salt_in_body: str | None = None) -> SessionKey:
        """The caller's session of that name."""
        return SessionKey(self.owner, self.salt(salt_in_body), name)


async def _caller(
    request: Request,
    x_session_id: Annotated[SessionName | None, Header()] = None,
    x_cache_salt: Annotated[Name | None, Header()] = None,
) -> Caller:
    return Caller(getattr(request.state, "owner", ""), x_session_id, x_cache_salt)


CallerDep = Annotated[Caller, Depends(_caller)]
