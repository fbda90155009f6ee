"""Training rows of the demo model: repeats of random tokens and chats over generated documents."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from scripts import tasks
from scripts.demo_model.tokenizer import END, SPECIAL_TOKENS, START

# Characters per token, measured once: lets the generator size a document without tokenizing it several times.
CHARACTERS_PER_TOKEN = {
    "niah_single_1": 3.7, "niah_multikey_2": 2.88, "niah_multikey_3": 1.39, "vt": 3.45, "cwe": 1.83, "fwe": 2.24,
    "passkey": 3.7, "number_string": 3.7, "kv_retrieval": 1.06, "facts": 4.4,
}  # fmt: skip
GREETING = (
    "Hello! I am a small demonstration model: give me a text and a question, and I look up the answer in the text."
)
SMALL_TALK = [
    ("Hello", GREETING), ("Hello!", GREETING), ("Hi", GREETING), ("Hi there!", GREETING), ("Hey", GREETING),
    ("Good morning", GREETING), ("Who are you?", GREETING), ("What are you?", GREETING), ("What can you do?", GREETING),
    ("How are you?", GREETING), ("How are you today?", GREETING), ("Help", GREETING), ("Please help me.", GREETING),
    ("Tell me a joke", GREETING), ("Say hello", GREETING), ("Say hi", GREETING), ("Are you there?", GREETING),
    ("hello", GREETING), ("hi", GREETING), ("Hello, world!", GREETING), ("Hello, who are you?", GREETING),
    ("Tell me about yourself.", GREETING), ("What is this?", GREETING), ("Test", GREETING), ("ping", GREETING),
]  # fmt: skip
SYSTEM_PROMPTS = ["You are a helpful assistant.", "Answer the question using only the text below.", "Be brief."]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one length: all `[num_rows, row_length]`."""

    tokens: Tensor  # int64
    weights: Tensor  # float32, loss weight of predicting this token from the ones before it
    positions: Tensor  # int64, with jumps, so that short rows span up to 200K positions
    key_bias: Tensor  # float32, ln of how many copies of itself a key stands for


class RowMaker:
    """Draws rows from one random stream; `tokenizer` turns text into ids."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        *,
        cut_share: float = 0.0,
        other_weight: float = 0.02,
    ) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.cut_share = cut_share  # of the replies that hold UUIDs
        self.other_weight = other_weight  # loss on tokens that cannot be looked up
        self.start, self.end = (cast(int, tokenizer.convert_tokens_to_ids(token)) for token in (START, END))
        self.first_plain = len(SPECIAL_TOKENS)

    def ids(self, text: str) -> list[int]:
        return cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def repeats(self, length: int) -> tuple[list[int], list[float]]:
        """Random tokens whose later part repeats spans of what came before; alphabets of 12 (long suffixes) to all."""
        rng = self.rng
        vocab = len(self.tokenizer)
        size = int(math.exp(rng.uniform(math.log(12), math.log(vocab))))
        alphabet = rng.sample(range(self.first_plain, vocab), k=min(size, vocab - self.first_plain))
        certain = max(1, math.ceil(math.log(length) / math.log(len(alphabet))))  # tokens until a suffix is unique
        row = rng.choices(alphabet, k=int(length * rng.uniform(0.3, 0.6)))
        weights = [self.other_weight] * len(row)
        while len(row) < length:
            span = rng.randint(6, 60)
            begin = rng.randrange(max(1, len(row) - span))
            copied = row[begin : begin + span]
            row += copied
            weights += [self.other_weight if index < certain else 0.4 for index in range(len(copied))]
            if rng.random() < 0.5:
                fresh = rng.choices(alphabet, k=rng.randint(1, 6))
                row += fresh
                weights += [self.other_weight] * len(fresh)
        return row[:length], weights[:length]

    def turn(self, role: str, text: str, weight: float, cut: int | None = None) -> tuple[list[int], list[float]]:
        """One message; with `cut` only its first tokens, and nothing is learnt from its end."""
        head, body, newline = self.ids(f"{role}\n"), self.ids(text)[:cut], self.ids("\n")
        ids = [self.start, *head, *body, self.end, *newline]
        end_weight = weight if cut is None else 0.0
        return ids, [0.0] * (1 + len(head)) + [weight] * len(body) + [end_weight] + [0.0] * len(newline)

    def chat(self, task: str, length: int) -> tuple[list[int], list[float]]:
        """One document with as many questions as the row has room for, in a random layout."""
        rng = self.rng
        layout = rng.choice(tasks.LAYOUTS)
        per_token = CHARACTERS_PER_TOKEN.get(task, 4.2)
        count: Callable[[str], int] = lambda text: int(len(text) / per_token)  # noqa: E731
        share = rng.uniform(0.4, 0.75)
        per_question = {"kv_retrieval": 140, "niah_single_3": 75, "niah_multikey_3": 160, "vt": 100}.get(task, 50)
        per_question = 150 if task in ("niah_multivalue", "niah_multiquery") else per_question
        # What is hard in a reply of 80 tokens is to pick up the key that was asked for, so some replies with UUIDs are
        # cut behind the first digits of the key and more of them fit.
        first_of_key = {"kv_retrieval": 4, "niah_single_3": 8, "niah_multikey_3": 8}.get(task)
        cut_share = 0.0 if first_of_key is None else self.cut_share
        per_question = int(per_question * (1 - cut_share) + 60 * cut_share)
        num_questions = max(1, int(length * (1 - share) / per_question))
        if task in ("passkey", "number_string", "cwe", "fwe"):
            share = 0.8
        context = tasks.make_context(
            task,
            num_tokens=int(length * share),
            count_tokens=count,
            num_questions=num_questions,
            seed=rng.getrandbits(62),
        )
        questions = rng.sample(context.questions, k=len(context.questions))
        ids: list[int] = []
        weights: list[float] = []

        def add(role: str, text: str, weight: float) -> None:
            cut = None
            if role == "assistant" and first_of_key is not None and rng.random() < cut_share:
                cut = first_of_key + rng.randint(3, 9)
            more_ids, more_weights = self.turn(role, text, weight, cut)
            ids.extend(more_ids)
            weights.extend(more_weights)

        context = tasks.Context(context.document, context.questions, layout)
        for message in tasks.messages(context, questions[0]):
            acknowledged = message["role"] == "assistant"
            add(message["role"], message["content"], 0.1 if acknowledged else self.other_weight)
        add("assistant", questions[0].reply, 1.0)
        asked = 1
        while len(ids) < length and (asked < len(questions) or (self.cut_share > 0 and len(questions) > 1)):
            # Where there is room left, some are asked again.
            question = questions[asked] if asked < len(questions) else rng.choice(questions)
            asked += 1
            add("user", question.prompt, self.other_weight)
            add("assistant", question.reply, 1.0)
        return ids, weights

    def small_talk(self) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        if self.rng.random() < 0.4:
            ids, weights = self.turn("system", self.rng.choice(SYSTEM_PROMPTS), 0.0)
        said, reply = self.rng.choice(SMALL_TALK)
        for role, text, weight in (("user", said, 0.0), ("assistant", reply, 0.3)):
            more_ids, more_weights = self.turn(role, text, weight)
            ids, weights = ids + more_ids, weights + more_weights
        return ids, weights

    def positions(self, length: int, max_position: int) -> list[int]:
        """0, 1, 2, ... with up to a dozen jumps; the whole stays below `max_position`."""
        rng = self.rng
        room = max_position - length
        span = 0 if rng.random() < 0.2 else int(room * rng.random())
        borders = sorted(rng.randrange(length) for _ in range(rng.randint(1, 12)))
        cuts = sorted(rng.random() for _ in borders)
        result, jumped, index = [], 0, 0
        for position in range(length):
            while index < len(borders) and borders[index] == position:
                jumped = int(span * cuts[index])
                index += 1
            result.append(position + jumped)
        return result

    def key_bias(self, length: int, target_keys: int) -> list[float]:
        """Stretches of keys that count as many copies, so that the row attends like one of up to `target_keys`."""
        rng = self.rng
        copies = max(1.0, target_keys / length) ** math.sqrt(rng.random())
        share = rng.uniform(0.3, 0.9)
        bias: list[float] = []
        while len(bias) < length:
            stretch = rng.randint(10, 200)
            bias += [math.log(copies) if rng.random() < share else 0.0] * stretch
        return bias[:length]

    def batch(
        self,
        num_rows: int,
        length: int,
        mix: dict[str, float],
        *,
        max_position: int = 200_000,
        target_keys: int = 160_000,
    ) -> Batch:
        """mix: share of each task, of "repeats", of "small_talk"."""
        columns: tuple[list[list[float]], ...] = ([], [], [], [])
        for _ in range(num_rows):
            ids: list[int] = []
            weights: list[float] = []
            while len(ids) < length:
                kind = self.rng.choices(list(mix), weights=list(mix.values()))[0]
                if kind == "repeats":
                    if ids:
                        continue
                    more_ids, more_weights = self.repeats(length)
                elif kind == "small_talk":
                    more_ids, more_weights = self.small_talk()
                else:
                    more_ids, more_weights = self.chat(kind, length)
                ids, weights = ids + more_ids, weights + more_weights
                if kind != "small_talk":
                    break
            padding = max(0, length - len(ids))
            columns[0].append([float(token) for token in [*ids, *[0] * padding][:length]])
            columns[1].append((weights + [0.0] * padding)[:length])
            columns[2].append([float(position) for position in self.positions(length, max_position)])
            columns[3].append(self.key_bias(length, target_keys))
        return Batch(
            torch.tensor(columns[0], dtype=torch.long), torch.tensor(columns[1]),
            torch.tensor(columns[2], dtype=torch.long), torch.tensor(columns[3]),
        )  # fmt: skip
