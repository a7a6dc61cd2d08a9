"""Qwen 2: LLaMA's layer with biases on q, k and v, and sliding windows in some layers."""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2 as hf

from hf_fuse.patches import decoder


class FusedQwen2RMSNorm(decoder.FusedRMSNorm, hf.Qwen2RMSNorm):
    pass


class FusedQwen2DecoderLayer(decoder.FusedDecoderLayer, hf.Qwen2DecoderLayer):
    pass


class FusedQwen2Attention(decoder.FusedAttention, hf.Qwen2Attention):
    eager = staticmethod(hf.eager_attention_forward)
    options = {"sliding_window": "sliding_window"}  # noqa: RUF012


class FusedQwen2MLP(decoder.FusedGatedMLP, hf.Qwen2MLP):
    pass


class FusedQwen2ForCausalLM(decoder.FusedForCausalLM, hf.Qwen2ForCausalLM):
    pass


ARCHITECTURE = decoder.architecture(
    "qwen2",
    "LLaMA's, with biases on q, k and v and sliding windows",
    hf.Qwen2Model,
    layer=FusedQwen2DecoderLayer,
    norm=FusedQwen2RMSNorm,
    attention=FusedQwen2Attention,
    mlp=FusedQwen2MLP,
    model=FusedQwen2ForCausalLM,
)
