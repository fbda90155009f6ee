"""The task generator: reproducible, sized as asked, answers that stand in the document, shared prefixes."""

from __future__ import annotations

import pytest

from scripts import tasks

ONE_ANSWER_PER_DOCUMENT = {"cwe", "fwe", "passkey", "number_string"}


def count_tokens(text: str) -> int:
    return len(text) // 4


def make(task: str, *, num_tokens: int = 2000, num_questions: int = 4, seed: int = 7) -> tasks.Context:
    return tasks.make_context(
        task, num_tokens=num_tokens, count_tokens=count_tokens, num_questions=num_questions, seed=seed
    )


@pytest.mark.parametrize("task", tasks.TASKS)
def test_same_seed_gives_same_context(task: str) -> None:
    assert make(task) == make(task)
    assert make(task) != make(task, seed=8)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_document_has_the_size_asked_for(task: str) -> None:
    for num_tokens in (1000, 8000):
        size = count_tokens(make(task, num_tokens=num_tokens).document)
        assert 0.85 * num_tokens <= size <= num_tokens + 30


@pytest.mark.parametrize("task", tasks.TASKS)
def test_document_holds_every_answer_and_reply_scores_full(task: str) -> None:
    context = make(task)
    assert len(context.questions) == (1 if task in ONE_ANSWER_PER_DOCUMENT else 4)
    for question in context.questions:
        assert question.answers
        assert all(answer in context.document for answer in question.answers)
        assert tasks.score(question.reply, question) == 1.0
        assert tasks.score("no idea", question) == 0.0


@pytest.mark.parametrize("task", ["niah_multivalue", "niah_multiquery"])
def test_score_is_the_share_of_answers_found(task: str) -> None:
    question = make(task).questions[0]
    assert tasks.score(question.answers[2], question) == 0.25


def test_needles_are_spread_over_the_whole_document() -> None:
    context = make("niah_single_2", num_tokens=10_000, num_questions=20)
    depths = [context.document.index(question.answers[0]) / len(context.document) for question in context.questions]
    assert min(depths) < 0.1
    assert max(depths) > 0.9


def test_tokens_are_counted_a_handful_of_times() -> None:
    calls: list[int] = []

    def counting(text: str) -> int:
        calls.append(len(text))
        return count_tokens(text)

    tasks.make_context("niah_single_2", num_tokens=20_000, count_tokens=counting, num_questions=20, seed=1)
    assert len(calls) <= 8


@pytest.mark.parametrize("layout", tasks.LAYOUTS)
def test_questions_share_the_document_as_prefix(layout: str) -> None:
    made = make("facts")
    context = tasks.Context(made.document, made.questions, layout)
    first, second = (tasks.messages(context, question) for question in context.questions[:2])
    assert first[:-1] == second[:-1]
    assert first[0]["content"].startswith(context.document)
    assert first[-1]["content"].endswith(context.questions[0].prompt)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown task"):
        make("nope")
    context = make("facts")
    with pytest.raises(ValueError, match="unknown layout"):
        tasks.messages(tasks.Context(context.document, context.questions, "nope"), context.questions[0])
