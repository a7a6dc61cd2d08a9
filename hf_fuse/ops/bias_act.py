"""bias_act: act(x + bias), or act(x), in one pass.

Shapes: x [..., size], bias [size]. Dtypes: float32, float16, bfloat16 (float64 on CPU), alike. x +
bias is rounded to the dtype before the activation; the activation is computed in fp32 and rounded
once. transformers' gelu_new is eight kernels in eager mode, each of which reads and writes the
whole tensor; this is one. Backward: grad_x = grad * act'(x + bias), grad_bias = its sum over the
tokens.

Sources: Hendrycks, Gimpel 2016 (GELU); So et al. 2021 (squared ReLU); transformers.activations.
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


def bias_act(x: Tensor, bias: Tensor | None, act: str, *, backend: str = "auto") -> Tensor:
    """act(x + bias), with `act` one of gelu, gelu_tanh, relu, silu, relu2; `bias` may be None.

    Raises ValueError for an unknown act or backend, RuntimeError for shapes, dtypes and devices
    that do not fit.
    """
    number = index_of("bias_act", act)
    if not use_kernel(x, backend):
        check(x, bias)
        return reference(x, bias, act)
    op = torch.ops.hf_fuse.bias_act.default
    if no_autograd(x, bias):
        return call_below_autograd(op, x, bias, number)
    return op(x, bias, number)


def reference(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """The same in plain torch."""
    return REFERENCES[act](x if bias is None else x + bias)


def check(x: Tensor, bias: Tensor | None) -> None:
    """What the kernels check, for the paths that do not reach them."""
    if not x.is_floating_point() or x.dim() < 1:
        raise RuntimeError(
            f"hf_fuse bias_act: x must be floating point [..., size], got {x.dtype} {list(x.shape)}"
        )
    if bias is not None and (
        bias.dtype != x.dtype or bias.device != x.device or bias.shape != x.shape[-1:]
    ):
        raise RuntimeError(
            f"hf_fuse bias_act: bias must be {x.dtype} [{x.shape[-1]}] on {x.device}, as x is, "
            f"got {bias.dtype} {list(bias.shape)} on {bias.device}"
        )


def _fake(x: Tensor, bias: Tensor | None, act: int) -> Tensor:
    check(x, bias)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor | None, act: int) -> Tensor:
    return _fake(x, bias, act)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bias, ctx.act = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, bias = ctx.saved_tensors
    grad_x = torch.ops.hf_fuse.bias_act_backward.default(grad, x, bias, ctx.act)
    return (
        grad_x,
        None if bias is None else grad_x.flatten(0, -2).sum(0) if grad_x.dim() > 1 else grad_x,
        None,
    )


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::bias_act", _fake)
    torch.library.register_fake("hf_fuse::bias_act_backward", _fake_backward)
    torch.library.register_autograd("hf_fuse::bias_act", _backward, setup_context=_setup_context)
    refuse_second_derivative("bias_act_backward")
