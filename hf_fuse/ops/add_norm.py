"""add_norm: the residual add and the norm(s) that read it, in one pass over memory.

    residual = (deltas[0] + deltas[1]) + x,  or  deltas[0] + x,  or  x
    rms:         normed = weight * round(residual * rsqrt(mean(residual²) + eps))
    layer:       normed = (residual - mean(residual)) * rsqrt(var(residual) + eps) * weight + bias
    rms_once:    as rms, but rounded once, after the weight (OLMo 2)
    rms_offset:  as rms_once, with 1 + weight for the weight (Gemma)

Shapes: x and deltas [..., hidden_size], weight and bias [hidden_size], 1 <= hidden_size <= 65536.
Dtypes: float32, float16, bfloat16 (float64 on CPU), all tensors alike. Statistics and sums are
fp32; the residual is rounded to the dtype after each add, as transformers does. Statistics are
shifted two-pass: the mean first, then the centred sum of squares, over the row held on chip.

Sources: Ba, Kiros, Hinton 2016 (LayerNorm); Zhang, Sennrich 2019 (RMSNorm); transformers'
LlamaRMSNorm, GPTNeoXLayer, Olmo2RMSNorm, Gemma2RMSNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from hf_fuse import jit
from hf_fuse.ops._library import (
    call_below_autograd,
    no_autograd,
    on_load,
    refuse_second_derivative,
    use_kernel,
)

KINDS = ("rms", "layer", "rms_once", "rms_offset")  # the order of `enum class Norm` in ops.h


def add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str,
    deltas: Sequence[Tensor] = (),
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum `x` and up to two `deltas`, and normalise the sum with one or two norms of the same `eps`
    and `kind`.

    Returns (residual, normed, normed2): residual is `x` itself without deltas, normed2 is None
    without `weight2`. Raises ValueError for an unknown kind or backend or more than two deltas,
    RuntimeError (naming the tensor, what was expected and what came) for shapes, dtypes and devices
    that do not fit.
    """
    if not is_compiling() and jit.direct is not None and backend in ("auto", "cpu"):
        rows = jit.direct.add_norm(x, deltas, weight, bias, weight2, bias2, eps, kind)
        if rows is not None:
            return rows
    if kind not in KINDS:
        raise ValueError(f"hf_fuse add_norm: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if len(deltas) > 2:
        raise ValueError(f"hf_fuse add_norm: at most 2 deltas, got {len(deltas)}")
    delta1, delta2 = (*deltas, None, None)[:2]
    if not use_kernel(x, backend):
        check(x, delta1, delta2, weight, bias, weight2, bias2, kind != "layer")
        return reference(
            x, weight, bias, eps=eps, kind=kind, deltas=deltas, weight2=weight2, bias2=bias2
        )
    stats = not no_autograd(x, delta1, delta2, weight, bias, weight2, bias2)
    arguments = (x, delta1, delta2, weight, bias, weight2, bias2, eps, KINDS.index(kind), stats)
    op = torch.ops.hf_fuse.add_norm.default
    if stats:
        residual, normed, normed2, _, _ = op(*arguments)
    else:
        residual, normed, normed2, _, _ = call_below_autograd(op, *arguments)
    return (x if delta1 is None else residual), normed, normed2


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str,
    deltas: Sequence[Tensor] = (),
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same in plain torch, with transformers' own order of roundings."""
    residual = x
    if deltas:
        residual = (deltas[0] + deltas[1] if len(deltas) == 2 else deltas[0]) + x

    def norm(weight: Tensor, bias: Tensor | None) -> Tensor:
        if kind == "layer":
            return torch.nn.functional.layer_norm(residual, residual.shape[-1:], weight, bias, eps)
        wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        if kind == "rms":
            return weight * wide.to(residual.dtype)
        weight = weight.to(wide.dtype)
        return (wide * (weight + 1 if kind == "rms_offset" else weight)).to(residual.dtype)

    return residual, norm(weight, bias), None if weight2 is None else norm(weight2, bias2)


def check(
    x: Tensor,
    delta1: Tensor | None,
    delta2: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    rms: bool,
) -> None:
    """What the kernels check, for the paths that do not reach them (reference and fake)."""
    if not x.is_floating_point():
        raise RuntimeError(f"hf_fuse add_norm: x must be a floating-point tensor, got {x.dtype}")
    if x.dim() < 1 or not 1 <= x.shape[-1] <= 65536:
        raise RuntimeError(f"hf_fuse add_norm: x must be [..., 1 to 65536], got {tuple(x.shape)}")
    if bias2 is not None and weight2 is None:
        raise RuntimeError("hf_fuse add_norm: bias2 needs weight2")
    for name, bias in {"bias1": bias1, "bias2": bias2}.items():
        if rms and bias is not None:
            raise RuntimeError(f"hf_fuse add_norm: {name} needs a LayerNorm, RMSNorm has no bias")
    named = {
        "delta1": delta1,
        "delta2": delta2,
        "weight1": weight1,
        "bias1": bias1,
        "weight2": weight2,
        "bias2": bias2,
    }
    for name, tensor in named.items():
        if tensor is None:
            continue
        expected = tuple(x.shape) if name.startswith("delta") else (x.shape[-1],)
        if tensor.dtype != x.dtype or tensor.device != x.device or tuple(tensor.shape) != expected:
            raise RuntimeError(
                f"hf_fuse add_norm: {name} must be {x.dtype} {list(expected)} on {x.device}, as "
                f"x is, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def _fake(
    x: Tensor,
    delta1: Tensor | None,
    delta2: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
    kind: int,
    stats: bool,
) -> tuple[Tensor | None, ...]:
    rms = KINDS[kind] != "layer"
    check(x, delta1, delta2, weight1, bias1, weight2, bias2, rms)
    tokens = x.numel() // x.shape[-1]
    stat = torch.float64 if x.dtype == torch.float64 else torch.float32

    def like_x() -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return (
        None if delta1 is None else like_x(),
        like_x(),
        None if weight2 is None else like_x(),
        x.new_empty(tokens, dtype=stat) if stats and not rms else None,
        x.new_empty(tokens, dtype=stat) if stats else None,
    )


def _fake_backward(
    grad_residual: Tensor | None,
    grad_normed1: Tensor | None,
    grad_normed2: Tensor | None,
    residual: Tensor,
    weight1: Tensor,
    weight2: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    kind: int,
    bias1: bool,
    bias2: bool,
) -> tuple[Tensor | None, ...]:
    size = residual.shape[-1]
    wanted = (True, bias1, weight2 is not None, bias2)
    sums = [residual.new_empty(size) if w else None for w in wanted]
    return (torch.empty_like(residual, memory_format=torch.contiguous_format), *sums)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, delta1, delta2, weight1, bias1, weight2, bias2, _, kind, _ = inputs
    residual, _, _, mean, rstd = output
    ctx.save_for_backward(x if delta1 is None else residual, weight1, weight2, mean, rstd)
    ctx.kind = kind
    ctx.present = [t is not None for t in (x, delta1, delta2, weight1, bias1, weight2, bias2)]
    ctx.mark_non_differentiable(*(t for t in (mean, rstd) if t is not None))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_residual: Tensor | None,
    grad_normed1: Tensor | None,
    grad_normed2: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    residual, weight1, weight2, mean, rstd = ctx.saved_tensors
    _, has_delta1, has_delta2, _, has_bias1, _, has_bias2 = ctx.present
    grad_input, grad_weight1, grad_bias1, grad_weight2, grad_bias2 = (
        torch.ops.hf_fuse.add_norm_backward.default(
            grad_residual,
            grad_normed1,
            grad_normed2,
            residual,
            weight1,
            weight2,
            mean,
            rstd,
            ctx.kind,
            has_bias1,
            has_bias2,
        )
    )
    return (
        grad_input,
        grad_input if has_delta1 else None,
        grad_input if has_delta2 else None,
        grad_weight1,
        grad_bias1,
        grad_weight2,
        grad_bias2,
        None,
        None,
        None,
    )


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::add_norm", _fake)
    torch.library.register_fake("hf_fuse::add_norm_backward", _fake_backward)
    torch.library.register_autograd("hf_fuse::add_norm", _backward, setup_context=_setup_context)
    refuse_second_derivative("add_norm_backward")
