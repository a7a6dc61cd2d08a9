"""rotary: rotary position embedding of q and k, whole or partial head, from the model's own cos and
sin.

With x1, x2 the halves of the first rotary_dim elements of a head (the rest passes through):

    x1' = x1 * cos1 - x2 * sin1        x2' = x2 * cos2 + x1 * sin2

Shapes: q [batch, heads, seq_len, head_dim] and k [batch, kv_heads, seq_len, head_dim], any strides
with a contiguous last dimension (so the views the projections give); cos and sin [batch or 1,
seq_len, rotary_dim], rotary_dim even. Dtypes: float32, float16, bfloat16 (float64 on CPU), alike.
Each product and the sum are rounded to the dtype, as transformers does.

Source: Su et al. 2021, "RoFormer"; transformers' apply_rotary_pos_emb (LLaMA, GPT-NeoX).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fuse.ops._library import (
    call_below_autograd,
    mark_written,
    no_autograd,
    on_load,
    use_kernel,
)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotated q and k, as new tensors; differentiable in q and k (cos and sin are constants).

    Raises ValueError for an unknown backend, RuntimeError for shapes, dtypes and devices that do
    not fit.
    """
    if not use_kernel(q, backend):
        check(q, k, cos, sin)
        return reference(q, k, cos, sin)
    op = torch.ops.hf_fuse.rotary.default
    if no_autograd(q, k):
        return call_below_autograd(op, q, k, cos, sin, False)
    return op(q, k, cos, sin, False)


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> None:
    """Rotate q and k in place. Not differentiable: RuntimeError when q or k requires grad. Errors
    as `rotary`.
    """
    refuse_grad("rotary_", q, k)
    if not use_kernel(q, backend):
        check(q, k, cos, sin)
        q_new, k_new = reference(q, k, cos, sin)
        q.copy_(q_new)
        k.copy_(k_new)
        return
    call_below_autograd(torch.ops.hf_fuse.rotary_.default, q, k, cos, sin)
    mark_written(q, k)


def rotary_cache_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    length: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Rotate q in place and write the rotated k, and v, into a static cache at its own device-side
    length.

    key_cache and value_cache are [batch, kv_heads, capacity, head_dim]; `length`, one int64 on q's
    device, says how many positions they hold and is advanced by seq_len (transformers'
    `StaticLayer.cumulative_length`). The host reads nothing back. More positions than the capacity:
    RuntimeError on CPU, a device-side assert on CUDA, as in transformers. Not differentiable.
    Errors as `rotary`.
    """
    refuse_grad("rotary_cache_", q, k, v)
    if not use_kernel(q, backend):
        check(q, k, cos, sin)
        check_cache(k, v, key_cache, value_cache, length)
        check_room(k, key_cache, length)
        q_new, k_new = reference(q, k, cos, sin)
        q.copy_(q_new)
        positions = torch.arange(k.shape[2], device=k.device) + length
        key_cache.index_copy_(2, positions, k_new)
        value_cache.index_copy_(2, positions, v)
        length.add_(k.shape[2])
        return
    call_below_autograd(
        torch.ops.hf_fuse.rotary_cache_.default, q, k, v, cos, sin, key_cache, value_cache, length
    )
    mark_written(q, key_cache, value_cache, length)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch, with transformers' own order of roundings."""
    rotary_dim = cos.shape[-1]
    half = rotary_dim // 2
    cos, sin = cos[:, None], sin[:, None]  # [batch or 1, 1, seq_len, rotary_dim]

    def rotate(x: Tensor) -> Tensor:
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
        return torch.cat((turned * cos + swapped * sin, rest), dim=-1)

    return rotate(q), rotate(k)


def refuse_grad(op: str, *tensors: Tensor) -> None:
    """In-place ops write over what a backward would need."""
    if not no_autograd(*tensors):
        raise RuntimeError(
            f"hf_fuse {op}: works in place and has no gradient; use rotary, or torch.no_grad()"
        )


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """What the kernels check, for the paths that do not reach them."""
    if not q.is_floating_point() or q.dim() != 4:
        raise RuntimeError(
            f"hf_fuse rotary: q must be floating point [batch, heads, seq_len, head_dim], got "
            f"{q.dtype} {list(q.shape)}"
        )
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise RuntimeError(
            f"hf_fuse rotary: k must have the batch, seq_len and head_dim of q, {list(q.shape)}, "
            f"got {list(k.shape)}"
        )
    for name, tensor in {"k": k, "cos": cos, "sin": sin}.items():
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise RuntimeError(
                f"hf_fuse rotary: {name} must be {q.dtype} on {q.device}, as q is, got "
                f"{tensor.dtype} on {tensor.device}"
            )
    if (
        cos.dim() != 3
        or cos.shape[0] not in (1, q.shape[0])
        or cos.shape[1] != q.shape[2]
        or sin.shape != cos.shape
    ):
        raise RuntimeError(
            f"hf_fuse rotary: cos and sin must be [batch or 1, seq_len, rotary_dim] for q "
            f"{list(q.shape)}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if cos.shape[-1] > q.shape[-1] or cos.shape[-1] % 2:
        raise RuntimeError(
            f"hf_fuse rotary: rotary_dim, the last dimension of cos, must be even and at most "
            f"head_dim {q.shape[-1]}, "
            f"got {cos.shape[-1]}"
        )


def check_cache(
    k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, length: Tensor
) -> None:
    """What the kernels check of the static cache, for the paths that do not reach them."""
    batch, kv_heads, _, head_dim = k.shape
    capacity = key_cache.shape[2] if key_cache.dim() == 4 else "capacity"
    cache = [batch, kv_heads, capacity, head_dim]
    expected = {
        "v": (v, list(k.shape)),
        "key_cache": (key_cache, cache),
        "value_cache": (value_cache, cache),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.dtype != k.dtype or tensor.device != k.device or list(tensor.shape) != shape:
            raise RuntimeError(
                f"hf_fuse rotary_cache_: {name} must be {k.dtype} {shape} on {k.device}, got "
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if length.dtype != torch.int64 or length.numel() != 1 or length.device != k.device:
        raise RuntimeError(
            f"hf_fuse rotary_cache_: length must be one int64 on {k.device}, got {length.dtype} "
            f"{list(length.shape)} on {length.device}"
        )


def check_room(k: Tensor, key_cache: Tensor, length: Tensor) -> None:
    """Before anything is written, and only on CPU: elsewhere the host would have to wait."""
    if length.device.type == "cpu" and length.item() + k.shape[2] > key_cache.shape[2]:
        raise RuntimeError(
            f"hf_fuse rotary_cache_: the static cache holds {length.item()} of "
            f"{key_cache.shape[2]} positions and cannot take {k.shape[2]} more"
        )


def _empty_heads(like: Tensor) -> Tensor:
    batch, heads, seq_len, head_dim = like.shape
    return like.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    check(q, k, cos, sin)
    return _empty_heads(q), _empty_heads(k)


def _fake_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check(q, k, cos, sin)


def _fake_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    length: Tensor,
) -> None:
    check(q, k, cos, sin)
    check_cache(k, v, key_cache, value_cache, length)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, cos, sin, ctx.transpose = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    cos, sin = ctx.saved_tensors
    grads = [g if g.stride(-1) == 1 else g.contiguous() for g in (grad_q, grad_k)]
    return *torch.ops.hf_fuse.rotary.default(*grads, cos, sin, not ctx.transpose), None, None, None


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::rotary", _fake)
    torch.library.register_fake("hf_fuse::rotary_", _fake_in_place)
    torch.library.register_fake("hf_fuse::rotary_cache_", _fake_cache)
    torch.library.register_autograd("hf_fuse::rotary", _backward, setup_context=_setup_context)
