"""LLaMA: pre-norm, RMSNorm, rotary over the whole head, grouped key/value heads, gated MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama import modeling_llama as hf

from hf_fuse import ops
from hf_fuse.decode import spec
from hf_fuse.decode.loop import Generates
from hf_fuse.modules import (
    FusedNorm,
    carry,
    enter,
    hand_over,
    rotate_and_cache,
    state_of,
    step_aside,
)
from hf_fuse.ops.activations import from_module
from hf_fuse.patches.architecture import Architecture, Swap, unknown_activation


class FusedLlamaRMSNorm(FusedNorm, hf.LlamaRMSNorm):
    """LlamaRMSNorm that takes its row from the tensor it reads."""

    kind = "rms"

    @property
    def norm_eps(self) -> float:  # type: ignore[override]
        return self.variance_epsilon


class FusedLlamaDecoderLayer(hf.LlamaDecoderLayer):
    """The layer with each add fused to the norm that reads it: the second norm here, the next
    layer's first.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
            **kwargs,
        }
        if step_aside():
            return super().forward(hidden_states, **arguments)
        hidden_states = enter(self, opening_norms(self), hidden_states)
        attention, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), **arguments
        )
        hidden_states = carry(self, (self.post_attention_layernorm,), hidden_states, attention)
        mlp = self.mlp(self.post_attention_layernorm(hidden_states))
        return hand_over(self, hidden_states, mlp)


class FusedLlamaAttention(hf.LlamaAttention):
    """Attention with rotary, and a static cache's write, in one kernel."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if step_aside():
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        q, k, v = (
            projection(hidden_states).view(head_shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = rotate_and_cache(self, q, k, v, position_embeddings, past_key_values)
        attend = hf.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, hf.eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


class FusedLlamaMLP(hf.LlamaMLP):
    """The gated MLP with its elementwise middle in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        act = from_module(self.act_fn)
        if act is None or step_aside():
            return super().forward(x)
        return self.down_proj(
            ops.gated_act(self.gate_proj(x), self.up_proj(x), act, backend=state_of(self).backend)
        )


class FusedLlamaForCausalLM(Generates, hf.LlamaForCausalLM):
    """The model whose `generate` runs on the decode engine."""

    def decoder_spec(self) -> spec.DecoderSpec:
        inv_freq, rope_scale = spec.rotation(self.model.rotary_emb)
        return spec.DecoderSpec(
            embedding=spec.plain(self.model.embed_tokens.weight),
            positions=None,
            layers=tuple(_layer_spec(layer) for layer in self.model.layers),
            final_norm=spec.norm(self.model.norm),
            head=spec.projection(self.lm_head),
            num_heads=self.config.num_attention_heads,
            num_kv_heads=self.config.num_key_value_heads,
            head_dim=self.model.layers[0].self_attn.head_dim,
            inv_freq=inv_freq,
            rope_scale=rope_scale,
        )


def _layer_spec(layer: Any) -> spec.LayerSpec:
    attention, mlp = layer.self_attn, layer.mlp
    return spec.LayerSpec(
        attention_norm=spec.norm(layer.input_layernorm),
        qkv=spec.projection(attention.q_proj, attention.k_proj, attention.v_proj),
        scaling=attention.scaling,
        attention_out=spec.projection(attention.o_proj),
        mlp_norm=spec.norm(layer.post_attention_layernorm),
        mlp_in=spec.projection(mlp.gate_proj, mlp.up_proj),
        gated=True,
        act=spec.activation(mlp.act_fn),
        mlp_out=spec.projection(mlp.down_proj),
    )


def opening_norms(layer: nn.Module) -> tuple[nn.Module, ...]:
    return (layer.input_layernorm,)


ARCHITECTURE = Architecture(
    model_type="llama",
    summary=(
        "residual adds with the RMSNorms that read them, rotary (with a static cache's "
        "write), SiLU·mul"
    ),
    backbone=hf.LlamaModel,
    layers="layers",
    final_norm="norm",
    opening_norms=opening_norms,
    swaps=(
        Swap("add_norm", hf.LlamaDecoderLayer, FusedLlamaDecoderLayer),
        Swap("add_norm", hf.LlamaRMSNorm, FusedLlamaRMSNorm),
        Swap("rotary", hf.LlamaAttention, FusedLlamaAttention),
        Swap("gated_act", hf.LlamaMLP, FusedLlamaMLP, refuse=unknown_activation("act_fn")),
        Swap("decode", hf.LlamaForCausalLM, FusedLlamaForCausalLM),
    ),
)
