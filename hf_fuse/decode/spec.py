"""A decoder as data: what the engine runs, referring to the model's own parameters.

Each architecture (hf_fuse/patches/) states its model with these. Whatever the engine could not run
as the modules would, a quantised weight, a LoRA adapter, a hook (obstacles.py), raises `Unsuited`
with the reason, and `generate` stays with transformers' loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fuse.ops.activations import from_module

_RELAID = "_hf_fuse_relaid"  # in the __dict__ of a Conv1D whose weight is stored by rows
COMMON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Unsuited(Exception):
    """Why the engine leaves a model or a call to transformers' own loop."""


@dataclass(frozen=True)
class Projection:
    """Weights that read the same row, each [rows, size] with contiguous rows, and their biases."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Norm:
    """A norm; `kind` is one of `ops.add_norm`'s."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: str

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None, float, str]:
        """As `ops.decode_linear` takes it, which rounds nothing."""
        return self.weight, self.bias, self.eps, "rms" if self.kind == "rms_once" else self.kind

    @property
    def offset(self) -> float:
        """What the weight counts from."""
        return 1.0 if self.kind == "rms_offset" else 0.0


@dataclass(frozen=True)
class Rotation:
    """Rotary positions: the frequencies, float32, for the first 2 * len(inv_freq) elements of a
    head; cos and sin are multiplied by `scale`. wide: the layers of transformers rotate in float32.
    """

    inv_freq: Tensor
    scale: float = 1.0
    wide: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. gated: `mlp_in` holds gate and up, and the middle is act(gate) * up.

    parallel: attention and MLP both read the layer's input, and both are added to it; otherwise the
    MLP reads what attention was added to. A post-norm is of what a projection adds. q_norm and
    k_norm: of a head, or of all heads, before the rotation. window: how many tokens, the new one
    included, attention reaches, and softcap: its scores are softcap * tanh(score / softcap); 0 for
    none.
    """

    attention_norm: Norm | None
    qkv: Projection
    scaling: float
    attention_out: Projection
    mlp_norm: Norm | None
    mlp_in: Projection
    gated: bool
    act: str
    mlp_out: Projection
    parallel: bool = False
    rotation: Rotation | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    window: int = 0
    softcap: float = 0.0

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All there are."""
        norms = (
            self.attention_norm, self.q_norm, self.k_norm, self.attention_post_norm, self.mlp_norm,
            self.mlp_post_norm,
        )  # fmt: skip
        return tuple(norm for norm in norms if norm is not None)

    @property
    def chained(self) -> bool:
        """Whether its norms are what `ops.decode_linear` cannot take in: a step then has
        `ops.decode_add_norm` between the projections.
        """
        opening = (self.attention_norm, self.mlp_norm)
        posts = (self.attention_post_norm, self.mlp_post_norm)
        return any(n is None or n.kind == "rms_offset" for n in opening) or posts != (None, None)

    @property
    def one_kernel(self) -> bool:
        """Whether one kernel can read the layer's input for both attention and MLP."""
        if self.attention_norm is None or self.mlp_norm is None:
            return False
        alike = self.attention_norm.arguments[2:] == self.mlp_norm.arguments[2:]
        single = len(self.qkv.weights) == len(self.mlp_in.weights) == 1
        return self.parallel and alike and single and not self.gated


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder. interleaved: q, k and v head by head (GPT-NeoX), else all of q, of k, of v.

    positions: a table of learned positions. The embedding is multiplied by embedding_scale, what
    attention and MLP add to the residual stream by residual_scale, the logits are divided by
    logits_scale and softly capped at logits_softcap (0: not).
    """

    embedding: Tensor  # [vocab, hidden_size]
    positions: Tensor | None  # [num_positions, hidden_size]
    layers: tuple[LayerSpec, ...]
    final_norm: Norm
    head: Projection
    num_heads: int
    num_kv_heads: int
    head_dim: int
    interleaved: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float = 0.0

    @property
    def chained(self) -> bool:
        """`LayerSpec.chained` of any layer."""
        return any(layer.chained for layer in self.layers)

    def for_step(self) -> DecoderSpec:
        """The same decoder over residual / residual_scale, to which projections add as they are: an
        RMSNorm with eps / residual_scale² reads the same from it.
        """
        square = self.residual_scale**2
        if square == 1:
            return self
        if not square or any(n.kind == "layer" for layer in self.layers for n in layer.norms):
            raise Unsuited(f"a residual multiplier of {self.residual_scale} and these norms")

        def scaled(norm: Norm | None) -> Norm | None:
            return norm and replace(norm, eps=norm.eps / square)

        def of(layer: LayerSpec) -> LayerSpec:
            if layer.chained:
                raise Unsuited("a residual multiplier and post-norms")
            return replace(
                layer,
                attention_norm=scaled(layer.attention_norm),
                mlp_norm=scaled(layer.mlp_norm),
            )

        final = replace(self.final_norm, eps=self.final_norm.eps / square)
        return replace(
            self,
            layers=tuple(map(of, self.layers)),
            final_norm=final,
            embedding_scale=self.embedding_scale / self.residual_scale,
            residual_scale=1.0,
        )

    @cached_property
    def rotations(self) -> tuple[Rotation, ...]:
        """Those of the layers, each once."""
        return tuple({id(y.rotation): y.rotation for y in self.layers if y.rotation}.values())

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor the spec refers to, but for the frequencies."""
        norms, projections = [self.final_norm], [self.head]
        for layer in self.layers:
            norms += layer.norms
            projections += [layer.qkv, layer.attention_out, layer.mlp_in, layer.mlp_out]
        found = [self.embedding, self.positions]
        for norm in norms:
            found += [norm.weight, norm.bias]
        for projection in projections:
            found += [*projection.weights, *projection.biases]
        return tuple(t for t in found if t is not None)

    def fingerprint(self) -> tuple:
        """Changes when a parameter is another one or lies elsewhere; what a captured step depends
        on. Of the frequencies the values count: a half-precision model's are converted anew.
        """
        places = [(t.data_ptr(), t.shape, t.stride()) for t in self.tensors]
        return (*places, *(f for r in self.rotations for f in r.inv_freq.tolist()))

    def check(self) -> None:
        """Raise Unsuited unless all tensors share a device and a dtype that the kernels have."""
        device, dtype = self.embedding.device, self.embedding.dtype
        if dtype not in COMMON_DTYPES:
            raise Unsuited(f"the model's dtype is {dtype}")
        if any(tensor.dtype != dtype for tensor in self.tensors):
            raise Unsuited("the parameters differ in dtype")
        for tensor in (*self.tensors, *(r.inv_freq for r in self.rotations)):
            if tensor.device != device:
                raise Unsuited("the parameters are on several devices")
        if device.type == "cuda" and (self.head_dim % 8 or self.head_dim > 256):
            raise Unsuited(f"head_dim {self.head_dim} is not a multiple of 8 up to 256")


def halves(module: Any) -> Projection:
    """The two projections that one linear module holds, of as many rows each."""
    whole = projection(module)
    bias = whole.biases[0]
    return Projection(whole.weights[0].chunk(2), (None, None) if bias is None else bias.chunk(2))


def projection(*modules: Any) -> Projection:
    """The projection of one or more linear modules (nn.Linear, or Conv1D: see `store_by_rows`)."""
    weights, biases = [], []
    for module in modules:
        if type(module) not in (nn.Linear, Conv1D):
            raise Unsuited(f"a projection is a {type(module).__name__}")
        weight, bias = plain(module.weight), module.bias
        if type(module) is nn.Linear and weight.shape[1] > 1 and weight.stride(1) != 1:
            raise Unsuited("a weight is not stored by rows")
        weights.append(weight.t() if type(module) is Conv1D else weight)
        biases.append(None if bias is None else plain(bias))
    return Projection(tuple(weights), tuple(biases))


def store_by_rows(model: nn.Module) -> None:
    """Lay the weight of every Conv1D, [in, out], out so that each output's row is contiguous in
    memory. The parameters stay what they are, with other strides; `store_as_before` puts them back.
    """
    for module in model.modules():
        if type(module) is Conv1D and module.weight.stride(0) != 1:
            module.weight.data = module.weight.data.t().contiguous().t()
            module.__dict__[_RELAID] = True


def store_as_before(model: nn.Module) -> None:
    """Undo `store_by_rows`."""
    module: Any
    for module in model.modules():
        if module.__dict__.pop(_RELAID, False):
            module.weight.data = module.weight.data.contiguous()


def norm(module: Any, rms: str = "rms") -> Norm:
    """The norm of a norm module, patched or not: an nn.LayerNorm, or an RMSNorm; `rms` says as
    which of `ops.add_norm`'s kinds.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:
        raise Unsuited("a norm has no weight")
    if isinstance(module, nn.LayerNorm):
        eps, kind = module.eps, "layer"
    elif type(module).__name__.endswith("RMSNorm"):
        eps, kind = rms_eps(module), rms
    else:
        raise Unsuited(f"{type(module).__name__} is not a norm the engine knows")
    return Norm(plain(weight), None if bias is None else plain(bias), eps, kind)


def rms_eps(module: Any) -> float:
    """The eps of one of transformers' RMSNorms."""
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def activation(module: nn.Module) -> str:
    """The kernels' name of an activation module."""
    act = from_module(module)
    if act is None:
        raise Unsuited(f"activation {type(module).__name__} has no kernel")
    return act


def rotation(module: Any, layer_type: str | None = None, wide: bool = False) -> Rotation:
    """The rotation of a rotary module whose frequencies do not depend on the length, for one of its
    layer types where it has several.
    """
    rope_type, of = module.rope_type, "" if layer_type is None else f"{layer_type}_"
    if layer_type is not None:
        rope_type = rope_type[layer_type]
    if rope_type in ("dynamic", "longrope"):
        raise Unsuited(f"rope_type {rope_type!r} changes its frequencies with the length")
    inv_freq = getattr(module, f"{of}inv_freq").float()
    return Rotation(inv_freq, float(getattr(module, f"{of}attention_scaling")), wide)


def plain(tensor: Tensor) -> Tensor:
    """The data of a parameter that is nothing more than a tensor."""
    if type(tensor) not in (nn.Parameter, Tensor):
        raise Unsuited(f"a weight is a {type(tensor).__name__}")
    return tensor.detach()
