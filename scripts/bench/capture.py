"""Queries, keys and values of any causal language model over a long generated document, for scripts/bench/index.py.

    python scripts/bench/capture.py --model server/demo_model --tokens 131072 --out results/capture.safetensors

The document is prefilled alone, in chunks, by plain transformers with an attention function of our own: exact, and
never holding more than one chunk's scores. Then each question with its expected reply is run after the document as
if it had come in a later request. The file holds, per layer: `keys.L` and `values.L` `[num_kv_heads, num_keys, d]` of
the document after RoPE, and three sets of query rows `[num_q_heads, num_rows, d]`:

- `train.L`: rows of the document before its last `TAIL_TOKENS`, what an index may learn from;
- `same.L`: rows of the document's last `TAIL_TOKENS`, the same prompt going on;
- `later.L`: rows of the questions and replies, which the index never saw.

Needs room for K and V of the whole document and for the model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from retrieval.merge import merge
from retrieval.partial_attention import attend_block, attend_grouped
from scripts import tasks

ATTENTION_NAME = "capture"
CHUNK_TOKENS = 2048
TAIL_TOKENS = 512  # the server's window: never indexed, so what is asked from there is asked of the rest


@dataclass(slots=True)
class Recorder:
    """K and V of everything run so far, and the query rows asked for."""

    capacity: int  # tokens that K and V have room for
    length: int = 0  # tokens run; set by `run`
    scale: float = 0.0  # filled by the attention function
    keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> [num_kv_heads, capacity, d]
    values: dict[int, Tensor] = field(default_factory=dict)
    wanted: dict[str, Tensor] = field(default_factory=dict)  # set -> rows to keep of the present chunk
    rows: dict[str, list[Tensor]] = field(default_factory=dict)  # "set.layer" -> [num_q_heads, n, d] each


def register() -> None:
    """Make `attn_implementation="capture"` known to transformers; idempotent."""
    AttentionInterface.register(ATTENTION_NAME, capture_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


def capture_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, *, recorder: Recorder, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Exact causal attention of one chunk over all K and V recorded so far, its own included.

    query `[1, num_q_heads, n, d]`, key and value `[1, num_kv_heads, n, d]`; returns `[1, n, num_q_heads, d]`.
    """
    if sliding_window is not None:
        raise SystemExit("capture.py knows full attention only: this model has sliding-window layers")
    layer, scale = int(module.layer_idx), float(scaling or query.shape[-1] ** -0.5)
    q, k, v = query[0], key[0], value[0]
    recorder.scale = scale
    for name, rows in recorder.wanted.items():
        recorder.rows.setdefault(f"{name}.{layer}", []).append(q[:, rows].cpu())
    start, end = recorder.length, recorder.length + q.shape[1]
    for store, new in ((recorder.keys, k), (recorder.values, v)):
        if layer not in store:
            store[layer] = new.new_empty(new.shape[0], recorder.capacity, new.shape[2])
        store[layer][:, start:end] = new
    group = q.shape[0] // k.shape[0]
    parts = [attend_block(q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0), scale, is_causal=True)]
    if start:
        parts.append(attend_grouped(q, recorder.keys[layer][:, :start], recorder.values[layer][:, :start], scale))
    return merge(parts)[0].to(q.dtype).transpose(0, 1)[None], None


def run(model: Any, recorder: Recorder, token_ids: Tensor, wanted: dict[str, Tensor]) -> None:
    """Run `token_ids [n]` behind what was run before; keep the query rows at `wanted` (set -> positions in 0..n)."""
    for start in range(0, len(token_ids), CHUNK_TOKENS):
        chunk = token_ids[start : start + CHUNK_TOKENS]
        inside = {name: rows[(rows >= start) & (rows < start + len(chunk))] - start for name, rows in wanted.items()}
        recorder.wanted = {name: rows for name, rows in inside.items() if len(rows)}
        positions = torch.arange(recorder.length, recorder.length + len(chunk), device=model.device)
        model(
            chunk[None].to(model.device), position_ids=positions[None], use_cache=False, logits_to_keep=1,
            recorder=recorder,
        )  # fmt: skip
        recorder.length += len(chunk)


def sample(low: int, high: int, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` distinct numbers from `[low, high)`, ascending."""
    return (low + torch.randperm(max(0, high - low), generator=generator)[:count]).sort().values


def tokenize(tokenizer: Any, context: tasks.Context) -> tuple[Tensor, list[Tensor]]:
    """Token ids of the document as all its questions share them, and of each question with its reply."""
    prompts = [
        torch.tensor(
            tokenizer.encode(
                tokenizer.apply_chat_template(
                    tasks.messages(context, question), tokenize=False, add_generation_prompt=True
                )
                + question.reply,
                add_special_tokens=False,
            )
        )
        for question in context.questions
    ]
    shortest = min(len(prompt) for prompt in prompts)
    is_shared = torch.stack([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts]).all(dim=0)
    num_shared = int(is_shared.long().cumprod(0).sum())
    return prompts[0][:num_shared], [prompt[num_shared:] for prompt in prompts]


@torch.no_grad()
def capture(
    model: Any, document: Tensor, questions: list[Tensor], num_train: int, num_same: int, num_later: int, seed: int
) -> tuple[dict[str, Tensor], float]:
    """All tensors of the file, and the attention scale. Counts are rows; each row gives one query per query head."""
    generator = torch.Generator().manual_seed(seed)
    border = max(0, len(document) - TAIL_TOKENS)
    recorder = Recorder(len(document) + max(len(question) for question in questions))
    rows = {
        "train": sample(0, border, num_train, generator),
        "same": sample(border, len(document), num_same, generator),
    }
    run(model, recorder, document, rows)
    for question in questions:
        recorder.length = len(document)
        run(model, recorder, question, {"later": sample(0, len(question), num_later // len(questions), generator)})
    tensors = {name: torch.cat(parts, dim=1).contiguous() for name, parts in recorder.rows.items()}
    for layer in recorder.keys:
        tensors[f"keys.{layer}"] = recorder.keys[layer][:, : len(document)].cpu().contiguous()
        tensors[f"values.{layer}"] = recorder.values[layer][:, : len(document)].cpu().contiguous()
    return tensors, recorder.scale


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="server/demo_model", help="path or hub name")
    parser.add_argument("--tokens", type=int, default=131072, help="size of the document in tokens")
    parser.add_argument("--task", default="niah_multikey_1", choices=tasks.TASKS, help="what the document hides")
    parser.add_argument("--questions", type=int, default=20, help="questions asked after the document")
    parser.add_argument("--train-rows", type=int, default=4096, help="document rows kept for index building")
    parser.add_argument("--same-rows", type=int, default=128, help="rows kept of the document's end")
    parser.add_argument("--later-rows", type=int, default=400, help="rows kept of questions and replies together")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/capture.safetensors"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    register()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, attn_implementation=ATTENTION_NAME)
    model = model.to(args.device).eval()
    context = tasks.make_context(
        args.task, num_tokens=args.tokens, num_questions=args.questions, seed=args.seed,
        count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
    )  # fmt: skip
    document, questions = tokenize(tokenizer, context)
    started = time.perf_counter()
    tensors, scale = capture(model, document, questions, args.train_rows, args.same_rows, args.later_rows, args.seed)
    seconds = time.perf_counter() - started
    about = {
        "model": str(args.model), "task": args.task, "seed": args.seed, "num_tokens": len(document),
        "num_questions": len(questions), "num_layers": model.config.num_hidden_layers, "scale": scale,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out, metadata={"capture": json.dumps(about)})
    for name in sorted(tensors):
        print(f"{name:12} {tensors[name].dtype} {list(tensors[name].shape)}")
    print(json.dumps({**about, "file": str(args.out), "bytes": args.out.stat().st_size, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
