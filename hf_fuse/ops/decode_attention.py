"""decode_attention: a new token's attention over the cache, its rotation and its cache write.

    q, k = rotate(q), rotate(k), by (length - start) * inv_freq, cos and sin times rope_scale
    keys[length], values[length] = k, v, rounded to the dtype
    out = softmax(cap(scaling * q · keys[first .. length])) · values[first .. length]
    first = start, or with a window max(start, length + 1 - window)
    cap(s) = s, or with a softcap softcap * tanh(s / softcap)

Shapes: qkv [batch, (heads + 2 kv_heads) * head_dim], q heads, then k heads, then v heads, or,
interleaved, q, k and v of each head in turn (GPT-NeoX); caches [batch, kv_heads, capacity,
head_dim]; out [batch, heads, head_dim]; length [1] and start [batch], int64, on the device;
inv_freq [rotary_dim / 2] or None for no rotation, over the first rotary_dim elements of a head, in
halves. length must be below the capacity. Dtypes: qkv and inv_freq float32; caches and out float32,
float16 or bfloat16, alike. Softmax and sums are fp32.

`start` is the number of padding tokens on the left of a sequence; the new token's position is
length - start. window and softcap: 0 for none. For inference: writes into `out`
and the caches. Source: Su et al. 2021 (rotary); Dao et al. 2023 (splitting the cache over blocks,
flash decoding).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.ops._library import on_load, use_kernel


def decode_attention(
    out: Tensor,
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    length: Tensor,
    start: Tensor,
    *,
    scaling: float,
    inv_freq: Tensor | None = None,
    rope_scale: float = 1.0,
    interleaved: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    backend: str = "auto",
) -> None:
    """Write the attention of each sequence's new token into `out`, its key and value into the
    caches. Raises RuntimeError for shapes, dtypes and devices that do not fit.
    """
    if not use_kernel(key_cache, backend):
        reference(
            out, qkv, key_cache, value_cache, length, start, scaling=scaling, inv_freq=inv_freq,
            rope_scale=rope_scale, interleaved=interleaved, window=window, softcap=softcap,
        )  # fmt: skip
        return
    torch.ops.hf_fuse.decode_attention.default(
        out, qkv, key_cache, value_cache, length, start, inv_freq, rope_scale, interleaved, scaling,
        window, softcap,
    )  # fmt: skip


def reference(
    out: Tensor,
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    length: Tensor,
    start: Tensor,
    *,
    scaling: float,
    inv_freq: Tensor | None = None,
    rope_scale: float = 1.0,
    interleaved: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """The same in plain torch."""
    batch, heads, head_dim = out.shape
    kv_heads, capacity = key_cache.shape[1:3]
    if interleaved:
        q, k, v = qkv.view(batch, heads, 3, head_dim).unbind(2)
    else:
        q, k, v = qkv.view(batch, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    if inv_freq is not None:
        angle = (length - start)[:, None].to(inv_freq.dtype) * inv_freq  # [batch, rotary_dim / 2]
        cos, sin = angle.cos()[:, None] * rope_scale, angle.sin()[:, None] * rope_scale
        q, k = (_rotate(t, cos, sin) for t in (q, k))
    key_cache.index_copy_(2, length, k[:, :, None].to(key_cache.dtype))
    value_cache.index_copy_(2, length, v[:, :, None].to(value_cache.dtype))
    wide, group = qkv.dtype, heads // kv_heads
    keys, values = (t.to(wide).repeat_interleave(group, 1) for t in (key_cache, value_cache))
    scores = torch.einsum("bhd,bhsd->bhs", q, keys) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    slot = torch.arange(capacity, device=qkv.device)
    first = torch.maximum(start, length + 1 - window) if window else start
    seen = (slot >= first[:, None]) & (slot <= length)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    # slots not yet written may hold anything, a NaN too
    values = values.masked_fill(~seen[:, None, :, None], 0)
    out.copy_(torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), values))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::decode_attention", lambda *arguments: None)
