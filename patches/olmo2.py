"""OLMo 2: norms after attention and MLP instead of before, and of all query, of all key heads."""

from __future__ import annotations

from transformers.models.olmo2 import modeling_olmo2 as hf

from hf_fuse.decode import spec
from hf_fuse.patches import decoder

NORMS = decoder.Norms(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
    kind="rms_once",
)


class FusedOlmo2RMSNorm(decoder.FusedRMSNorm, hf.Olmo2RMSNorm):
    kind = NORMS.kind


class FusedOlmo2DecoderLayer(decoder.FusedDecoderLayer, hf.Olmo2DecoderLayer):
    norms = NORMS


class FusedOlmo2MLP(decoder.FusedGatedMLP, hf.Olmo2MLP):
    pass


class FusedOlmo2ForCausalLM(decoder.FusedForCausalLM, hf.Olmo2ForCausalLM):
    norms = NORMS

    def rotations(self) -> dict[str | None, spec.Rotation]:
        return {None: spec.rotation(self.model.rotary_emb, wide=True)}


ARCHITECTURE = decoder.architecture(
    "olmo2",
    "RMSNorms after attention and MLP, SiLU·mul (its rotary, in float32, stays transformers')",
    hf.Olmo2Model,
    layer=FusedOlmo2DecoderLayer,
    norm=FusedOlmo2RMSNorm,
    attention=None,
    mlp=FusedOlmo2MLP,
    model=FusedOlmo2ForCausalLM,
)
