"""An answer in one piece as JSON; large ones are written on a thread, so that they hold up no stream."""

from __future__ import annotations

import asyncio

from fastapi import Response
from pydantic import BaseModel


async def json_response(answer: BaseModel, *, is_large: bool = False, exclude_unset: bool = False) -> Response:
    """`exclude_unset`: write only the fields that were set."""

    def write() -> str:
        return answer.model_dump_json(exclude_unset=exclude_unset)

    return Response(await asyncio.to_thread(write) if is_large else write(), media_type="application/json")
