"""The decoder layer of the LLaMA family, and what its architectures declare of it.

A layer is attention and a gated MLP, each with a norm before it, after it, or both; each
architecture says which of its attributes stand where (`Norms`) and what its attention has beside q,
k, v and rotary positions. From that come both the fused classes' forwards and the `DecoderSpec`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_fuse import ops
from hf_fuse.decode import spec
from hf_fuse.decode.loop import Generates
from hf_fuse.modules import (
    CACHE,
    FusedNorm,
    by_name,
    carry,
    enter,
    hand_over,
    rotate_and_cache,
    state_of,
    step_aside,
    update,
)
from hf_fuse.ops.activations import from_module
from hf_fuse.patches.architecture import Architecture, Swap, accept, unknown_activation


@dataclass(frozen=True)
class Norms:
    """The attributes of a layer that are its norms; None where it has none. `kind`: of
    `ops.add_norm`.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    kind: str = "rms"

    def of(self, layer: Any, name: str | None) -> tuple[nn.Module, ...]:
        """The norm of that name, if there is one."""
        return () if name is None else (getattr(layer, name),)


PRE_NORMS = Norms()


class FusedRMSNorm(FusedNorm):
    """An RMSNorm that takes its row from the tensor it reads."""

    kind = "rms"

    @property
    def norm_eps(self) -> float:  # type: ignore[override]
        return spec.rms_eps(self)


class FusedDecoderLayer(nn.Module):
    """The layer with each add fused to the norm that reads it: the MLP's here, the next layer's
    first.
    """

    norms: ClassVar[Norms] = PRE_NORMS

    def forward(self, hidden_states: Tensor, *positional: Any, **arguments: Any) -> Tensor:
        if step_aside():
            return super().forward(hidden_states, *positional, **arguments)
        arguments = by_name(self, positional, arguments)
        norms = self.norms
        hidden_states = enter(self, norms.of(self, norms.before_attention), hidden_states)
        normed = self._norm(norms.before_attention, hidden_states)
        attention, _ = self.self_attn(hidden_states=normed, **arguments)
        attention = self._branch(norms.after_attention, "resid_attn_dropout", attention)
        hidden_states = carry(self, norms.of(self, norms.before_mlp), hidden_states, attention)
        mlp = self.mlp(self._norm(norms.before_mlp, hidden_states))
        mlp = self._branch(norms.after_mlp, "resid_mlp_dropout", mlp)
        return hand_over(self, hidden_states, mlp)

    def _norm(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else getattr(self, name)(x)

    def _branch(self, norm: str | None, dropout: str, x: Tensor) -> Tensor:
        """What is added to the residual stream of what attention or the MLP gave."""
        x = self._norm(norm, x)
        if dropout in self._modules:
            x = getattr(self, dropout)(x)
        scale = self.__dict__.get("residual_multiplier", 1.0)
        return x if scale == 1.0 else x * scale


class FusedAttention(nn.Module):
    """Attention with rotary, and a static cache's write, in one kernel.

    eager: the module's own attention in plain torch. options: further arguments of the attention
    function, and the attributes, of the layer or else of its config, that hold them.
    """

    eager: Any
    options: ClassVar[dict[str, str]] = {}

    def forward(
        self,
        hidden_states: Tensor,
        *positional: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if step_aside():
            return super().forward(hidden_states, *positional, **kwargs)
        kwargs = by_name(self, positional, kwargs)
        cache, attention_mask = kwargs.pop(CACHE, None), kwargs.pop("attention_mask", None)
        position_embeddings = kwargs.pop("position_embeddings", None)
        q, k, v = self._heads(hidden_states)
        if getattr(self, "use_rope", True):
            q, k, v = rotate_and_cache(self, q, k, v, position_embeddings, cache, kwargs)
        else:
            k, v = update(cache, k, v, self.layer_idx, kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, type(self).eager
        )
        dropout = self.attention_dropout if self.training else 0.0
        options = {name: option(self, attribute) for name, attribute in self.options.items()}
        output, weights = attend(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **options,
            **kwargs,
        )  # fmt: skip
        return self.o_proj(output.flatten(2).contiguous()), weights

    def _heads(self, hidden_states: Tensor) -> list[Tensor]:
        """q, k and v, each [batch, heads, seq_len, head_dim]."""
        if "qkv_proj" in self._modules:
            kv = self.num_key_value_heads * self.head_dim
            packed = self.qkv_proj(hidden_states)
            rows = list(packed.split((packed.shape[-1] - 2 * kv, kv, kv), dim=-1))
        else:
            rows = [p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj)]
        heads = [row.view(*row.shape[:-1], -1, self.head_dim) for row in rows]
        if "q_norm" in self._modules:  # of each head
            heads[:2] = self.q_norm(heads[0]), self.k_norm(heads[1])
        return [h.transpose(1, 2) for h in heads]


class FusedGatedMLP(nn.Module):
    """The gated MLP with its elementwise middle in one kernel; gate, up: one linear or two."""

    def forward(self, x: Tensor) -> Tensor:
        act = from_module(activation_of(self))
        if act is None or step_aside():
            return super().forward(x)
        if "gate_up_proj" in self._modules:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ops.gated_act(gate, up, act, backend=state_of(self).backend))


class FusedForCausalLM(Generates):
    """The model whose `generate` runs on the decode engine."""

    norms: ClassVar[Norms] = PRE_NORMS

    def decoder_spec(self) -> spec.DecoderSpec:
        model, config = self.model, self.config
        rotations = self.rotations()
        return spec.DecoderSpec(
            embedding=spec.plain(model.embed_tokens.weight),
            positions=None,
            layers=tuple(self._layer_spec(y, rotations) for y in model.layers),
            final_norm=spec.norm(model.norm, self.norms.kind),
            head=spec.projection(self.lm_head),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=model.layers[0].self_attn.head_dim,
            **self.scales(),
        )

    def scales(self) -> dict[str, float]:
        """Of `DecoderSpec`, those the architecture has."""
        return {}

    def rotations(self) -> dict[str | None, spec.Rotation]:
        """By layer type; under None, that of all others."""
        return {None: spec.rotation(self.model.rotary_emb)}

    def window(self, attention: Any) -> int:
        """How far `attention` reaches; 0 for all."""
        return getattr(attention, "sliding_window", None) or 0

    def softcap(self, attention: Any) -> float:
        """Of the scores of `attention`; 0 for none."""
        return 0.0

    def _layer_spec(self, layer: Any, rotations: dict[str | None, spec.Rotation]) -> spec.LayerSpec:
        attention, mlp, norms = layer.self_attn, layer.mlp, self.norms

        def norm(owner: Any, name: str | None) -> spec.Norm | None:
            found = None if name is None else getattr(owner, name, None)
            return None if found is None else spec.norm(found, norms.kind)

        packed = hasattr(attention, "qkv_proj")
        qkv = ["qkv_proj"] if packed else ["q_proj", "k_proj", "v_proj"]
        gate_up = getattr(mlp, "gate_up_proj", None)
        rotation = rotations.get(getattr(attention, "layer_type", None), rotations.get(None))
        return spec.LayerSpec(
            attention_norm=norm(layer, norms.before_attention),
            qkv=spec.projection(*(getattr(attention, name) for name in qkv)),
            scaling=attention.scaling,
            attention_out=spec.projection(attention.o_proj),
            mlp_norm=norm(layer, norms.before_mlp),
            mlp_in=spec.projection(mlp.gate_proj, mlp.up_proj)
            if gate_up is None
            else spec.halves(gate_up),
            gated=True,
            act=spec.activation(activation_of(mlp)),
            mlp_out=spec.projection(mlp.down_proj),
            rotation=rotation if getattr(attention, "use_rope", True) else None,
            q_norm=norm(attention, "q_norm"),
            k_norm=norm(attention, "k_norm"),
            attention_post_norm=norm(layer, norms.after_attention),
            mlp_post_norm=norm(layer, norms.after_mlp),
            window=self.window(attention),
            softcap=self.softcap(attention),
        )


def option(attention: Any, attribute: str) -> Any:
    """An attribute of the layer, or else of its config."""
    return getattr(attention, attribute, getattr(attention.config, attribute, None))


def activation_of(mlp: Any) -> nn.Module:
    """The activation module of an MLP, under either of its names."""
    return getattr(mlp, "act_fn", None) or mlp.activation_fn


def architecture(
    model_type: str,
    summary: str,
    backbone: type[nn.Module],
    *,
    layer: type[nn.Module],
    norm: type[nn.Module],
    mlp: type[nn.Module],
    attention: type[nn.Module] | None,
    model: type[nn.Module],
    refuse: Callable[[nn.Module], str | None] = accept,
) -> Architecture:
    """The statement of an architecture, from its fused classes, each of which derives from what
    this file has and from transformers' class. attention None: left as it is.
    """
    norms = layer.norms  # type: ignore[attr-defined]
    fused: list[tuple[str, type[nn.Module] | None]] = [
        ("add_norm", layer), ("add_norm", norm), ("rotary", attention), ("gated_act", mlp),
        ("decode", model),
    ]  # fmt: skip
    return Architecture(
        model_type=model_type,
        summary=summary,
        backbone=backbone,
        layers="layers",
        final_norm="norm",
        opening_norms=lambda layer: norms.of(layer, norms.before_attention),
        refuse=refuse,
        swaps=tuple(
            Swap(op, cls.__bases__[-1], cls, refuse=_unknown_act if cls is mlp else accept)
            for op, cls in fused
            if cls is not None
        ),
    )


def _unknown_act(mlp: nn.Module) -> str | None:
    return unknown_activation("act_fn" if hasattr(mlp, "act_fn") else "activation_fn")(mlp)
