"""What a request took, on the wire."""

from __future__ import annotations

from server.api.streaming import TextUsage
from server.api.wire.generation import PromptTokensDetails, RetrievalDetails, UsageInfo


def usage_so_far(num_prompt_tokens: int, num_tokens: int) -> UsageInfo:
    """Of one choice, while it grows."""
    return UsageInfo(
        prompt_tokens=num_prompt_tokens, completion_tokens=num_tokens, total_tokens=num_prompt_tokens + num_tokens
    )


def usage_info(usage: TextUsage) -> UsageInfo:
    """OpenAI's usage object with our extension."""
    return UsageInfo(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_generated_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_generated_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.num_cached_tokens),
        retrieval_details=RetrievalDetails(share_scanned=usage.share_scanned),
    )
