"""GPT-NeoX (Pythia): pre-norm, LayerNorm, parallel or serial residual, rotary over a part of the
head, packed QKV.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.gpt_neox import modeling_gpt_neox as hf

from hf_fuse import ops
from hf_fuse.decode import spec
from hf_fuse.decode.loop import Generates
from hf_fuse.modules import (
    FusedLayerNorm,
    carry,
    enter,
    hand_over,
    rotate_and_cache,
    state_of,
    step_aside,
)
from hf_fuse.ops.activations import from_module
from hf_fuse.patches.architecture import Architecture, Swap, unknown_activation


class FusedGPTNeoXLayer(hf.GPTNeoXLayer):
    """The layer with its adds fused to the norms that read them.

    Parallel residual: attention and MLP read two norms of one row, and the layer ends in one
    three-way add that computes both norms of the next layer. Serial residual: as in LLaMA.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        layer_past: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "layer_past": layer_past,
            "position_embeddings": position_embeddings,
            **kwargs,
        }
        if step_aside():
            return super().forward(hidden_states, **arguments)
        hidden_states = enter(self, opening_norms(self), hidden_states)
        attention, _ = self.attention(self.input_layernorm(hidden_states), **arguments)
        attention = self.post_attention_dropout(attention)
        if self.use_parallel_residual:
            mlp = self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
            return hand_over(self, hidden_states, mlp, attention)
        hidden_states = carry(self, (self.post_attention_layernorm,), hidden_states, attention)
        mlp = self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return hand_over(self, hidden_states, mlp)


class FusedGPTNeoXAttention(hf.GPTNeoXAttention):
    """Attention with rotary, and a static cache's write, in one kernel; q, k and v are read where
    QKV left them.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        layer_past: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if step_aside():
            return super().forward(
                hidden_states, attention_mask, layer_past, position_embeddings, **kwargs
            )
        input_shape = hidden_states.shape[:-1]
        qkv = (
            self.query_key_value(hidden_states)
            .view(*input_shape, -1, 3 * self.head_size)
            .transpose(1, 2)
        )
        q, k, v = rotate_and_cache(self, *qkv.chunk(3, dim=-1), position_embeddings, layer_past)
        attend = hf.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, hf.eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.dense(output.reshape(*input_shape, -1).contiguous()), weights


class FusedGPTNeoXMLP(hf.GPTNeoXMLP):
    """The MLP with its activation in one kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        act = from_module(self.act)
        if act is None or step_aside():
            return super().forward(hidden_states)
        hidden_states = ops.bias_act(
            self.dense_h_to_4h(hidden_states), None, act, backend=state_of(self).backend
        )
        return self.dense_4h_to_h(hidden_states)


class FusedGPTNeoXForCausalLM(Generates, hf.GPTNeoXForCausalLM):
    """The model whose `generate` runs on the decode engine."""

    def decoder_spec(self) -> spec.DecoderSpec:
        rotation = spec.rotation(self.gpt_neox.rotary_emb)
        heads = self.config.num_attention_heads
        return spec.DecoderSpec(
            embedding=spec.plain(self.gpt_neox.embed_in.weight),
            positions=None,
            layers=tuple(_layer_spec(layer, rotation) for layer in self.gpt_neox.layers),
            final_norm=spec.norm(self.gpt_neox.final_layer_norm),
            head=spec.projection(self.get_output_embeddings()),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=self.gpt_neox.layers[0].attention.head_size,
            interleaved=True,
        )


def _layer_spec(layer: Any, rotation: spec.Rotation) -> spec.LayerSpec:
    return spec.LayerSpec(
        attention_norm=spec.norm(layer.input_layernorm),
        qkv=spec.projection(layer.attention.query_key_value),
        scaling=layer.attention.scaling,
        attention_out=spec.projection(layer.attention.dense),
        mlp_norm=spec.norm(layer.post_attention_layernorm),
        mlp_in=spec.projection(layer.mlp.dense_h_to_4h),
        gated=False,
        act=spec.activation(layer.mlp.act),
        mlp_out=spec.projection(layer.mlp.dense_4h_to_h),
        parallel=layer.use_parallel_residual,
        rotation=rotation,
    )


def opening_norms(layer: nn.Module) -> tuple[nn.Module, ...]:
    if layer.use_parallel_residual:
        return layer.input_layernorm, layer.post_attention_layernorm
    return (layer.input_layernorm,)


ARCHITECTURE = Architecture(
    model_type="gpt_neox",
    summary=(
        "Pythia: three-way residual add with two LayerNorms, partial rotary from the packed "
        "QKV, GELU"
    ),
    backbone=hf.GPTNeoXModel,
    layers="layers",
    final_norm="final_layer_norm",
    opening_norms=opening_norms,
    swaps=(
        Swap("add_norm", hf.GPTNeoXLayer, FusedGPTNeoXLayer),
        Swap("add_norm", nn.LayerNorm, FusedLayerNorm),
        Swap("rotary", hf.GPTNeoXAttention, FusedGPTNeoXAttention),
        Swap("bias_act", hf.GPTNeoXMLP, FusedGPTNeoXMLP, refuse=unknown_activation("act")),
        Swap("decode", hf.GPTNeoXForCausalLM, FusedGPTNeoXForCausalLM),
    ),
)
