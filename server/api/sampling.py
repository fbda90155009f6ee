"""From wire fields to the engine's request: defaults, and what must hold for this model's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.caller import Caller
from server.api.service import Service
from server.api.streaming import TextOptions
from server.api.structure import MakeConstraint
from server.api.wire.generation import GenerationRequest
from server.engine.request import Request, SamplingParams
from server.errors import InvalidRequestError

# Checkpoints set these in generation_config.json; they stand where a request says nothing, as in vLLM.
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


MAX_PROMPT_SCORES = 2**18  # one alternative for 128K tokens; about 20 MB of JSON


def engine_request(
    body: GenerationRequest,
    prompt_token_ids: Sequence[int],
    request_id: str,
    service: Service,
    caller: Caller,
    make_constraint: MakeConstraint | None = None,
) -> Request:
    """Raises InvalidRequestError for an empty prompt or ids outside of the vocabulary."""
    if not prompt_token_ids:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt_token_ids),
        sampling=sampling_params(body, service),
        session_id=body.prompt_cache_key or caller.session,
        session_owner=caller.owner,
        cache_salt=caller.salt(body.cache_salt),
        priority=body.priority or 0,
        make_constraint=make_constraint,
    )


def text_options(body: GenerationRequest) -> TextOptions:
    """How the answer's tokens become text."""
    return TextOptions(
        stops=body.stops,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def sampling_params(body: GenerationRequest, service: Service) -> SamplingParams:
    """Raises InvalidRequestError for ids outside of the vocabulary."""
    defaults = SamplingParams()
    chosen = {name: getattr(body, name) for name in MODEL_DEFAULTS}
    merged = {
        name: service.sampling_defaults.get(name, getattr(defaults, name)) if value is None else value
        for name, value in chosen.items()
    }
    bias = tuple((int(key), value) for key, value in (body.logit_bias or {}).items())
    stop_token_ids = tuple(body.stop_token_ids or ())
    check_token_ids([token_id for token_id, _ in bias], service, "logit_bias")
    check_token_ids(stop_token_ids, service, "stop_token_ids")
    return SamplingParams(
        n=body.num_choices,
        max_tokens=body.max_new_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=float(merged["temperature"]),
        top_p=float(merged["top_p"]),
        top_k=int(merged["top_k"]),
        min_p=float(merged["min_p"]),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=float(merged["repetition_penalty"]),
        seed=body.seed,
        logit_bias=bias,
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.num_prompt_logprobs,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
    )


def check_prompt_scores(body: GenerationRequest, num_tokens: int) -> None:
    """Raises InvalidRequestError when the scores of `num_tokens` prompt tokens would be too many."""
    if body.num_prompt_logprobs is None:
        return
    num_scores = num_tokens * (1 + body.num_prompt_logprobs)
    if num_scores > MAX_PROMPT_SCORES:
        param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        raise InvalidRequestError(
            f"'{param}': {num_tokens} prompt tokens with {body.num_prompt_logprobs} alternatives each are {num_scores} "
            f"log-probabilities, at most {MAX_PROMPT_SCORES} are given",
            param=param,
        )


def check_token_ids(token_ids: Sequence[int], service: Service, param: str) -> None:
    """Raises InvalidRequestError when one is not in the vocabulary."""
    highest = max(token_ids, default=0)
    if highest >= service.tokenizer.vocab_size:
        raise InvalidRequestError(
            f"token id {highest} is not in the vocabulary of {service.tokenizer.vocab_size} tokens", param=param
        )
