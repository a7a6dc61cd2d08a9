"""gated_act: act(gate) * up, the elementwise middle of a gated MLP (SwiGLU, GEGLU), in one pass.

Shapes: gate and up [..., size], alike. Dtypes: float32, float16, bfloat16 (float64 on CPU).
act(gate) is computed in fp32 and rounded to the dtype before the product, as two separate kernels
would. Backward: grad_up = grad * act(gate), grad_gate = grad * up * act'(gate), recomputed from
gate and up, so only those two are saved.

Source: Shazeer 2020, "GLU Variants Improve Transformer"; transformers' LlamaMLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fuse.ops._library import (
    call_below_autograd,
    no_autograd,
    on_load,
    refuse_second_derivative,
    use_kernel,
)
from hf_fuse.ops.activations import REFERENCES, index_of


def gated_act(gate: Tensor, up: Tensor, act: str, *, backend: str = "auto") -> Tensor:
    """act(gate) * up, with `act` one of gelu, gelu_tanh, relu, silu, relu2.

    Raises ValueError for an unknown act or backend, RuntimeError for shapes, dtypes and devices
    that do not fit.
    """
    number = index_of("gated_act", act)
    if not use_kernel(gate, backend):
        check(gate, up)
        return reference(gate, up, act)
    op = torch.ops.hf_fuse.gated_act.default
    if no_autograd(gate, up):
        return call_below_autograd(op, gate, up, number)
    return op(gate, up, number)


def reference(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """The same in plain torch."""
    return REFERENCES[act](gate) * up


def check(gate: Tensor, up: Tensor) -> None:
    """What the kernels check, for the paths that do not reach them."""
    if not gate.is_floating_point() or gate.dim() < 1:
        raise RuntimeError(
            f"hf_fuse gated_act: gate must be floating point [..., size], got {gate.dtype} "
            f"{list(gate.shape)}"
        )
    if up.dtype != gate.dtype or up.device != gate.device or up.shape != gate.shape:
        raise RuntimeError(
            f"hf_fuse gated_act: up must be {gate.dtype} {list(gate.shape)} on {gate.device}, as "
            f"gate is, "
            f"got {up.dtype} {list(up.shape)} on {up.device}"
        )


def _fake(gate: Tensor, up: Tensor, act: int) -> Tensor:
    check(gate, up)
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor, act: int) -> tuple[Tensor, Tensor]:
    return _fake(gate, up, act), _fake(gate, up, act)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, ctx.act = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = torch.ops.hf_fuse.gated_act_backward.default(grad, gate, up, ctx.act)
    return grad_gate, grad_up, None


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::gated_act", _fake)
    torch.library.register_fake("hf_fuse::gated_act_backward", _fake_backward)
    torch.library.register_autograd("hf_fuse::gated_act", _backward, setup_context=_setup_context)
    refuse_second_derivative("gated_act_backward")
