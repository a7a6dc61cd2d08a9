"""Qwen 3: LLaMA's layer with norms of every query and key head."""

from __future__ import annotations

from transformers.models.qwen3 import modeling_qwen3 as hf

from hf_fuse.patches import decoder


class FusedQwen3RMSNorm(decoder.FusedRMSNorm, hf.Qwen3RMSNorm):
    pass


class FusedQwen3DecoderLayer(decoder.FusedDecoderLayer, hf.Qwen3DecoderLayer):
    pass


class FusedQwen3Attention(decoder.FusedAttention, hf.Qwen3Attention):
    eager = staticmethod(hf.eager_attention_forward)
    options = {"sliding_window": "sliding_window"}  # noqa: RUF012


class FusedQwen3MLP(decoder.FusedGatedMLP, hf.Qwen3MLP):
    pass


class FusedQwen3ForCausalLM(decoder.FusedForCausalLM, hf.Qwen3ForCausalLM):
    pass


ARCHITECTURE = decoder.architecture(
    "qwen3",
    "LLaMA's, with norms of every query and key head",
    hf.Qwen3Model,
    layer=FusedQwen3DecoderLayer,
    norm=FusedQwen3RMSNorm,
    attention=FusedQwen3Attention,
    mlp=FusedQwen3MLP,
    model=FusedQwen3ForCausalLM,
)
