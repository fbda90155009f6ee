"""Generator of look-up tasks over long documents: RULER's and InfiniteBench's synthetic tasks, rebuilt from scratch.

Owns the wording of documents, questions and model replies, and how an output is scored. Pure: standard library only, no
torch, no tokenizer; the same seed gives the same context everywhere. The trainer of the demo model, its evaluation,
scripts/needle.py and the tests all draw from here.

RULER: Hsieh et al., arXiv 2404.06654, section 3 and appendix B. InfiniteBench: Zhang et al., arXiv 2402.13718.
Deliberate deviations: the essay haystack is made of generated sentences, word keys come from short lists of our own
and from made-up words, one document may hold needles for several questions, and an expected reply *restates* the
sentence it quotes (both benchmarks score by substring, so that is a right answer).
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words("""
    able ancient amber angry awake bitter black blue bold brave brief bright broken brown busy calm careful
    cheap clean clever cloudy cold common cool crimson curious damp dark deep distant dizzy dry dusty early
    eager easy elegant empty even faint fair famous fancy fast fierce final fine firm flat fond fresh friendly
    full gentle giant glad golden good grand gray great green handsome happy hard heavy hidden high hollow
    honest huge humble hungry icy idle jolly keen kind large late lazy light little lonely long loud lucky
    mellow mighty mild modern muddy narrow neat new noble noisy odd old orange pale patient plain polite proud
    purple quick quiet rapid rare red rich rough round royal rusty sad salty scarlet secret shallow sharp shiny
    short shy silent silver simple sleepy slim slow small smooth soft solid sour steady steep strange strong
    sunny sweet swift tall tame tender thick thin tidy tiny tired vast velvet violet warm weak wet white wide
    wild wise witty yellow young zealous
""")
NOUNS = _words("""
    acorn anchor apple arrow autumn badge baker balloon banana basket beach bear bell bench berry bird blanket
    boat book bottle box branch bread breeze brick bridge broom bucket butter button cabin cable camera candle
    canoe captain carpet castle cat chair cherry circle cliff clock cloud coast coin comet compass copper corner
    cottage cotton cousin crayon cricket crow crystal cup curtain daisy dawn desert desk diamond doctor dog
    dolphin door dragon drum eagle engine falcon farmer feather fence ferry field finger fire fish flag flame
    flower forest fork fountain fox frog garden gate ghost giraffe glass glove goat grape guitar hammer harbor
    hat hawk hill honey horse house island jacket jar jewel juice kettle key king kite kitten ladder lake lamp
    lantern leaf lemon letter library lion lizard lock maple market meadow melon mirror monkey moon mountain
    mouse museum music needle nest nurse oak ocean olive onion orchard otter owl paddle painter palace panda
    paper parrot path peach pearl pebble pencil pepper piano pillow pilot pine pirate planet plum pocket poet
    pond pony potato prince pumpkin queen rabbit radio rain raven ribbon river road robin rocket roof rose
    sailor salmon school shadow sheep shell ship shoe singer sister snow soldier spider spoon star station stone
    storm stove sugar summer table tailor teacher temple thunder tiger tower train tree trumpet tunnel turtle
    valley vase village violin wagon wall walnut water whale wheel whistle window winter wizard wolf wood wool
    yard zebra
""")
NAMES = _words("""
    Ada Alan Alice Amir Anna Arthur Bella Boris Carla Carmen Clara Daniel David Diana Edgar Elena Emma Erik Eva
    Felix Frank Grace Hanna Helen Henry Hugo Ida Ingrid Ivan Jack James Jane Julia Karl Laura Leo Lena Linda
    Lucas Lucy Maria Mark Martin Mary Max Mia Mila Nina Noah Nora Olga Oscar Otto Paula Peter Rosa Ruth Samuel
    Sara Simon Sofia Theo Thomas Tina Vera Victor Walter Wanda Yara Zoe
""")
PLACES = _words("""
    Athens Berlin Bern Boston Cairo Chicago Dakar Delhi Dublin Geneva Hamburg Hanoi Helsinki Kyoto Lagos Lima
    Lisbon London Madrid Milan Moscow Mumbai Nairobi Oslo Ottawa Oxford Paris Prague Quito Riga Rome Seoul Sofia
    Sydney Tokyo Toronto Turin Venice Vienna Warsaw Zurich
""")
VERBS = _words("""
    watched followed painted carried found forgot moved noticed remembered visited described admired opened
    closed cleaned repaired borrowed bought sold drew built crossed left reached passed kept lost called asked
    helped
""")
PREPOSITIONS = _words("""
    near behind above below beside under inside beyond across from without before after along
""")
ADVERBS = _words("""
    slowly quickly quietly often rarely again today yesterday always never carefully together alone later
""")
SLOTS = {
    "ADJ": ADJECTIVES,
    "NOUN": NOUNS,
    "VERB": VERBS,
    "NAME": NAMES,
    "PREP": PREPOSITIONS,
    "ADVERB": ADVERBS,
    "PLACE": PLACES,
}
ATTRIBUTES = (
    "access code", "phone number", "home", "birthplace", "favorite thing", "color", "price", "owner", "secret word",
    "password", "name", "number", "address", "friend", "boss", "job", "room", "capital", "author", "size", "weight",
)  # fmt: skip
SENTENCES = (  # of the haystack; N999 is a number from 2 to 999
    "The ADJ NOUN VERB the NOUN PREP the ADJ NOUN.",
    "NAME ADVERB VERB one ADJ NOUN PREP the NOUN.",
    "The day was ADJ, and the NOUN was ADJ and ADJ.",
    "NAME and NAME VERB the NOUN and then VERB the ADJ NOUN.",
    "In PLACE there is some ADJ NOUN PREP every NOUN.",
    '"Is the NOUN ADJ?" asked NAME, who VERB N999 of them.',
    "Nobody VERB the NOUN of NAME, because it was too ADJ.",
    "On page N400 the NOUN is ADJ; the NOUN is not.",
    "They VERB N99 ADJ things PREP the NOUN and ADVERB VERB them.",
    "NAME said that the ADJ NOUN PREP the NOUN must be ADJ.",
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "passkey", "number_string", "kv_retrieval", "facts",
)  # fmt: skip
LAYOUTS = ("system", "user", "acknowledged")
ACKNOWLEDGEMENT = "I have read the text. What would you like to know?"


@dataclass(frozen=True, slots=True)
class Question:
    """One question; it is answered rightly where every one of `answers` is a substring of the output."""

    task: str
    prompt: str
    answers: tuple[str, ...]
    reply: str  # the wording that the demo model is trained to give


@dataclass(frozen=True, slots=True)
class Context:
    """A document and the questions that can be asked over it, each on its own."""

    document: str
    questions: tuple[Question, ...]
    layout: str = "system"  # where messages() puts the document, one of LAYOUTS


def made_up_word(rng: random.Random, *, min_syllables: int = 2, max_syllables: int = 3) -> str:
    """A word that no list holds, so that copying cannot lean on known words."""

    def syllable() -> str:
        return rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(["", "", "n", "r", "s", "l"])

    return "".join(syllable() for _ in range(rng.randint(min_syllables, max_syllables)))


def word_key(rng: random.Random) -> str:
    """RULER's ADJ-NOUN key; one part in five is made up."""
    first = made_up_word(rng) if rng.random() < 0.2 else rng.choice(ADJECTIVES)
    second = made_up_word(rng) if rng.random() < 0.2 else rng.choice(NOUNS)
    return f"{first}-{second}"


def number(rng: random.Random, num_digits: int = 7) -> str:
    """Decimal digits, the first one not zero."""
    return str(rng.randint(10 ** (num_digits - 1), 10**num_digits - 1))


def uuid_text(rng: random.Random) -> str:
    """A version 4 UUID drawn from `rng`."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def filler(rng: random.Random) -> str:
    """One generated sentence that holds no fact anybody asks for."""

    def fill(slot: re.Match[str]) -> str:
        name = slot.group()
        return rng.choice(SLOTS[name]) if name in SLOTS else str(rng.randint(2, int(name[1:])))

    return re.sub(r"ADVERB|ADJ|NOUN|VERB|NAME|PREP|PLACE|N\d+", fill, SENTENCES[rng.randrange(len(SENTENCES))])


def _noise(_: random.Random) -> str:
    return NOISE


def _noise_or_filler(rng: random.Random) -> str:
    return NOISE if rng.random() < 0.2 else filler(rng)


def _distinct(rng: random.Random, make: Callable[[random.Random], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(rng)] = None
    return list(found)


def _spread(
    rng: random.Random, needles: list[str], make_filler: Callable[[random.Random], str], num_tokens: int,
    count_tokens: Callable[[str], int], separator: str = " ",
) -> str:  # fmt: skip
    """Filler up to `num_tokens`, the needles at evenly spread depths (jittered); counts tokens about five times."""
    sample = separator.join(make_filler(rng) for _ in range(50))
    room = num_tokens - (count_tokens(separator.join(needles)) if needles else 0)
    pieces = [make_filler(rng) for _ in range(max(0, int(50 * room / count_tokens(sample))))]
    for _ in range(4):
        size = count_tokens(separator.join(pieces)) if pieces else 0
        if room * 0.995 - 20 <= size <= room:
            break
        per_piece = size / len(pieces) if pieces else count_tokens(sample) / 50
        change = int((room * 0.998 - size) / per_piece)
        if change < 0 or size > room:
            del pieces[min(change, -1) :]
        else:
            pieces.extend(make_filler(rng) for _ in range(max(1, change)))
    total = len(pieces)
    depths = sorted((int(total * (index + rng.random()) / len(needles)) for index in range(len(needles))), reverse=True)
    for depth, needle in zip(depths, reversed(needles), strict=True):
        pieces.insert(depth, needle)
    return separator.join(pieces)


def _needle(key: str, value: str, kind: str) -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def _niah_intro(kind: str) -> str:
    return (
        f"Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind}s afterwards.\n"
    )


def _niah(task: str, num_tokens: int, count: Callable[[str], int], num_questions: int, rng: random.Random) -> Context:
    kind = "uuid" if task in ("niah_single_3", "niah_multikey_3") else "number"
    make_key = uuid_text if task == "niah_multikey_3" else word_key
    make_value: Callable[[random.Random], str] = uuid_text if kind == "uuid" else number
    keys_per_question = 4 if task == "niah_multiquery" else 1
    values_per_key = 4 if task == "niah_multivalue" else 1
    intro = _niah_intro(kind)
    room = num_tokens - count(intro)
    num_asked = num_questions * keys_per_question
    num_keys = num_asked * 4 if task == "niah_multikey_1" else num_asked
    if task in ("niah_multikey_2", "niah_multikey_3"):  # the haystack itself is made of needles
        sample = " ".join(_needle(make_key(rng), make_value(rng), kind) for _ in range(50))
        num_keys = max(num_asked, int(0.99 * room * 50 / count(sample)))
    keys = _distinct(rng, make_key, num_keys)
    values = {key: _distinct(rng, make_value, values_per_key) for key in keys}
    needles = [(key, value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    sentences = [_needle(key, value, kind) for key, value in needles]
    if task in ("niah_multikey_2", "niah_multikey_3"):
        while len(sentences) > num_asked and count(" ".join(sentences)) > room:
            del needles[-max(1, len(needles) // 200) :], sentences[-max(1, len(sentences) // 200) :]
        keys = rng.sample(list(dict.fromkeys(key for key, _ in needles)), k=min(num_asked, len(needles)))
        body = " ".join(sentences)
    else:
        make_filler = _noise if task == "niah_single_1" else _noise_or_filler if task == "niah_single_2" else filler
        body = _spread(rng, sentences, make_filler, room, count)
    values_in_order = {key: tuple(v for k, v in needles if k == key) for key in keys[:num_asked]}
    questions = []
    for first in range(0, min(num_asked, len(keys)), keys_per_question):
        asked = keys[first : first + keys_per_question]
        answers = tuple(value for key in asked for value in values_in_order[key])
        plural = len(answers) > 1
        listed = ", ".join(asked[:-1]) + f", and {asked[-1]}" if len(asked) > 1 else asked[0]
        prompt = (
            f"What are all the special magic {kind}s for {listed} mentioned in the provided text?"
            if plural
            else f"What is the special magic {kind} for {listed} mentioned in the provided text?"
        )
        if kind == "uuid":
            reply = f"The special magic uuid for {asked[0]} is: {answers[0]}."
        else:
            reply = " ".join(_needle(key, value, kind) for key in asked for value in values_in_order[key])
        questions.append(Question(task, prompt, answers, reply))
    return Context(intro + body, tuple(questions))


def _vt(num_tokens: int, count: Callable[[str], int], num_questions: int, rng: random.Random) -> Context:
    """Variable tracking with chains of four hops, one chain per question (RULER's default is one chain)."""
    intro = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
    names = _distinct(rng, lambda r: "".join(r.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)), 5 * num_questions)
    numbers = _distinct(rng, lambda r: number(r, 5), num_questions)
    chains = [names[5 * i : 5 * i + 5] for i in range(num_questions)]
    steps = [
        [f"VAR {chain[0]} = {value}."] + [f"VAR {b} = VAR {a}." for a, b in pairwise(chain)]
        for chain, value in zip(chains, numbers, strict=True)
    ]
    # Chains are interleaved, the order within each is kept.
    order = [index for index in range(num_questions) for _ in range(5)]
    rng.shuffle(order)
    left = [iter(step) for step in steps]
    body = _spread(rng, [next(left[index]) for index in order], _noise, num_tokens - count(intro), count)
    prompt = "Find all variables that are assigned the value {} in the text above."
    questions = tuple(
        Question("vt", prompt.format(value), tuple(chain), " ".join(step))
        for chain, value, step in zip(chains, numbers, steps, strict=True)
    )
    return Context(intro + body, questions)


def _cwe(num_tokens: int, count: Callable[[str], int], rng: random.Random) -> Context:
    """Common words: ten words thirty times each among words that come three times (fewer repeats in short texts)."""
    intro = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    words = _distinct(rng, lambda r: r.choice(ADJECTIVES + NOUNS) if r.random() < 0.5 else made_up_word(r), 10)
    room = num_tokens - count(intro)
    rare = _distinct(rng, lambda r: r.choice(ADJECTIVES + NOUNS) if r.random() < 0.2 else made_up_word(r), 10)
    per_entry = count(" ".join(f"{100 + i}. {w}" for i, w in enumerate(words + rare))) / 20
    repeats, rare_repeats = (30, 3) if room / per_entry > 500 else (10, 1)
    num_rare = max(1, int((0.93 * room / per_entry - 10 * repeats) / rare_repeats))
    pool = set(words)
    while len(pool) < num_rare + 10:
        pool.add(made_up_word(rng, max_syllables=4))
    listed = words * repeats + sorted(pool - set(words)) * rare_repeats
    rng.shuffle(listed)
    body = " ".join(f"{index}. {word}" for index, word in enumerate(listed, 1))
    while count(body) > room:
        listed = listed[: int(len(listed) * 0.98)]
        body = " ".join(f"{index}. {word}" for index, word in enumerate(listed, 1))
    reply = "The top 10 words that appear most often in the list are: " + " ".join(
        f"{index}. {word}" for index, word in enumerate(words, 1)
    )
    return Context(
        intro + body, (Question("cwe", "What are the 10 most common words in the above list?", tuple(words), reply),)
    )


def _fwe(num_tokens: int, count: Callable[[str], int], rng: random.Random) -> Context:
    """Frequent words: coded words with Zipf frequencies (exponent 2), the three most frequent are asked for."""
    intro = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words.\n"
    )
    room = num_tokens - count(intro)
    vocabulary = _distinct(rng, lambda r: made_up_word(r, max_syllables=3), 60)
    weights = [1 / (rank + 1) ** 2 for rank in range(len(vocabulary))]
    words = rng.choices(vocabulary, weights, k=max(30, room))
    words = words[: int(len(words) * 0.99 * room / count(" ".join(words)))]
    body = " ".join(word if rng.random() > 0.1 else word + " ...." for word in words)
    while count(body) > room:
        words = words[: int(len(words) * 0.97)]
        body = " ".join(words)
    seen = sorted(vocabulary, key=lambda word: -words.count(word))[:3]
    prompt = (
        "Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    reply = "The three most frequently appeared words are: " + ", ".join(seen) + "."
    return Context(intro + body, (Question("fwe", prompt, tuple(seen), reply),))


def _infinite_bench_digits(task: str, num_tokens: int, count: Callable[[str], int], rng: random.Random) -> Context:
    """Passkey (5 random digits) and number string (10 digits in runs of equal digits) hidden in noise sentences."""
    if task == "passkey":
        name, value = "pass key", number(rng, 5)
        prompt = "What is the pass key?"
        intro = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            "I will quiz you about the important information.\n"
        )
    else:
        name, value = "sequence of digits", ""
        while len(value) < 10:
            value += rng.choice("0123456789") * rng.randint(1, 4)
        value = value[:10]
        prompt = "What is the sequence of digits?"
        intro = (
            "There is an important info hidden inside a lot of irrelevant text. Find it. "
            "I will quiz you about the important information there.\n"
        )
    needle = f"The {name} is {value}. Remember it. {value} is the {name}."
    body = _spread(rng, [needle], _noise, num_tokens - count(intro), count)
    return Context(intro + body, (Question(task, prompt, (value,), f"The {name} is {value}."),))


def _kv(num_tokens: int, count: Callable[[str], int], num_questions: int, rng: random.Random) -> Context:
    """InfiniteBench's key-value retrieval: one JSON object of UUID pairs."""
    intro = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"

    def pair() -> str:
        return f'"{uuid_text(rng)}": "{uuid_text(rng)}"'

    room = num_tokens - count(intro)
    per_pair = count(", ".join(pair() for _ in range(20))) / 20
    pairs = [pair() for _ in range(max(num_questions, int(0.985 * room / per_pair)))]
    while len(pairs) > num_questions and count("{" + ", ".join(pairs) + "}") > room:
        del pairs[-max(1, len(pairs) // 200) :]
    questions = []
    for asked in rng.sample(pairs, k=min(num_questions, len(pairs))):
        key, value = asked[1:37], asked[-37:-1]
        prompt = f'Key: "{key}"\nThe value associated with the specified key is:'
        questions.append(Question("kv_retrieval", prompt, (value,), f"Key: {asked}"))
    return Context(intro + "{" + ", ".join(pairs) + "}", tuple(questions))


def _fact(rng: random.Random) -> tuple[str, str, str, str]:
    """A sentence of plain prose, its question, the answer within it, and the part that must be unique in a document."""
    who = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    code = f"{rng.choice('ABCDEFGHJKLMNPRSTUVWXYZ')}-{number(rng, 4)}"
    place = rng.choice(PLACES) if rng.random() < 0.7 else made_up_word(rng).capitalize()
    person = f"{rng.choice(NAMES)} {made_up_word(rng).capitalize()}"
    subject = f"the {who}" if rng.random() < 0.5 else person
    attribute = rng.choice(ATTRIBUTES)
    other = f"{rng.choice(NAMES)} {made_up_word(rng).capitalize()}"
    values = [number(rng, 6), number(rng, 4), code, place, other, made_up_word(rng), f"the {rng.choice(NOUNS)}"]
    value = {"access code": code, "phone number": values[0], "home": place, "birthplace": place}.get(
        attribute, rng.choice(values)
    )
    unique = who if subject == f"the {who}" else person
    return f"The {attribute} of {subject} is {value}.", f"What is the {attribute} of {subject}?", value, unique


def _facts(num_tokens: int, count: Callable[[str], int], num_questions: int, rng: random.Random) -> Context:
    """Plain sentences about people and things in prose: not from a benchmark, what somebody would try first."""
    facts: dict[str, tuple[str, str, str, str]] = {}
    while len(facts) < num_questions:
        fact = _fact(rng)
        facts.setdefault(fact[3], fact)
    body = _spread(rng, [fact[0] for fact in facts.values()], filler, num_tokens, count)
    return Context(body, tuple(Question("facts", ask, (answer,), said) for said, ask, answer, _ in facts.values()))


def make_context(
    task: str, *, num_tokens: int, count_tokens: Callable[[str], int], num_questions: int, seed: int
) -> Context:
    """A document of at most about `num_tokens` tokens and up to `num_questions` questions over it.

    `count_tokens` may be slow (a server's /tokenize): it is called a handful of times. Tasks that hold one answer per
    document (cwe, fwe, passkey, number_string) give one question. Raises ValueError for an unknown task.
    """
    rng = random.Random(f"{task}/{num_tokens}/{num_questions}/{seed}")
    if task.startswith("niah_") and task in TASKS:
        return _niah(task, num_tokens, count_tokens, num_questions, rng)
    if task == "vt":
        return _vt(num_tokens, count_tokens, num_questions, rng)
    if task == "cwe":
        return _cwe(num_tokens, count_tokens, rng)
    if task == "fwe":
        return _fwe(num_tokens, count_tokens, rng)
    if task in ("passkey", "number_string"):
        return _infinite_bench_digits(task, num_tokens, count_tokens, rng)
    if task == "kv_retrieval":
        return _kv(num_tokens, count_tokens, num_questions, rng)
    if task == "facts":
        return _facts(num_tokens, count_tokens, num_questions, rng)
    raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")


def messages(context: Context, question: Question) -> list[dict[str, str]]:
    """Chat messages; all questions over one context share the messages (and so the tokens) up to the question."""
    if context.layout == "system":
        return [{"role": "system", "content": context.document}, {"role": "user", "content": question.prompt}]
    if context.layout == "user":
        return [{"role": "user", "content": f"{context.document}\n\n{question.prompt}"}]
    if context.layout == "acknowledged":
        return [
            {"role": "user", "content": context.document},
            {"role": "assistant", "content": ACKNOWLEDGEMENT},
            {"role": "user", "content": question.prompt},
        ]
    raise ValueError(f"unknown layout {context.layout!r}; known: {', '.join(LAYOUTS)}")


def score(output: str, question: Question) -> float:
    """Share of the expected answers that the output holds, case ignored (RULER's string match)."""
    lowered = output.lower()
    return sum(answer.lower() in lowered for answer in question.answers) / len(question.answers)
