"""Log-probabilities in the shapes of both completion endpoints, and vLLM's of prompts.

Those of a prompt may be many: they are put together on a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from server.api.streaming import ScoredToken
from server.api.wire.chat import ChatLogprobs, ContentLogprob, TopLogprob
from server.api.wire.completions import CompletionLogprobs
from server.api.wire.generation import PromptLogprob, PromptLogprobsByToken
from server.engine.events import PromptLogprobs, TokenLogprob
from server.engine.tokenizer import Detokenizer, Tokenizer

FLOOR = -9999.0  # JSON has no infinity; OpenAI's stand-in for impossible tokens


def chat_logprobs(tokens: Sequence[ScoredToken], tokenizer: Tokenizer) -> ChatLogprobs:
    """One entry per token, with its bytes, since a token may be part of a character."""
    return ChatLogprobs(content=[_content(token, tokenizer) for token in tokens], refusal=None)


def completion_logprobs(tokens: Sequence[ScoredToken], tokenizer: Tokenizer, num_top: int) -> CompletionLogprobs:
    """Parallel lists; as in OpenAI's API, the chosen token is among the alternatives even when it is none of them."""
    return CompletionLogprobs(
        tokens=[tokenizer.token_text(token.logprob.token_id) for token in tokens],
        token_logprobs=[max(token.logprob.logprob, FLOOR) for token in tokens],
        top_logprobs=[_alternatives(token, tokenizer) for token in tokens] if num_top else None,
        text_offset=[token.text_offset for token in tokens],
    )


async def prompt_logprobs(scores: PromptLogprobs | None, tokenizer: Tokenizer) -> PromptLogprobsByToken:
    """One entry per prompt token, null for the first one; `scores` is None for a prompt of one token."""

    def entry(token_ids: list[int], logprobs: list[float], rank: int) -> dict[str, PromptLogprob]:
        listed: dict[str, PromptLogprob] = {}  # the token that stands there first, as vLLM has it
        for token_id, logprob, place in zip(token_ids, logprobs, [rank, *range(1, len(token_ids))], strict=True):
            text = tokenizer.token_text(token_id)
            listed.setdefault(str(token_id), PromptLogprob(logprob=logprob, rank=place, decoded_token=text))
        return listed

    def entries() -> PromptLogprobsByToken:
        if scores is None:
            return [None]
        columns = (scores.token_ids.tolist(), scores.logprobs.tolist(), scores.ranks.tolist())
        return [None, *(entry(*row) for row in zip(*columns, strict=True))]

    return await asyncio.to_thread(entries)


async def echoed_logprobs(
    prompt: Sequence[int], scores: PromptLogprobs | None, tokenizer: Tokenizer, num_top: int
) -> CompletionLogprobs:
    """Those of a prompt that is echoed, as the beginning of the answer's; nothing is known of its first token."""

    def joined() -> CompletionLogprobs:
        offsets, num_chars = [], 0
        detokenizer = Detokenizer(tokenizer)
        for token_id in prompt:
            offsets.append(num_chars)
            num_chars += len(detokenizer.push(token_id))
        rows = [] if scores is None else [*zip(scores.token_ids.tolist(), scores.logprobs.tolist(), strict=True)]
        top = [
            {tokenizer.token_text(token_id): logprob for token_id, logprob in [*zip(ids, ps, strict=True)][::-1]}
            for ids, ps in rows
        ]
        return CompletionLogprobs(
            tokens=[tokenizer.token_text(token_id) for token_id in prompt],
            token_logprobs=[None, *(logprobs[0] for _, logprobs in rows)],
            top_logprobs=[None, *top] if num_top else None,
            text_offset=offsets,
        )

    return await asyncio.to_thread(joined)


def followed_by(first: CompletionLogprobs | None, then: CompletionLogprobs, num_chars: int) -> CompletionLogprobs:
    """Both in one; the text of `first` has `num_chars` characters."""
    then.text_offset = [num_chars + offset for offset in then.text_offset]
    if first is None:
        return then
    has_top = first.top_logprobs is not None and then.top_logprobs is not None
    return CompletionLogprobs(
        tokens=first.tokens + then.tokens,
        token_logprobs=first.token_logprobs + then.token_logprobs,
        top_logprobs=[*(first.top_logprobs or ()), *(then.top_logprobs or ())] if has_top else None,
        text_offset=first.text_offset + then.text_offset,
    )


def _content(token: ScoredToken, tokenizer: Tokenizer) -> ContentLogprob:
    chosen = _top(token.logprob, tokenizer)
    return ContentLogprob(
        token=chosen.token,
        logprob=chosen.logprob,
        bytes=chosen.bytes,
        top_logprobs=[_top(other, tokenizer) for other in token.top],
    )


def _top(scored: TokenLogprob, tokenizer: Tokenizer) -> TopLogprob:
    raw = tokenizer.token_bytes(scored.token_id)
    return TopLogprob(token=raw.decode(errors="replace"), logprob=max(scored.logprob, FLOOR), bytes=list(raw))


def _alternatives(token: ScoredToken, tokenizer: Tokenizer) -> dict[str, float]:
    scored = (*token.top, token.logprob)
    return {tokenizer.token_text(other.token_id): max(other.logprob, FLOOR) for other in scored}
