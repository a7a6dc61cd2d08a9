"""Mistral: LLaMA's layer with a sliding window in all layers or none."""

from __future__ import annotations

from typing import Any

from transformers.models.mistral import modeling_mistral as hf

from hf_fuse.patches import decoder


class FusedMistralRMSNorm(decoder.FusedRMSNorm, hf.MistralRMSNorm):
    pass


class FusedMistralDecoderLayer(decoder.FusedDecoderLayer, hf.MistralDecoderLayer):
    pass


class FusedMistralAttention(decoder.FusedAttention, hf.MistralAttention):
    eager = staticmethod(hf.eager_attention_forward)
    options = {"sliding_window": "sliding_window"}  # noqa: RUF012


class FusedMistralMLP(decoder.FusedGatedMLP, hf.MistralMLP):
    pass


class FusedMistralForCausalLM(decoder.FusedForCausalLM, hf.MistralForCausalLM):
    def window(self, attention: Any) -> int:
        return self.config.sliding_window or 0


ARCHITECTURE = decoder.architecture(
    "mistral",
    "LLaMA's, with its sliding window",
    hf.MistralModel,
    layer=FusedMistralDecoderLayer,
    norm=FusedMistralRMSNorm,
    attention=FusedMistralAttention,
    mlp=FusedMistralMLP,
    model=FusedMistralForCausalLM,
)
