"""LLaMA: pre-norm, RMSNorm, rotary over the whole head, grouped key/value heads, gated MLP."""

from __future__ import annotations

from transformers.models.llama import modeling_llama as hf

from hf_fuse.patches import decoder


class FusedLlamaRMSNorm(decoder.FusedRMSNorm, hf.LlamaRMSNorm):
    pass


class FusedLlamaDecoderLayer(decoder.FusedDecoderLayer, hf.LlamaDecoderLayer):
    pass


class FusedLlamaAttention(decoder.FusedAttention, hf.LlamaAttention):
    eager = staticmethod(hf.eager_attention_forward)


class FusedLlamaMLP(decoder.FusedGatedMLP, hf.LlamaMLP):
    pass


class FusedLlamaForCausalLM(decoder.FusedForCausalLM, hf.LlamaForCausalLM):
    pass


ARCHITECTURE = decoder.architecture(
    "llama",
    "residual adds with the RMSNorms that read them, rotary (with a static cache's write), "
    "SiLU·mul",
    hf.LlamaModel,
    layer=FusedLlamaDecoderLayer,
    norm=FusedLlamaRMSNorm,
    attention=FusedLlamaAttention,
    mlp=FusedLlamaMLP,
    model=FusedLlamaForCausalLM,
)
