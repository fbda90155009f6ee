"""Chooses the next token of each sequence from its logits. Each sequence has its own random stream, so that
the same seed gives the same text whatever else is in the batch.

Order, as in vLLM: logprobs, logit bias and forbidden tokens, penalties, temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.engine.constraint import LogitsConstraint
from server.engine.events import PromptLogprobs, TokenLogprob
from server.engine.request import SamplingParams

GREEDY_TEMPERATURE = 1e-5  # below it softmax is one-hot, and float32 may turn the temperature into 0; as in vLLM
NOT_FINITE = "the logits are not finite, or no token may be chosen"
MIN_LOGPROB = -9999.0  # what OpenAI reports for an impossible token; JSON has no infinity


class NonFiniteLogitsError(RuntimeError):
    """The model gave NaN, or no finite logit at all, for this sequence."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token and, when asked for, log-probabilities before temperature and filters."""

    token_id: int
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class SamplerState:
    """One sequence's random stream, token counts and grammar."""

    generator: torch.Generator
    prompt_mask: Tensor | None  # bool [vocab_size]: occurs in the prompt; only with a repetition penalty
    counts: Tensor | None  # float32 [vocab_size]: generated so far; only with penalties
    constraint: LogitsConstraint | None = None  # what the tokens have to follow


def make_state(
    params: SamplingParams,
    prompt: tuple[int, ...],
    choice: int,
    seed: int,
    vocab_size: int,
    constraint: LogitsConstraint | None = None,
) -> SamplerState:
    """A fresh state; `seed` is the request's own or one drawn for it, choices differ."""
    generator = torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * choice) % 2**63)
    mask = None
    if params.repetition_penalty != 1.0:
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[torch.tensor(prompt, dtype=torch.int64)] = True
    penalised = params.presence_penalty or params.frequency_penalty or mask is not None
    return SamplerState(generator, mask, torch.zeros(vocab_size) if penalised else None, constraint)


def sample(
    logits: Tensor, params: SamplingParams, state: SamplerState, num_generated: int, end_ids: frozenset[int]
) -> Sampled:
    """The next token of one sequence: logits float32 `[vocab_size]` on the CPU, not changed.

    end_ids: eos and stop tokens, forbidden until `min_tokens` were generated. Raises `NonFiniteLogitsError`.
    """
    chosen_from = penalise(_bias(logits, params, state, num_generated, end_ids), params, state)
    if bool(torch.isnan(chosen_from).any()) or not bool(torch.isfinite(chosen_from.max())):
        raise NonFiniteLogitsError(NOT_FINITE)
    token_id = int(chosen_from.argmax()) if _is_greedy(params) else _draw(chosen_from, params, state)
    if state.counts is not None:
        state.counts[token_id] += 1
    if state.constraint is not None:
        state.constraint.accept(token_id)
    return _with_logprobs(token_id, logits, params.num_logprobs)


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's logits `[vocab_size]` and all that its next token hangs on, as for `sample`."""

    logits: Tensor
    params: SamplingParams
    state: SamplerState
    num_generated: int
    end_ids: frozenset[int]

    @property
    def is_plain(self) -> bool:
        """Whether the token hangs on logits, temperature and the random stream alone."""
        p, state = self.params, self.state
        has_filter = p.min_p > 0.0 or p.top_k > 0 or p.top_p < 1.0
        is_free = state.constraint is None and state.counts is None and not p.logit_bias
        return is_free and (_is_greedy(p) or not has_filter) and self.num_generated >= p.min_tokens


def sample_rows(rows: list[Row]) -> list[Sampled | Exception]:
    """`sample` for each row, or what it raised; plain rows take a few calls together instead of a few each."""
    results: dict[int, Sampled | Exception] = {}
    plain = [i for i, row in enumerate(rows) if row.is_plain]
    results |= zip(plain, _sample_plain([rows[i] for i in plain]) if plain else [], strict=True)
    for i, row in enumerate(rows):
        if i not in results:
            try:
                results[i] = sample(row.logits, row.params, row.state, row.num_generated, row.end_ids)
            except Exception as error:
                results[i] = error
    return [results[i] for i in range(len(rows))]


def _sample_plain(rows: list[Row]) -> list[Sampled | Exception]:
    logits = torch.stack([row.logits for row in rows]) if len(rows) > 1 else rows[0].logits[None]
    ids = logits.numpy().argmax(axis=-1)  # the first NaN where there is one; a tenth of what torch's takes
    best = logits.numpy()[np.arange(len(rows)), ids]
    drawn = [i for i, row in enumerate(rows) if not _is_greedy(row.params)]
    if drawn:
        temperatures = torch.tensor([rows[i].params.temperature for i in drawn])
        scaled = (logits[drawn] - torch.from_numpy(best[drawn])[:, None]) / temperatures[:, None]
        noise = torch.empty_like(scaled)
        for own, i in zip(noise, drawn, strict=True):
            own.exponential_(generator=rows[i].state.generator)
        ids[drawn] = (scaled - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()).argmax(dim=-1).numpy()
    return [
        _with_logprobs(token_id, row.logits, row.params.num_logprobs)
        if math.isfinite(most)
        else NonFiniteLogitsError(NOT_FINITE)
        for token_id, row, most in zip(ids.tolist(), rows, best.tolist(), strict=True)
    ]


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_TEMPERATURE


def _bias(
    logits: Tensor, params: SamplingParams, state: SamplerState, num_generated: int, end_ids: frozenset[int]
) -> Tensor:
    """Logit bias, and what grammar and `min_tokens` forbid.

    A grammar that has been followed to its end leaves only the end tokens: `min_tokens` yields to it then.
    """
    forbidden = end_ids if num_generated < params.min_tokens else frozenset[int]()
    if not forbidden and not params.logit_bias and state.constraint is None:
        return logits
    logits = logits.clone()
    for token_id, bias in params.logit_bias:
        logits[token_id] += bias
    if state.constraint is not None:
        allowed = torch.from_numpy(state.constraint.allowed_tokens(len(logits)))
        logits = logits.masked_fill(~allowed, float("-inf"))
    longer = logits.index_fill(0, torch.tensor(list(forbidden), dtype=torch.int64), float("-inf"))
    is_at_end = state.constraint is not None and bool(torch.isneginf(longer.max()))
    return logits if is_at_end else longer


def penalise(logits: Tensor, params: SamplingParams, state: SamplerState) -> Tensor:
    """Logits `[vocab_size]` less the penalties for what prompt and answer hold."""
    if state.counts is None:
        return logits
    generated = state.counts > 0
    if state.prompt_mask is not None:
        seen = generated | state.prompt_mask
        penalty = params.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    return logits - params.frequency_penalty * state.counts - params.presence_penalty * generated


def _draw(logits: Tensor, params: SamplingParams, state: SamplerState) -> int:
    """A draw by the Gumbel-max trick: the largest of logit / temperature plus noise per token.

    Against inverting the cumulative distribution: a rounding error in the logits moves no boundary of other tokens.
    """
    scaled = (logits - logits.max()) / params.temperature
    if params.min_p > 0.0 or params.top_k > 0 or params.top_p < 1.0:
        ordered, order = torch.sort(torch.softmax(scaled, dim=-1), descending=True, stable=True)
        scaled[order[~_kept(ordered, params)]] = float("-inf")
    noise = torch.empty_like(scaled).exponential_(generator=state.generator).clamp_min(torch.finfo(scaled.dtype).tiny)
    return int((scaled - noise.log()).argmax())


def _kept(ordered: Tensor, params: SamplingParams) -> Tensor:
    """Which of the probabilities, in descending order, pass min_p, top_k and top_p; the first always does."""
    keep = ordered >= params.min_p * ordered[0]
    if params.top_k > 0:
        keep[params.top_k :] = False
    if params.top_p < 1.0:
        kept = torch.where(keep, ordered, 0.0)
        before = kept.cumsum(0) - kept
        keep &= before < params.top_p * kept.sum()
    keep[0] = True
    return keep


def score_prompt(logits: Tensor, start: int, token_ids: list[int], num_top: int) -> PromptLogprobs:
    """How likely each of `token_ids`, the first of which stands at `start`, was after what precedes it.

    logits: float32 `[len(token_ids), vocab_size]`, of the rows before them. Raises `NonFiniteLogitsError`.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    if bool(torch.isnan(logprobs).any()):
        raise NonFiniteLogitsError("the logits are not finite")
    ids = torch.tensor(token_ids)[:, None]
    own = logprobs.gather(1, ids)
    best, best_ids = torch.topk(logprobs, min(num_top, logprobs.shape[-1]), dim=-1)
    return PromptLogprobs(
        start,
        torch.cat((ids, best_ids), dim=1).to(torch.int32).numpy(),
        torch.cat((own, best), dim=1).clamp_min(MIN_LOGPROB).numpy(),
        (logprobs > own).sum(-1, dtype=torch.int32).numpy() + 1,
    )


def _with_logprobs(token_id: int, logits: Tensor, num_logprobs: int | None) -> Sampled:
    """Logprobs are the model's own, before bias, penalties and temperature, as in vLLM."""
    if num_logprobs is None:
        return Sampled(token_id)
    logprobs = torch.log_softmax(logits, dim=-1).clamp_min(MIN_LOGPROB)
    top = torch.topk(logprobs, min(num_logprobs, len(logprobs)))
    listed = tuple(TokenLogprob(int(i), float(p)) for p, i in zip(*top, strict=True))
    return Sampled(token_id, TokenLogprob(token_id, float(logprobs[token_id])), listed)
