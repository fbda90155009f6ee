"""Fixtures shared by all tests: small tokenizers built on the spot, so that nothing comes from a hub."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from server.engine.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|pad|>"]


def byte_level_tokenizer() -> Tokenizer:
    """BPE over bytes with a few merges: characters beyond ASCII take several tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog stop user assistant"], trainer)
    model = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    model.chat_template = CHAT_TEMPLATE
    return Tokenizer(model)


def byte_fallback_tokenizer() -> Tokenizer:
    """SentencePiece's way: words with a leading U+2581, single bytes as <0xNN> for everything unknown."""
    words = ["\u2581", "\u2581Hello", "\u2581world", "Hello", "!", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("</s>", special=True)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer with a ChatML template."""
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """A tokenizer of SentencePiece's kind."""
    return byte_fallback_tokenizer()
