"""Geometry of the demo model: as small as retrieval over 128K tokens allows, see the model card."""

from __future__ import annotations

from transformers import LlamaConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from scripts.demo_model.tokenizer import MAX_LENGTH, VOCAB_SIZE

# With a theta of 1e7 only 8 of a head's 32 rotary pairs turn by less than one radian over 128K tokens, too few to match
# content at that distance; with 1e12 it is 18, and the other 14 tell positions apart.
ROPE_THETA = 1e12


def model_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """4 layers of 256, 4 query heads on 2 KV heads of 64, biases in attention, tied embeddings: 2.9M parameters."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
