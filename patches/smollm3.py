"""SmolLM 3: LLaMA's layer; some layers have no rotary positions."""

from __future__ import annotations

from transformers.models.smollm3 import modeling_smollm3 as hf

from hf_fuse.patches import decoder


class FusedSmolLM3RMSNorm(decoder.FusedRMSNorm, hf.SmolLM3RMSNorm):
    pass


class FusedSmolLM3DecoderLayer(decoder.FusedDecoderLayer, hf.SmolLM3DecoderLayer):
    pass


class FusedSmolLM3Attention(decoder.FusedAttention, hf.SmolLM3Attention):
    eager = staticmethod(hf.eager_attention_forward)
    options = {"sliding_window": "sliding_window"}  # noqa: RUF012


class FusedSmolLM3MLP(decoder.FusedGatedMLP, hf.SmolLM3MLP):
    pass


class FusedSmolLM3ForCausalLM(decoder.FusedForCausalLM, hf.SmolLM3ForCausalLM):
    pass


ARCHITECTURE = decoder.architecture(
    "smollm3",
    "LLaMA's; layers without rotary positions as they are",
    hf.SmolLM3Model,
    layer=FusedSmolLM3DecoderLayer,
    norm=FusedSmolLM3RMSNorm,
    attention=FusedSmolLM3Attention,
    mlp=FusedSmolLM3MLP,
    model=FusedSmolLM3ForCausalLM,
)
