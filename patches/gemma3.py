"""Gemma 3: as Gemma 2 without caps of scores, with norms of every head; layers with a
window have frequencies of their own.
"""

from __future__ import annotations

from transformers.models.gemma3 import modeling_gemma3 as hf

from hf_fuse.decode import spec
from hf_fuse.patches import decoder
from hf_fuse.patches.gemma2 import NORMS, FusedForCausalLM, refuse_bidirectional


class FusedGemma3RMSNorm(decoder.FusedRMSNorm, hf.Gemma3RMSNorm):
    kind = NORMS.kind


class FusedGemma3DecoderLayer(decoder.FusedDecoderLayer, hf.Gemma3DecoderLayer):
    norms = NORMS


class FusedGemma3Attention(decoder.FusedAttention, hf.Gemma3Attention):
    eager = staticmethod(hf.eager_attention_forward)
    options = {"sliding_window": "sliding_window"}  # noqa: RUF012


class FusedGemma3MLP(decoder.FusedGatedMLP, hf.Gemma3MLP):
    pass


class FusedGemma3ForCausalLM(FusedForCausalLM, hf.Gemma3ForCausalLM):
    def rotations(self) -> dict[str | None, spec.Rotation]:
        rotary = self.model.rotary_emb
        return {kind: spec.rotation(rotary, kind) for kind in set(self.config.layer_types)}


ARCHITECTURE = decoder.architecture(
    "gemma3_text",
    "as Gemma 2, with norms of every query and key head",
    hf.Gemma3TextModel,
    layer=FusedGemma3DecoderLayer,
    norm=FusedGemma3RMSNorm,
    attention=FusedGemma3Attention,
    mlp=FusedGemma3MLP,
    model=FusedGemma3ForCausalLM,
    refuse=refuse_bidirectional,
)
