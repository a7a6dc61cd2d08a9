"""Published model shapes with random weights, to time what cannot be downloaded: `shape:NAME`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers import PretrainedConfig as Config

from hf_fuse.eval.environment import UsageError

PREFIX = "shape:"
LLAMA_3_2_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_parameters": LLAMA_3_2_ROPE,
}
_ROPE_QUARTER = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
_PYTHIA: dict[str, Any] = {"vocab_size": 50304, "rope_parameters": _ROPE_QUARTER}
SHAPES: dict[str, tuple[type[Config], dict[str, Any]]] = {
    "llama-3.2-1b": (
        LlamaConfig,
        {
            **_LLAMA3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        LlamaConfig,
        {
            **_LLAMA3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "rope_parameters": {**LLAMA_3_2_ROPE, "factor": 8.0},
        },
    ),
    "llama-160m": (
        LlamaConfig,
        {
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    ),
    "pythia-2.8b": (
        GPTNeoXConfig,
        {
            **_PYTHIA,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "pythia-160m": (
        GPTNeoXConfig,
        {
            **_PYTHIA,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    ),
    "mistral-7b": (
        MistralConfig,  # its defaults are v0.1's, sliding window included
        {"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen3-1.7b": (
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "gemma-2-2b": (Gemma2Config, {}),  # its defaults
    "gpt2-xl": (GPT2Config, {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt2": (GPT2Config, {}),
}


def build_shape(name: str, dtype: str, device: torch.device) -> nn.Module:
    """The model of a name in `SHAPES`, the same weights every time; "auto" is bfloat16.

    Raises UsageError for an unknown name.
    """
    if name not in SHAPES:
        raise UsageError(f"there is no shape {name}; there are {', '.join(SHAPES)}")
    kind, sizes = SHAPES[name]
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(kind(**sizes), dtype=wanted)
    return model.eval()
