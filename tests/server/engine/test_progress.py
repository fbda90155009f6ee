"""Progress of long prefills: the bar's figures, and who is worth a line."""

from __future__ import annotations

import logging

import pytest

from server.engine.progress import BAR_WIDTH, LONG_PROMPT_TOKENS, PrefillProgress, progress_bar


@pytest.mark.parametrize(("done", "percent", "filled"), [(0, 0, 0), (65536, 50, 15), (131072, 100, BAR_WIDTH)])
def test_bar_is_as_long_as_what_is_done(done: int, percent: int, filled: int) -> None:
    bar = "#" * filled + "." * (BAR_WIDTH - filled)
    assert progress_bar(done, 131072) == f"[{bar}] {done}/131072 tokens ({percent} %)"


def test_bar_of_nothing() -> None:
    assert progress_bar(0, 0).endswith("0/0 tokens (0 %)")


def test_only_long_prompts_are_shown_and_their_end_always(caplog: pytest.LogCaptureFixture) -> None:
    progress = PrefillProgress(interval_seconds=3600.0)
    progress._is_terminal = False
    progress._interval, progress._last = 3600.0, 0.0
    with caplog.at_level(logging.INFO):
        progress.show("short", LONG_PROMPT_TOKENS - 1, LONG_PROMPT_TOKENS - 1)
        progress.show("long", LONG_PROMPT_TOKENS, LONG_PROMPT_TOKENS)
    assert [record.getMessage().split()[1] for record in caplog.records] == ["long"]
