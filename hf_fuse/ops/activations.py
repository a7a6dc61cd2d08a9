"""The activations the kernels know, under the names transformers' configs use.

`ACTIVATIONS` lists the kernels' own names; their order is `enum class Act` in csrc/include/ops.h.
`from_module` says which of them a transformers activation module is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations as hf_activations

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "relu2")

REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "relu2": lambda x: torch.square(F.relu(x)),
}

# gelu_new, gelu_fast and gelu_pytorch_tanh are one formula, written three ways.
_MODULES: dict[type[nn.Module], str] = {
    hf_activations.GELUActivation: "gelu",
    nn.GELU: "gelu",
    hf_activations.NewGELUActivation: "gelu_tanh",
    hf_activations.FastGELUActivation: "gelu_tanh",
    hf_activations.GELUTanh: "gelu_tanh",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    hf_activations.SiLUActivation: "silu",
    hf_activations.ReLUSquaredActivation: "relu2",
}


def index_of(op: str, act: str) -> int:
    """The kernels' number for `act`; ValueError with the known names otherwise."""
    if act not in ACTIVATIONS:
        raise ValueError(f"hf_fuse {op}: act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    return ACTIVATIONS.index(act)


def from_module(module: nn.Module) -> str | None:
    """The kernels' name for an activation module, or None when they do not know it."""
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return "gelu_tanh" if module.approximate == "tanh" else None
    return _MODULES.get(type(module))
