"""Train the bundled demo model from a seeded generator; nothing is downloaded.

    OMP_WAIT_POLICY=PASSIVE python -m scripts.train_demo_model --work-dir /tmp/demo_model --output server/demo_model

Resumable: a checkpoint is written to the work directory every 100 steps and found again there. Data of step n depends
on the seed and n only.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.demo_model.config import model_config
from scripts.demo_model.data import Batch, RowMaker
from scripts.demo_model.forward import logits
from scripts.demo_model.init import initialise
from scripts.demo_model.tokenizer import train_tokenizer

log = logging.getLogger("train")

SEED = 0
EVALUATION_SEED = 10**9  # never reached by SEED + step
FIRST_MIX: dict[str, float] = {
    "niah_single_1": 2, "niah_single_2": 5, "niah_single_3": 3, "niah_multikey_1": 6, "niah_multikey_2": 8,
    "niah_multikey_3": 5, "niah_multivalue": 4, "niah_multiquery": 5, "vt": 4, "cwe": 1.5, "fwe": 1.5,
    "passkey": 2, "number_string": 3, "kv_retrieval": 6, "facts": 6, "small_talk": 1,
}  # fmt: skip
# Looking up values is learnt by step 600; from there the weight is on picking up what the question asks for, which is
# another skill for every wording, and little is left on predicting the filler.
SECOND_MIX: dict[str, float] = {
    "niah_single_1": 2, "niah_single_2": 4, "niah_single_3": 6, "niah_multikey_1": 4, "niah_multikey_2": 6,
    "niah_multikey_3": 8, "niah_multivalue": 3, "niah_multiquery": 6, "vt": 3, "cwe": 1, "fwe": 1,
    "passkey": 2, "number_string": 2, "kv_retrieval": 9, "facts": 12, "small_talk": 4,
}  # fmt: skip
THIRD_MIX: dict[str, float] = {
    "niah_single_1": 1, "niah_single_2": 2, "niah_single_3": 8, "niah_multikey_1": 3, "niah_multikey_2": 3,
    "niah_multikey_3": 9, "niah_multivalue": 1.5, "niah_multiquery": 7, "vt": 1, "cwe": 0.7, "fwe": 0.7,
    "passkey": 1, "number_string": 1, "kv_retrieval": 12, "facts": 14, "small_talk": 3,
}  # fmt: skip
FOURTH_MIX: dict[str, float] = {
    "niah_single_1": 2, "niah_single_2": 3, "niah_single_3": 7, "niah_multikey_1": 3, "niah_multikey_2": 4,
    "niah_multikey_3": 9, "niah_multivalue": 2, "niah_multiquery": 2, "vt": 1, "cwe": 1, "fwe": 1.5,
    "passkey": 2, "number_string": 2, "kv_retrieval": 10, "facts": 12, "small_talk": 4,
}  # fmt: skip
FIFTH_MIX: dict[str, float] = {  # many keys that resemble each other
    "niah_single_1": 2, "niah_single_2": 4, "niah_single_3": 5, "niah_multikey_1": 4, "niah_multikey_2": 10,
    "niah_multikey_3": 10, "niah_multivalue": 1, "niah_multiquery": 1, "vt": 0.3, "cwe": 0.3, "fwe": 0.5,
    "passkey": 2, "number_string": 2, "kv_retrieval": 11, "facts": 5, "small_talk": 3,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stage:
    """`steps` steps of `rows` rows of `length` tokens; `repeats`: share of rows of repeated random tokens."""

    steps: int
    rows: int
    length: int
    repeats: float
    mix: dict[str, float]
    cut_share: float  # of the replies that hold UUIDs
    other_weight: float  # loss on tokens that cannot be looked up, where replies weigh 1


STAGES = (
    Stage(600, 8, 1024, 0.15, FIRST_MIX, cut_share=0.0, other_weight=0.02),
    Stage(200, 8, 1024, 0.08, SECOND_MIX, cut_share=0.6, other_weight=0.02),
    Stage(200, 8, 1024, 0.03, THIRD_MIX, cut_share=0.6, other_weight=0.003),
    Stage(300, 8, 1024, 0.03, FOURTH_MIX, cut_share=0.6, other_weight=0.003),
    Stage(100, 4, 2048, 0.03, FIFTH_MIX, cut_share=0.6, other_weight=0.003),
    Stage(100, 4, 2048, 0.06, FIFTH_MIX, cut_share=0.1, other_weight=0.003),
    Stage(200, 2, 4096, 0.06, FIFTH_MIX, cut_share=0.1, other_weight=0.003),
    Stage(40, 1, 8192, 0.06, FIFTH_MIX, cut_share=0.1, other_weight=0.003),
)
TOTAL_STEPS = sum(stage.steps for stage in STAGES)
WARM_UP_STEPS, DECAY_FROM = 40, 700
MUON_RATE, ADAM_RATE = 0.01, 0.002


def stage_at(step: int) -> Stage:
    for stage in STAGES:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError("past the last stage")


def rate_at(step: int) -> float:
    """Linear warm-up, flat, then linear to zero."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, (TOTAL_STEPS - step) / (TOTAL_STEPS - DECAY_FROM))


def make_batch(tokenizer: PreTrainedTokenizerFast, step: int) -> Batch:
    stage = stage_at(step)
    mix = {"repeats": stage.repeats * sum(stage.mix.values()) / (1 - stage.repeats), **stage.mix}
    maker = RowMaker(tokenizer, SEED + step, cut_share=stage.cut_share, other_weight=stage.other_weight)
    return maker.batch(stage.rows, stage.length, mix)


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    predicted = logits(model, batch.tokens, batch.positions, batch.key_bias)[:, :-1]
    loss = functional.cross_entropy(predicted.flatten(0, 1).float(), batch.tokens[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (loss * weights).sum() / weights.sum()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int, rows: int) -> dict[str, str]:
    """Per task: right reply tokens and, after the slash, wholly right replies (what greedy decoding would give)."""
    result = {}
    for task in FIRST_MIX:
        batch = RowMaker(tokenizer, EVALUATION_SEED).batch(rows, length, {task: 1}, max_position=length + 1)
        with torch.autocast("cpu", torch.bfloat16):
            right = logits(model, batch.tokens, batch.positions, None)[:, :-1].argmax(-1) == batch.tokens[:, 1:]
        counted = batch.weights[:, 1:] > 0.2
        replies, whole = 0, 0
        for row in range(rows):
            flags, marks = right[row].tolist(), counted[row].tolist()
            current: list[bool] = []
            for flag, mark in zip([*flags, False], [*marks, False], strict=True):
                if mark:
                    current.append(flag)
                elif current:
                    replies, whole, current = replies + 1, whole + all(current), []
        share = (right & counted).sum() / counted.sum().clamp(min=1)
        result[task] = f"{share:.2f} {whole}/{replies}"
    return result


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """The folder that is served: bf16 weights, config, tokenizer, chat template."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False, max_new_tokens=256
    )
    half.bfloat16().save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, work_dir: Path, max_steps: int) -> None:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    base_rates = [MUON_RATE, ADAM_RATE]
    checkpoint = work_dir / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
        log.info("resumed at step %d", first)
    loss_of: Callable[[LlamaForCausalLM, Batch], Tensor] = torch.compile(weighted_loss, dynamic=False)
    began, tokens, last_eval = time.time(), 0, time.time()
    for step in range(first, min(max_steps, TOTAL_STEPS)):
        batch = make_batch(tokenizer, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * rate_at(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += batch.tokens.numel()
        if step % 10 == 0:
            log.info("step %d loss %.3f tokens/s %.0f", step, loss.item(), tokens / (time.time() - began))
        if (step + 1) % 100 == 0 or step + 1 == TOTAL_STEPS:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
        if time.time() - last_eval > 300:
            log.info("evaluation %s", json.dumps(evaluate(model, tokenizer, max(1024, stage_at(step).length), 2)))
            last_eval = time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints, outside the repository")
    parser.add_argument("--output", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--max-steps", type=int, default=TOTAL_STEPS, help="stop early and write what there is")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    random.seed(SEED)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    # A tokenizer that is there is kept: it depends on the wording of the tasks, weights and others depend on it.
    if (arguments.output / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.output)
    else:
        tokenizer = train_tokenizer(SEED)
    model = LlamaForCausalLM(model_config(tokenizer))
    initialise(model, SEED)
    log.info("%d parameters, %d steps", sum(p.numel() for p in model.parameters()), TOTAL_STEPS)
    train(model, tokenizer, arguments.work_dir, arguments.max_steps)
    save(model, tokenizer, arguments.output)


if __name__ == "__main__":
    main()
