"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter

from server.api.conversation import encode_conversation
from server.api.documentation import ERRORS
from server.api.sampling import check_token_ids
from server.api.service import Service, ServiceDep
from server.api.wire.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

router = APIRouter(responses={status: ERRORS[status] for status in (400, 401, 404, 413)})


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> TokenizeResponse:
    """The token ids of a prompt, or of messages as the chat endpoint would read them."""
    service.check_model(body.model)
    tokens = await _token_ids(body, service)
    names = [service.tokenizer.token_name(i) for i in tokens] if body.return_token_strs else None
    return TokenizeResponse(
        count=len(tokens), max_model_len=service.engine.max_model_len, tokens=list(tokens), token_strs=names
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> DetokenizeResponse:
    """The text of token ids, special tokens included."""
    service.check_model(body.model)
    check_token_ids(body.tokens, service, "tokens")
    return DetokenizeResponse(prompt=await service.tokenizer.decode_off_loop(body.tokens, skip_special_tokens=False))


async def _token_ids(body: TokenizeRequest, service: Service) -> tuple[int, ...]:
    if body.messages is None:
        return await service.tokenizer.encode(
            body.prompt or "", add_special_tokens=body.add_special_tokens is not False
        )
    return await encode_conversation(
        body.messages,
        service.tokenizer,
        tools=body.tools or [],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=bool(body.add_special_tokens),
        template_kwargs=body.chat_template_kwargs,
    )
