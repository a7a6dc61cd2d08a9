"""GPT-2: pre-norm, LayerNorm, learned positions, Conv1D projections, dropout inside attention and
MLP.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.gpt2 import modeling_gpt2 as hf

from hf_fuse import ops
from hf_fuse.decode import spec
from hf_fuse.decode.loop import Generates
from hf_fuse.modules import FusedLayerNorm, by_name, carry, enter, hand_over, state_of, step_aside
from hf_fuse.ops.activations import from_module
from hf_fuse.patches.architecture import Architecture, Swap, unknown_activation


class FusedGPT2Block(hf.GPT2Block):
    """The block with each add fused to the norm that reads it."""

    def forward(self, hidden_states: Tensor, *positional: Any, **arguments: Any) -> Tensor:
        if step_aside():
            return super().forward(hidden_states, *positional, **arguments)
        arguments = by_name(self, positional, arguments)
        if arguments.get("encoder_hidden_states") is not None:  # to raise what transformers raises
            return super().forward(hidden_states, **arguments)
        hidden_states = enter(self, opening_norms(self), hidden_states)
        attention, _ = self.attn(self.ln_1(hidden_states), **arguments)
        hidden_states = carry(self, (self.ln_2,), hidden_states, attention)
        mlp = self.mlp(self.ln_2(hidden_states))
        return hand_over(self, hidden_states, mlp)


class FusedGPT2MLP(hf.GPT2MLP):
    """The MLP with its activation in one kernel; gelu_new is eight in eager mode."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        act = from_module(self.act)
        if act is None or step_aside():
            return super().forward(hidden_states)
        hidden_states = ops.bias_act(
            self.c_fc(hidden_states), None, act, backend=state_of(self).backend
        )
        return self.dropout(self.c_proj(hidden_states))


class FusedGPT2LMHeadModel(Generates, hf.GPT2LMHeadModel):
    """The model whose `generate` runs on the decode engine."""

    def decoder_spec(self) -> spec.DecoderSpec:
        heads = self.config.num_attention_heads
        return spec.DecoderSpec(
            embedding=spec.plain(self.transformer.wte.weight),
            positions=spec.plain(self.transformer.wpe.weight),
            layers=tuple(_layer_spec(block) for block in self.transformer.h),
            final_norm=spec.norm(self.transformer.ln_f),
            head=spec.projection(self.lm_head),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=self.config.hidden_size // heads,
        )


def _layer_spec(block: Any) -> spec.LayerSpec:
    return spec.LayerSpec(
        attention_norm=spec.norm(block.ln_1),
        qkv=spec.projection(block.attn.c_attn),
        scaling=block.attn.scaling,
        attention_out=spec.projection(block.attn.c_proj),
        mlp_norm=spec.norm(block.ln_2),
        mlp_in=spec.projection(block.mlp.c_fc),
        gated=False,
        act=spec.activation(block.mlp.act),
        mlp_out=spec.projection(block.mlp.c_proj),
    )


def opening_norms(layer: nn.Module) -> tuple[nn.Module, ...]:
    return (layer.ln_1,)


def refuse_cross_attention(model: nn.Module) -> str | None:
    if model.config.add_cross_attention:
        return "add_cross_attention=True: the block has a third residual add, for the encoder"
    return None


ARCHITECTURE = Architecture(
    model_type="gpt2",
    summary=(
        "residual adds with the LayerNorms that read them, `gelu_new` (eight kernels in eager mode)"
    ),
    backbone=hf.GPT2Model,
    layers="h",
    final_norm="ln_f",
    opening_norms=opening_norms,
    refuse=refuse_cross_attention,
    swaps=(
        Swap("add_norm", hf.GPT2Block, FusedGPT2Block),
        Swap("add_norm", nn.LayerNorm, FusedLayerNorm),
        Swap("bias_act", hf.GPT2MLP, FusedGPT2MLP, refuse=unknown_activation("act")),
        Swap("decode", hf.GPT2LMHeadModel, FusedGPT2LMHeadModel),
    ),
)
