"""A decoder as data: what the engine runs, referring to the model's own parameters.

Each architecture (hf_fuse/patches/) states its model with these. Whatever the engine could not run
as the modules would, a quantised weight, a LoRA adapter, a hook (obstacles.py), raises `Unsuited`
with the reason, and `generate` stays with transformers' loop.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """A norm; `kind` is "rms" or "layer"."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: str

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None, float, str]:
        return self.weight, self.bias, self.eps, self.kind


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. gated: `mlp_in` holds gate and up, and the middle is act(gate) * up.

    parallel: attention and MLP both read the layer's input, and both are added to it; otherwise the
    MLP reads what attention was added to.
    """

    attention_norm: Norm
    qkv: Projection
    scaling: float
    attention_out: Projection
    mlp_norm: Norm
    mlp_in: Projection
    gated: bool
    act: str
    mlp_out: Projection
    parallel: bool = False

    @property
    def one_kernel(self) -> bool:
        """Whether one kernel can read the layer's input for both attention and MLP."""
        alike = self.attention_norm.arguments[2:] == self.mlp_norm.arguments[2:]
        single = len(self.qkv.weights) == len(self.mlp_in.weights) == 1
        return self.parallel and alike and single and not self.gated


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder. interleaved: q, k and v head by head (GPT-NeoX), else all of q, of k, of v.

    inv_freq: the rotation's frequencies, float32, for the first 2 * len(inv_freq) elements of a
    head; positions: a table of learned positions. A model has one of the two.
    """

    embedding: Tensor  # [vocab, hidden_size]
    positions: Tensor | None  # [num_positions, hidden_size]
    layers: tuple[LayerSpec, ...]
    final_norm: Norm
    head: Projection
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inv_freq: Tensor | None = None
    rope_scale: float = 1.0
    interleaved: bool = False

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor the spec refers to, but for the frequencies."""
        norms, projections = [self.final_norm], [self.head]
        for layer in self.layers:
            norms += [layer.attention_norm, layer.mlp_norm]
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
        frequencies = () if self.inv_freq is None else self.inv_freq.tolist()
        return (*places, *frequencies)

    def check(self) -> None:
        """Raise Unsuited unless all tensors share a device and a dtype that the kernels have."""
        device, dtype = self.embedding.device, self.embedding.dtype
        if dtype not in COMMON_DTYPES:
            raise Unsuited(f"the model's dtype is {dtype}")
        if any(tensor.dtype != dtype for tensor in self.tensors):
            raise Unsuited("the parameters differ in dtype")
        for tensor in (*self.tensors, self.inv_freq):
            if tensor is not None and tensor.device != device:
                raise Unsuited("the parameters are on several devices")
        if device.type == "cuda" and (self.head_dim % 8 or self.head_dim > 256):
            raise Unsuited(f"head_dim {self.head_dim} is not a multiple of 8 up to 256")


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


def norm(module: Any) -> Norm:
    """The norm of a norm module, patched or not: an nn.LayerNorm, or an RMSNorm as transformers'
    LLaMA has it.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:
        raise Unsuited("a norm has no weight")
    if isinstance(module, nn.LayerNorm):
        eps, kind = module.eps, "layer"
    elif hasattr(module, "variance_epsilon"):
        eps, kind = module.variance_epsilon, "rms"
    else:
        raise Unsuited(f"{type(module).__name__} is not a norm the engine knows")
    return Norm(plain(weight), None if bias is None else plain(bias), eps, kind)


def activation(module: nn.Module) -> str:
    """The kernels' name of an activation module."""
    act = from_module(module)
    if act is None:
        raise Unsuited(f"activation {type(module).__name__} has no kernel")
    return act


def rotation(module: Any) -> tuple[Tensor, float]:
    """(inv_freq, scale) of a rotary module whose frequencies do not depend on the length."""
    if module.rope_type in ("dynamic", "longrope"):
        raise Unsuited(f"rope_type {module.rope_type!r} changes its frequencies with the length")
    return module.inv_freq.float(), float(module.attention_scaling)


def plain(tensor: Tensor) -> Tensor:
    """The data of a parameter that is nothing more than a tensor."""
    if type(tensor) not in (nn.Parameter, Tensor):
        raise Unsuited(f"a weight is a {type(tensor).__name__}")
    return tensor.detach()
