"""Accuracy of a small Llama model on the look-up tasks under exact attention, greedy, per task and length.

    python -m scripts.eval_demo_model --model server/demo_model --tokens 4096 131072 --questions 20

All questions over one document are answered at once: its keys and values are computed once, in chunks, and every
question attends to them and to its own tail, merged by log-sum-exp. This is the same arithmetic as transformers' own
forward with bf16 scaled-dot-product attention, in another order. One line of JSON per task and length; right answers
are counted by scripts.tasks.score, `wrong` lists what was said instead.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from scripts import tasks

SEED = 2_000_000_000  # training draws its documents from other streams
CHUNK = 2048
Partial = tuple[Tensor, Tensor]  # out [..., 64] float32 and lse [...]


def flash(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Partial:
    """Attention of query `[1, heads, num_queries, 64]`, with the log of its normaliser."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal)
    return out.float(), lse


def merge(first: Partial, second: Partial) -> Partial:
    lse = torch.logaddexp(first[1], second[1])
    weights = [(part[1] - lse).exp().unsqueeze(-1) for part in (first, second)]
    return first[0] * weights[0] + second[0] * weights[1], lse


class SharedPrefixReader:
    """Keys and values of one document, and greedy answers to many questions over it."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        attention = model.model.layers[0].self_attn
        self.head_dim: int = attention.head_dim
        self.group_size: int = attention.num_key_value_groups
        self.num_kv_heads: int = model.config.num_attention_heads // self.group_size
        self.keys: list[Tensor] = []  # per layer [1, num_kv_heads, capacity, 64]
        self.values: list[Tensor] = []
        self.length = 0

    def _qkv(self, layer: LlamaDecoderLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> list[Tensor]:
        attention, (rows, length) = layer.self_attn, hidden.shape[:2]
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).view(rows, length, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return [*apply_rotary_pos_emb(query, key, *rotary), value]

    def _finish(self, layer: LlamaDecoderLayer, hidden: Tensor, out: Tensor) -> Tensor:
        rows, length = hidden.shape[:2]
        out = out.to(hidden.dtype).transpose(1, 2).reshape(rows, length, -1)
        hidden = hidden + layer.self_attn.o_proj(out)
        return cast(Tensor, hidden + layer.mlp(layer.post_attention_layernorm(hidden)))

    def _over_prefix(self, query: Tensor, index: int, length: int) -> Partial:
        """query `[rows, num_q_heads, num_queries, 64]` over the first `length` keys, with no mask."""
        rows, heads, num_queries, head_dim = query.shape
        folded = query.view(rows, self.num_kv_heads, self.group_size, num_queries, head_dim)
        folded = folded.transpose(0, 1).reshape(1, self.num_kv_heads, -1, head_dim)
        out, lse = flash(folded, self.keys[index][:, :, :length], self.values[index][:, :, :length], is_causal=False)
        shape = (self.num_kv_heads, rows, self.group_size, num_queries)
        out = out.reshape(*shape, head_dim).transpose(0, 1).reshape(rows, heads, num_queries, head_dim)
        return out, lse.reshape(shape).transpose(0, 1).reshape(rows, heads, num_queries)

    @torch.no_grad()
    def read(self, ids: list[int]) -> None:
        """Compute keys and values of the shared prefix, chunk by chunk."""
        config, dtype = self.model.config, self.model.dtype
        shape = (1, self.num_kv_heads, len(ids), self.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.length = len(ids)
        for begin in range(0, len(ids), CHUNK):
            end = min(begin + CHUNK, len(ids))
            hidden = self.model.model.embed_tokens(torch.tensor([ids[begin:end]]))
            rotary = self.model.model.rotary_emb(hidden, torch.arange(begin, end)[None])
            for index, layer in enumerate(self.model.model.layers):
                query, key, value = self._qkv(layer, hidden, rotary)
                self.keys[index][:, :, begin:end] = key
                self.values[index][:, :, begin:end] = value
                own = (part.repeat_interleave(self.group_size, dim=1) for part in (key, value))
                part = flash(query, *own, is_causal=True)
                if begin:
                    part = merge(part, self._over_prefix(query, index, begin))
                hidden = self._finish(layer, hidden, part[0])

    @torch.no_grad()
    def answer(self, suffixes: list[list[int]], max_tokens: int, eos: int) -> list[list[int]]:
        """Greedy continuations of prefix + suffix, one per suffix."""
        rows, width = len(suffixes), max(map(len, suffixes))
        config, capacity = self.model.config, width + max_tokens
        tail = [
            torch.zeros(2, rows, self.num_kv_heads, capacity, self.head_dim) for _ in range(config.num_hidden_layers)
        ]
        visible = torch.zeros(rows, capacity, dtype=torch.bool)
        for row, suffix in enumerate(suffixes):
            visible[row, : len(suffix)] = True
        tokens = torch.tensor([suffix + [0] * (width - len(suffix)) for suffix in suffixes])
        lengths = torch.tensor([len(suffix) for suffix in suffixes])
        positions = self.length + torch.arange(width).expand(rows, width)
        replies: list[list[int]] = [[] for _ in suffixes]
        slot, last = 0, lengths - 1
        for step in range(max_tokens):
            slots = torch.arange(slot, slot + tokens.shape[1])
            hidden = self.model.model.embed_tokens(tokens)
            rotary = self.model.model.rotary_emb(hidden, positions)
            allowed = visible[:, None, :] & (torch.arange(capacity)[None, None] <= slots[None, :, None])
            for index, layer in enumerate(self.model.model.layers):
                query, key, value = self._qkv(layer, hidden, rotary)
                tail[index][0][:, :, slots], tail[index][1][:, :, slots] = key.float(), value.float()
                own_key, own_value = (part.repeat_interleave(self.group_size, dim=1) for part in tail[index])
                scores = query.float() @ own_key.transpose(2, 3) / self.head_dim**0.5
                scores = scores.masked_fill(~allowed[:, None], -torch.inf)
                lse = scores.logsumexp(-1)
                own = (scores - lse.unsqueeze(-1)).exp() @ own_value, lse
                hidden = self._finish(layer, hidden, merge(own, self._over_prefix(query, index, self.length))[0])
            final = self.model.model.norm(hidden[torch.arange(rows), last])
            chosen = self.model.lm_head(final).argmax(-1)
            for reply, token in zip(replies, chosen.tolist(), strict=True):
                if eos not in reply:
                    reply.append(token)
            if all(eos in reply for reply in replies):
                break
            slot, last = width + step, torch.zeros(rows, dtype=torch.long)
            tokens, positions = chosen[:, None], (self.length + lengths + step)[:, None]
            visible[:, slot] = True
        return replies


def shared_length(first: list[int], second: list[int]) -> int:
    """How many tokens both start with, short of the last ones: something must be left to ask."""
    pairs = zip(first[:-8], second[:-8], strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)) - 8)


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    num_tokens: int,
    num_questions: int,
    seed: int,
) -> dict[str, object]:
    """At least `num_questions` questions where the task gives one per document and the document is short."""
    began, points, asked, wrong = time.time(), 0.0, 0, []
    most_documents = max(1, min(num_questions, 131072 // num_tokens, 20))
    documents = 0
    while asked < num_questions and documents < most_documents:
        context = tasks.make_context(
            task, num_tokens=num_tokens, num_questions=num_questions, seed=seed + documents,
            count_tokens=lambda text: len(tokenizer(text)["input_ids"]),
        )  # fmt: skip
        chats = [tasks.messages(context, question) for question in context.questions]
        rows = cast(
            "list[list[int]]", tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
        )
        shared = min(shared_length(rows[0], row) for row in rows)
        reader = SharedPrefixReader(model)
        reader.read(rows[0][:shared])
        replies = reader.answer([row[shared:] for row in rows], 160, tokenizer.eos_token_id)
        for question, reply in zip(context.questions, replies, strict=True):
            said = str(tokenizer.decode(reply, skip_special_tokens=True))
            points += tasks.score(said, question)
            if tasks.score(said, question) < 1:
                wrong.append({"expected": question.reply, "said": said})
        asked, documents = asked + len(replies), documents + 1
    return {
        "task": task, "tokens": num_tokens, "accuracy": round(points / asked, 3), "questions": asked,
        "documents": documents, "seconds": round(time.time() - began, 1), "wrong": wrong[:3],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("server/demo_model"))
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=tasks.TASKS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--questions", type=int, default=20, help="per task and length")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    for num_tokens in arguments.tokens:
        for task in arguments.tasks:
            result = evaluate(model, tokenizer, task, num_tokens, arguments.questions, arguments.seed)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
