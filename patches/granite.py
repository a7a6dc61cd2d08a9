"""Granite: LLaMA's layer with four multipliers: of embeddings, scores, residual adds and logits."""

from __future__ import annotations

from transformers.models.granite import modeling_granite as hf

from hf_fuse.patches import decoder


class FusedGraniteRMSNorm(decoder.FusedRMSNorm, hf.GraniteRMSNorm):
    pass


class FusedGraniteDecoderLayer(decoder.FusedDecoderLayer, hf.GraniteDecoderLayer):
    pass


class FusedGraniteAttention(decoder.FusedAttention, hf.GraniteAttention):
    eager = staticmethod(hf.eager_attention_forward)


class FusedGraniteMLP(decoder.FusedGatedMLP, hf.GraniteMLP):
    pass


class FusedGraniteForCausalLM(decoder.FusedForCausalLM, hf.GraniteForCausalLM):
    def scales(self) -> dict[str, float]:
        return {
            "embedding_scale": self.model.embedding_multiplier,
            "residual_scale": self.model.layers[0].residual_multiplier,
            "logits_scale": self.config.logits_scaling,
        }


ARCHITECTURE = decoder.architecture(
    "granite",
    "LLaMA's, with its multipliers",
    hf.GraniteModel,
    layer=FusedGraniteDecoderLayer,
    norm=FusedGraniteRMSNorm,
    attention=FusedGraniteAttention,
    mlp=FusedGraniteMLP,
    model=FusedGraniteForCausalLM,
)
