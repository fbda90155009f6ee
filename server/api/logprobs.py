"""Log-probabilities in the shapes of both completion endpoints."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.streaming import ScoredToken
from server.api.wire.chat import ChatLogprobs, ContentLogprob, TopLogprob
from server.api.wire.completions import CompletionLogprobs
from server.engine.events import TokenLogprob
from server.engine.tokenizer import Tokenizer

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
