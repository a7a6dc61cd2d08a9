"""decode_head_norm: the RMSNorms of queries and keys in a step, before their rotation.

    q, k = norm of each row of q, of k;  norm(x) = x * rsqrt(mean(x²) + eps) * (offset + weight)

Shapes: qkv [batch, width], of which the first q_width elements are q and the next k_width are k;
q_weight and k_weight [a row's size], which divides q_width or k_width: head_dim for a norm of every
head (Qwen 3, Gemma 3), all of q and all of k for one over the heads (OLMo 2). Dtypes: qkv float32,
weights float32, float16 or bfloat16, alike. For inference: writes into `qkv`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.ops._library import on_load, use_kernel
from hf_fuse.ops.decode_add_norm import rms_norm


def decode_head_norm(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    q_width: int,
    k_width: int,
    eps: float,
    offset: float = 0.0,
    backend: str = "auto",
) -> None:
    """Normalise q and k in place. Raises RuntimeError for shapes, dtypes and devices that do not
    fit.
    """
    arguments = (qkv, q_weight, k_weight, q_width, k_width, eps, offset)
    if use_kernel(q_weight, backend):
        torch.ops.hf_fuse.decode_head_norm.default(*arguments)
    else:
        reference(*arguments)


def reference(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_width: int,
    k_width: int,
    eps: float,
    offset: float,
) -> None:
    """The same in plain torch."""
    q, k, _ = qkv.split((q_width, k_width, qkv.shape[1] - q_width - k_width), dim=1)
    for part, weight in ((q, q_weight), (k, k_weight)):
        rows = part.unflatten(1, (-1, len(weight)))
        rows.copy_(rms_norm(rows, weight, eps, offset))


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::decode_head_norm", lambda *arguments: None)
