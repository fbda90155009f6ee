"""Tokenizer of the demo model: byte-level BPE of 2048 entries trained on generated text, with a ChatML-like template.

Digits and punctuation marks are never merged (only with the space before them), so a number is one token per digit
wherever it stands and separators such as `": "` always look the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scripts import tasks

VOCAB_SIZE = 2048
MAX_LENGTH = 262144
PAD, START, END, END_OF_TEXT = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = [PAD, START, END, END_OF_TEXT]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"
# Everyday text, so that common English words are not spelled out byte by byte when somebody tries their own prompt.
EVERYDAY = """
Hello! Hi there. Good morning. How are you today? Thank you very much. Who are you? What can you do? Please help me.
You are a helpful assistant. Answer the question using only the text below. Read the following document and answer the
questions. According to the text, where does he live? What is her name? When was the meeting? How many people are
there? Which of these is the right one? Why did they leave? Can you tell me the code? Give me the number. Tell me
about it. I am a small demonstration model. I look things up in the text that you give me. I do not know the answer.
user system assistant The company said that it would open a new office next year. This is an example of a long
document about many different things. There were also other people who would have been able to do this work if they
had more time. We should not forget that these words are here only because they are common. His first book was about
the world between the wars. At the end of the year most of our children can read and write. Some of them will go to
another school after that. Where could she see him? Every day I think about what you said. Make it so. Take this and
use it well. Just look at how far we have come since then. Even now there may be no way back. The government, the
city, the state, the country, the law, the money, the problem, the question, the answer, the system, the program, the
group, the part, the place, the case, the week, the point, the hand, the woman, the man, the child, the life, the
night, the face, the fact, the month, the right, the study, the job, the business, the issue, the side, the kind, the
head, the service, the friend, the father, the mother, the power, the hour, the game, the line, the member, the car,
the team, the minute, the idea, the body, the information, the level, the price, the date, the report, the address,
the file, the server, the key, the value, the index, the token, the user, the error, the data, the code, the test, the
model, the memory, the attention, the context, the cache.
"""


def corpus(seed: int) -> Iterator[str]:
    """Generated documents, questions and replies plus every list word; no UUIDs, whose hex digits should stay apart."""
    rng = random.Random(seed)
    words = tasks.ADJECTIVES + tasks.NOUNS + tasks.NAMES + tasks.PLACES
    for _ in range(30):
        yield EVERYDAY.replace("\n", " ")
        yield " ".join(rng.sample(words, k=len(words)))
        yield " ".join(f"{rng.choice(tasks.ADJECTIVES)}-{noun}" for noun in tasks.NOUNS * 3)
        yield " ".join(f"{word.capitalize()}" for word in tasks.ADJECTIVES)
        yield " ".join(tasks.filler(rng) for _ in range(300))
        yield " ".join(tasks.made_up_word(rng) for _ in range(100))
    for task in tasks.TASKS:
        if task in ("niah_single_3", "niah_multikey_3", "kv_retrieval"):
            continue
        for index in range(5):
            context = tasks.make_context(
                task, num_tokens=3000, count_tokens=lambda text: len(text) // 4, num_questions=10, seed=seed + index
            )
            yield context.document
            for question in context.questions:
                yield question.prompt
                yield question.reply
    for task in ("niah_single_3", "niah_multikey_3", "kv_retrieval"):  # wording only
        context = tasks.make_context(
            task, num_tokens=300, count_tokens=lambda text: len(text) // 4, num_questions=1, seed=0
        )
        yield "".join(letter for letter in context.document + context.questions[0].prompt if not letter.isdigit())


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """The finished tokenizer with its chat template; the same seed gives the same merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, END_OF_TEXT],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
