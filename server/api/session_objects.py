"""Sessions as the wire shows them."""

from __future__ import annotations

from server.api.wire.sessions import PrefillProgress, SessionListObject, SessionObject, SessionProgress, TierBytes
from server.engine.events import Progress
from server.engine.session_info import SessionBytes, SessionInfo, SessionList


def session_page(found: SessionList) -> SessionListObject:
    """A page as OpenAI's lists have it."""
    page = [session_object(info) for info in found.sessions]
    return SessionListObject(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=found.has_more,
        total=found.num_sessions,
        bytes=_tier_bytes(found.bytes),
    )


def session_object(info: SessionInfo) -> SessionObject:
    """A session as it is shown."""
    is_reading = info.num_prompt_tokens > 0
    return SessionObject(
        id=info.name,
        object="session",
        created_at=int(info.created),
        last_used_at=int(info.last_used),
        state=info.state,
        tokens=info.num_tokens,
        tokens_in_memory=info.num_tokens_in_memory,
        prefill=PrefillProgress(prefilled_tokens=info.num_prefilled_tokens, prompt_tokens=info.num_prompt_tokens)
        if is_reading
        else None,
        index_progress=round(info.index_progress, 4),
        requests=info.num_requests,
        running_requests=info.num_running,
        hits=info.num_hits,
        cached_tokens=info.num_cached_tokens,
        pinned=info.is_pinned,
        pin_expires_at=None if info.pinned_until is None else int(info.pinned_until),
        saved_at=None if info.saved_at is None else int(info.saved_at),
        bytes=_tier_bytes(info.bytes),
        error=info.error,
    )


def _tier_bytes(held: SessionBytes) -> TierBytes:
    return TierBytes(
        host_kv=held.host_kv,
        host_index=held.host_index,
        tail=held.tail,
        disk=held.disk,
        own=held.own,
        shared=held.shared,
    )


def progress_event(name: str, progress: Progress) -> SessionProgress:
    return SessionProgress(
        id=name,
        object="session.progress",
        prefilled_tokens=progress.num_prefilled_tokens,
        prompt_tokens=progress.num_prompt_tokens,
    )
