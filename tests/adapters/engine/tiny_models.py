# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Tiny models with random weights and a byte-level tokenizer, made on the fly: the engine needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 512
MAX_TOKENS = 4096

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": MAX_TOKENS,
    "initializer_range": 0.2,  # larger than usual, so that the outputs depend on the cache
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def make_llama(folder: Path, *, layers: int = 2, kv_heads: int = 2) -> Path:
    """A Llama with one KV cache group; returns the folder that it was saved to."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**_COMMON, "num_hidden_layers": layers, "num_key_value_heads": kv_heads})
    return _save(LlamaForCausalLM, config, folder)


def make_gemma(folder: Path, *, sliding_window: int = 256) -> Path:
    """A Gemma 3 in which every second layer has a sliding window: two KV cache groups."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **_COMMON,
        num_hidden_layers=4,
        sliding_window=sliding_window,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return _save(Gemma3ForCausalLM, config, folder)


def _save(model_type: Any, config: Any, folder: Path) -> Path:
    import torch

    torch.manual_seed(0)
    model_type(config).to(torch.bfloat16).save_pretrained(folder)
    _make_tokenizer().save_pretrained(folder)
    return folder


def _make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the keys and the values of a small model"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
