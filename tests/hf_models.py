# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Tiny random models of several architectures of transformers, made on the fly, with bytes for tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers

from kvzip.adapters.transformers.models import LanguageModel

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
TEXT = (
    "A clock that does not go is always honest about it. It does not go, and there is a reason; it is made of brass. "
)
# name: (configuration class, settings, where the queries before RoPE can be seen, (scale * sqrt(head_dim))^2)
MODELS: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "llama, grouped queries": ("LlamaConfig", {}, "q_proj", 1),
    "llama, head_dim of its own": ("LlamaConfig", {"head_dim": 32}, "q_proj", 1),
    "llama, one KV head each": ("LlamaConfig", {"num_key_value_heads": 4}, "q_proj", 1),
    "qwen2, bias": ("Qwen2Config", {}, "q_proj", 1),
    "qwen3, normalised queries": ("Qwen3Config", {"head_dim": 16}, "q_norm", 1),
    "mistral, sliding window": ("MistralConfig", {"sliding_window": 8}, "q_proj", 1),
    "gemma2, another scale": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 32},
        "q_proj",
        0.5,
    ),
    "gemma3, both kinds of layer": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 8, "layer_types": LAYERS, "query_pre_attn_scalar": 16},
        "q_norm",
        1,
    ),
    "granite, another scale": ("GraniteConfig", {"attention_multiplier": 0.125}, "q_proj", 0.25),
    "phi3, joint projection": ("Phi3Config", {}, "qkv_proj", 1),
    "gpt-oss, eager attention, YaRN": (
        "GptOssConfig",
        {"head_dim": 16, "sliding_window": 8, "layer_types": LAYERS, "num_local_experts": 2, "num_experts_per_tok": 1},
        "q_proj",
        (0.1 * math.log(32) + 1) ** 2,  # YaRN scales queries and keys for a context 32 times as long
    ),
}


# Layers that differ; as above, where every layer has queries of its own.
MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4, two shapes, shared layers": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 8,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 300,
        },
    ),
    "lfm2, convolutions between": (
        "Lfm2Config",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
}


# One KV head for each query head, learned positions: name of the configuration class, settings, the layer of queries.
OLDER: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2Config", {}, "c_attn"),
    "opt": ("OPTConfig", {"word_embed_proj_dim": 64, "ffn_dim": 96}, "q_proj"),
}


# What calibration refuses: name of the configuration class, settings, a part of the message.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon, attention of its own": ("FalconConfig", {"alibi": False}, "ALL_ATTENTION_FUNCTIONS"),
    "deepseek, latent vectors": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 3,
        },
        "keeps 1 x 16 values",
    ),
}


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make(name: str) -> LanguageModel:
    kind, settings, *_ = MODELS.get(name) or MIXED.get(name) or REFUSED.get(name) or OLDER[name]
    config = getattr(transformers, kind)(**{**SIZES, **settings})
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norms begin as constants: let them matter
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return LanguageModel(name, model.eval(), byte_tokenizer())
