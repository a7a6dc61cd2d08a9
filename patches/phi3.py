"""Phi 3: LLaMA's layer with packed q, k, v and packed gate, up; dropout of both branches."""

from __future__ import annotations

from typing import Any

from transformers.models.phi3 import modeling_phi3 as hf

from hf_fuse.patches import decoder


class FusedPhi3RMSNorm(decoder.FusedRMSNorm, hf.Phi3RMSNorm):
    pass


class FusedPhi3DecoderLayer(decoder.FusedDecoderLayer, hf.Phi3DecoderLayer):
    pass


class FusedPhi3Attention(decoder.FusedAttention, hf.Phi3Attention):
    eager = staticmethod(hf.eager_attention_forward)
    options = {"sliding_window": "sliding_window"}  # noqa: RUF012


class FusedPhi3MLP(decoder.FusedGatedMLP, hf.Phi3MLP):
    pass


class FusedPhi3ForCausalLM(decoder.FusedForCausalLM, hf.Phi3ForCausalLM):
    def window(self, attention: Any) -> int:
        return self.config.sliding_window or 0


ARCHITECTURE = decoder.architecture(
    "phi3",
    "LLaMA's, from packed QKV and packed gate and up",
    hf.Phi3Model,
    layer=FusedPhi3DecoderLayer,
    norm=FusedPhi3RMSNorm,
    attention=FusedPhi3Attention,
    mlp=FusedPhi3MLP,
    model=FusedPhi3ForCausalLM,
)
