"""decode_add_norm: between two projections of a step, where a norm stands before the residual add.

    residual += delta,  or  residual += norm(delta)
    out = norm(residual),  or  residual, rounded to the dtype
    norm(x) = x * rsqrt(mean(x²) + eps) * (offset + weight)

Shapes: out, residual and delta [batch, size], weights [size], size up to 16384. Dtypes: out and the
weights float32, float16 or bfloat16, alike; residual and delta float32. Nothing but out is rounded.

For inference: writes into `out` and `residual`. Source: Gemma 2 (post-norms), OLMo 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.ops._library import on_load, use_kernel


def decode_add_norm(
    out: Tensor,
    residual: Tensor,
    delta: Tensor | None = None,
    *,
    delta_weight: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float,
    offset: float = 0.0,
    backend: str = "auto",
) -> None:
    """Add `delta`, under the norm of `delta_weight` where there is one, to `residual`, and write
    what `weight`'s norm makes of the sum into `out`. Raises RuntimeError for shapes, dtypes and
    devices that do not fit.
    """
    arguments = (out, residual, delta, delta_weight, weight, eps, offset)
    if use_kernel(out, backend):
        torch.ops.hf_fuse.decode_add_norm.default(*arguments)
    else:
        reference(*arguments)


def reference(
    out: Tensor,
    residual: Tensor,
    delta: Tensor | None,
    delta_weight: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
) -> None:
    """The same in plain torch."""
    if delta is not None:
        residual.add_(delta if delta_weight is None else rms_norm(delta, delta_weight, eps, offset))
    out.copy_(residual if weight is None else rms_norm(residual, weight, eps, offset))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """The norm of each row of x, in x's dtype."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight.to(x.dtype))


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::decode_add_norm", lambda *arguments: None)
