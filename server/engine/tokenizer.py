"""Text to token ids and back: encoding off the event loop, chat templates, incremental detokenization.

The only place that knows text. Encoding and templates run on a small thread pool of its own (the Rust core releases
the GIL), so that a megabyte of prompt never holds up other streams; a `Detokenizer` belongs to one choice and runs
on the event loop.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from transformers import AutoTokenizer, GenerationConfig

from server.errors import InvalidRequestError

Message = Mapping[str, Any]
_T = TypeVar("_T")

REPLACEMENT = "\ufffd"  # what an incomplete or invalid UTF-8 sequence decodes to
_INLINE_CHARS = 1024  # shorter texts take less than a thread hop


class Tokenizer:
    """A transformers tokenizer with its chat template, generation defaults and detokenizer.

    `model`: a `PreTrainedTokenizerBase`. `generation_config`: what the checkpoint itself sets, such as
    `temperature` or `eos_token_id`. Thread-safe.
    """

    def __init__(
        self, model: Any, *, chat_template: str | None = None, generation_config: Mapping[str, Any] | None = None
    ) -> None:
        self._model = model
        self._backend = getattr(model, "backend_tokenizer", None)
        self._chat_template = chat_template
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")
        self._token_bytes: dict[int, bytes] = {}
        self.generation_config = dict(generation_config or {})
        self.vocab_size = len(model)
        self._ids = tuple(range(1 + max(model.get_vocab().values(), default=-1)))  # prompts share them
        self.eos_token_ids = _eos_token_ids(model, self.generation_config)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat_template_file: Path | None = None,
    ) -> Tokenizer:
        """Loads from a folder or hub name. Raises OSError or ValueError when there is none."""
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        try:
            generation = GenerationConfig.from_pretrained(model, revision=revision or "main").to_diff_dict()
        except OSError:  # many checkpoints have none
            generation = {}
        template = chat_template_file.read_text() if chat_template_file else None
        return cls(tokenizer, chat_template=template, generation_config=generation)

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered."""
        return bool(self.chat_template)

    @property
    def chat_template(self) -> str:
        """The Jinja source; empty when there is none."""
        return str(self._chat_template or self._model.chat_template or "")

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of `text`; long texts are encoded on a thread."""
        if len(text) <= _INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        return await self._off_loop(lambda: self._encode(text, add_special_tokens))

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a conversation. Raises InvalidRequestError when the template refuses it."""
        if not self.has_chat_template:
            raise InvalidRequestError("the model has no chat template; give one with --chat-template", param="messages")

        def render_and_encode() -> tuple[int, ...]:
            text = self._render(messages, add_generation_prompt, continue_final_message, template_kwargs or {})
            return self._encode(text, add_special_tokens)

        return await self._off_loop(render_and_encode)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of complete token ids; use a `Detokenizer` for a growing sequence."""
        if self._backend is not None:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        return str(self._model.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    async def decode_off_loop(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """`decode` for long sequences, on a thread."""
        return await self._off_loop(lambda: self.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, which may be part of a character; empty for ids without a token."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._find_token_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself; U+FFFD where it is part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_name(self, token_id: int) -> str:
        """The token as its vocabulary spells it."""
        return str(self._model.convert_ids_to_tokens(token_id))

    def serialized(self) -> str | None:
        """The Rust tokenizer as JSON, without padding and truncation; None for models without one."""
        if self._backend is None:
            return None
        backend = copy.copy(self._backend)
        backend.no_padding()
        backend.no_truncation()
        return str(backend.to_str())

    def close(self) -> None:
        """Ends the thread pool; queued work is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _off_loop(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(map(self._ids.__getitem__, self._encode_once(text, add_special_tokens)))

    def _encode_once(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids that are objects of their own: three quarters of a long prompt's bytes."""
        if self._backend is not None:  # no offsets, and no shared truncation state as in transformers' own call
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            return ids
        with self._lock:
            return list(self._model.encode(text, add_special_tokens=add_special_tokens))

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, continue_final: bool, kwargs: Mapping[str, Any]
    ) -> str:
        try:
            return str(
                self._model.apply_chat_template(
                    list(messages),
                    chat_template=self._chat_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final,
                    **kwargs,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", param="messages") from error

    def _find_token_bytes(self, token_id: int) -> bytes:
        added = self._model.added_tokens_decoder.get(token_id)
        if added is not None:
            return str(added.content).encode()
        name = self._model.convert_ids_to_tokens(token_id) if token_id < self.vocab_size else None
        if name is None:
            return b""
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):  # byte fallback of SentencePiece
            return bytes([int(name[3:5], 16)])
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in name)  # byte-level BPE
        except KeyError:
            return str(name).replace("\u2581", " ").encode()


class Detokenizer:
    """Turns a growing sequence of token ids into text, O(1) per token, never half a character.

    Text is decoded in a window: the tokens that completed the last text, which give later ones their context (a
    leading space), and those after them. What ends in U+FFFD may still become a character and is held back, for at
    most `MAX_PENDING` tokens: a character has at most four bytes, so that longer runs are invalid and shown as such.
    """

    MAX_PENDING = 8
    CONTEXT = 6

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt_token_ids[-self.CONTEXT :])
        while self._window and self._decode().startswith(REPLACEMENT):  # cut inside a character
            del self._window[0]
        self._num_settled = len(self._window)  # leading tokens of the window whose text is complete
        self._num_shown = len(self._decode().rstrip(REPLACEMENT))  # characters of the window that were returned

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode()
        ready = text.rstrip(REPLACEMENT)
        if len(self._window) - self._num_settled > self.MAX_PENDING:
            ready = text[:-1] if text.endswith(REPLACEMENT) else text
        new = ready[self._num_shown :]
        self._num_shown += len(new)
        if new and len(ready) == len(text):
            self._drop(self._num_settled, num_held=0)
        elif len(self._window) - self._num_settled > self.MAX_PENDING:
            self._drop(len(self._window) - self.CONTEXT, num_held=len(text) - len(ready))
        return new

    def flush(self) -> str:
        """What is still held back, at the end of the sequence."""
        new = self._decode()[self._num_shown :]
        self._num_shown += len(new)
        return new

    def _drop(self, num_tokens: int, num_held: int) -> None:
        """Forgets leading tokens; all of the window's text but its last `num_held` characters has been returned."""
        del self._window[:num_tokens]
        self._num_settled = len(self._window)
        self._num_shown = len(self._decode()) - num_held

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens)


def _eos_token_ids(model: Any, generation_config: Mapping[str, Any]) -> frozenset[int]:
    """Tokens whose text is never shown at the end of an answer."""
    ids = generation_config.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in [*listed, model.eos_token_id] if i is not None)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte, reversed (`bytes_to_unicode` of its encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
