"""`GET /v1/models` and `GET /v1/models/{name}`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from server.api.documentation import ERRORS
from server.api.service import Service, ServiceDep
from server.api.wire.models import ModelCard, ModelList

router = APIRouter(responses={status: ERRORS[status] for status in (400, 401, 404)})


@router.get("/v1/models")
async def list_models(service: ServiceDep) -> ModelList:
    """Every name under which the model is served."""
    return ModelList(data=[_card(name, service) for name in service.model_names])


@router.get("/v1/models/{name:path}")
async def get_model(name: Annotated[str, Path(min_length=1)], service: ServiceDep) -> ModelCard:
    """One of them."""
    return _card(service.check_model(name), service)


def _card(name: str, service: Service) -> ModelCard:
    return ModelCard(
        id=name, created=service.created, root=service.engine.model_name, max_model_len=service.engine.max_model_len
    )
