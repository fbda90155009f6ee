"""StopFinder: stop strings in a growing text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.stops import StopFinder


def run(finder: StopFinder, pieces: list[str]) -> str:
    shown = ""
    for piece in pieces:
        shown += finder.push(piece)
        if finder.found is not None:
            return shown
    return shown + finder.flush()


def test_text_without_stops_passes_at_once() -> None:
    assert StopFinder([]).push("abc") == "abc"


def test_beginning_of_a_stop_is_held_back_until_it_is_none() -> None:
    finder = StopFinder(["STOP"])
    assert [finder.push(piece) for piece in ["a S", "T", "ART"]] == ["a ", "", "START"]


def test_stop_across_pieces_ends_the_text_before_it() -> None:
    finder = StopFinder(["STOP"])
    assert run(finder, ["go S", "TO", "P on"]) == "go "
    assert finder.found == "STOP"


def test_stop_is_shown_when_asked_for() -> None:
    assert run(StopFinder(["\n\n"], include_stop=True), ["a\n", "\nb"]) == "a\n\n"


def test_the_earliest_stop_wins_and_of_equal_starts_the_longest() -> None:
    finder = StopFinder(["b", "ab", "abc"])
    assert run(finder, ["xabcb"]) == "x"
    assert finder.found == "abc"


def test_a_held_beginning_inside_a_failed_match_is_not_lost() -> None:
    finder = StopFinder(["aab"])
    assert run(finder, list("aaab!")) == "a"
    assert finder.found == "aab"


def test_text_before_min_tokens_is_not_searched() -> None:
    finder = StopFinder(["stop"])
    assert finder.push("stop", is_armed=False) == "stop"
    assert finder.found is None
    assert finder.push(" stop") == " "


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_shown_text_is_the_text_up_to_the_first_stop(text: str, stops: list[str], size: int) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    first = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    finder = StopFinder(stops)
    shown = run(finder, pieces)
    if first is None:
        assert (shown, finder.found) == (text, None)
    else:  # a stop that ends earlier may be seen before one that starts earlier
        assert finder.found is not None
        assert text.startswith(shown + finder.found)
        assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize("size", [1, 3])
def test_nothing_is_lost_when_the_text_ends_inside_a_beginning(size: int) -> None:
    text = "end of a sto"
    assert run(StopFinder(["stop"]), [text[i : i + size] for i in range(0, len(text), size)]) == text
