"""For operators: `/health`, `/version`, `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from server.api.documentation import ERRORS
from server.api.service import ServiceDep
from server.api.wire.ops import Health, Version
from server.errors import UnavailableError

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter()


@router.get("/health", responses={503: ERRORS[503]})
async def health(service: ServiceDep) -> Health:
    """Whether the engine can answer; needs no API key."""
    if not service.engine.is_alive:
        raise UnavailableError("the engine is dead", code="engine_dead")
    return Health()


@router.get("/version", responses={401: ERRORS[401]})
async def version(service: ServiceDep) -> Version:
    """The server's version."""
    return Version(version=service.version)


@router.get("/metrics", response_class=PlainTextResponse, responses={401: ERRORS[401]})
async def metrics(service: ServiceDep) -> Response:
    """Prometheus' text format."""
    return Response(service.render_metrics(), media_type=METRICS_TYPE)
