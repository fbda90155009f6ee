"""Work for a client that may go away: an answer in one piece is given up as soon as nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import Request, Response

from server.api.sse import disconnected

CLIENT_CLOSED_REQUEST = 499  # nginx's; only the log sees it


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The answer of `work`, which is cancelled when the client disconnects."""
    answer = asyncio.create_task(work)
    gone = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)
