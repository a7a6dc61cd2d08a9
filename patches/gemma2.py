"""Gemma 2: RMSNorms of 1 + weight before and after both branches, a sliding window in every other
layer, soft caps of scores and logits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.gemma2 import modeling_gemma2 as hf

from hf_fuse.patches import decoder

NORMS = decoder.Norms(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    kind="rms_offset",
)


def refuse_bidirectional(model: Any) -> str | None:
    if getattr(model.config, "use_bidirectional_attention", False):
        return "use_bidirectional_attention=True: an encoder"
    return None


class FusedGemma2RMSNorm(decoder.FusedRMSNorm, hf.Gemma2RMSNorm):
    kind = NORMS.kind


class FusedGemma2DecoderLayer(decoder.FusedDecoderLayer, hf.Gemma2DecoderLayer):
    norms = NORMS


class FusedGemma2Attention(decoder.FusedAttention, hf.Gemma2Attention):
    eager = staticmethod(hf.eager_attention_forward)
    options = {  # noqa: RUF012
        "sliding_window": "sliding_window",
        "softcap": "attn_logit_softcapping",
    }


class FusedGemma2MLP(decoder.FusedGatedMLP, hf.Gemma2MLP):
    pass


class FusedForCausalLM(decoder.FusedForCausalLM):
    """What Gemma 2 and 3 share: a scaled embedding, and a soft cap of the logits."""

    norms = NORMS

    def scales(self) -> dict[str, float]:
        dtype, size = self.model.embed_tokens.weight.dtype, self.config.hidden_size
        return {
            "embedding_scale": float(torch.tensor(size**0.5, dtype=dtype)),
            "logits_softcap": self.config.final_logit_softcapping or 0.0,
        }


class FusedGemma2ForCausalLM(FusedForCausalLM, hf.Gemma2ForCausalLM):
    def softcap(self, attention: Any) -> float:
        """Torch's sdpa has no cap: transformers passes over it there, or refuses to run."""
        by_sdpa = self.config._attn_implementation == "sdpa"
        return 0.0 if by_sdpa else attention.attn_logit_softcapping or 0.0


ARCHITECTURE = decoder.architecture(
    "gemma2",
    "adds with the RMSNorms of 1 + weight around them, rotary, GELU·mul",
    hf.Gemma2Model,
    layer=FusedGemma2DecoderLayer,
    norm=FusedGemma2RMSNorm,
    attention=FusedGemma2Attention,
    mlp=FusedGemma2MLP,
    model=FusedGemma2ForCausalLM,
    refuse=refuse_bidirectional,
)
