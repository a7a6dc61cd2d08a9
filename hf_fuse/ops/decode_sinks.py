"""decode_sinks: attention sinks put directly before the window of a new token's attention.

    first = length + 1 - window                  the slot of the window's first token
    shift = first - start - sinks                how many tokens lie between the sinks and it
    keys[l, b, :, first - sinks + i] = rotate(sink_keys[l, b, :, i], shift * inv_freq[l])
    values[l, b, :, first - sinks + i] = sink_values[l, b, :, i],   0 <= i < sinks

for all layers at once, and nothing while shift <= 0: then the sinks stand in their own slots.

Shapes: caches [layers, batch, kv_heads, capacity, head_dim]; sink_keys and sink_values [layers,
batch, kv_heads, sinks, head_dim], the keys of a sequence's first tokens, rotated for positions 0
to sinks - 1; length [1] and start [batch], int64, on the device; inv_freq [layers, rotary_dim / 2],
over the first rotary_dim elements of a head, in halves, zero where a layer has no rotation. Dtypes:
inv_freq float32; the rest float32, float16 or bfloat16, alike. The rotation is fp32, rounded once.

A step writes them before `decode_attention` with window = sinks + window reads them. In place of
evicted tokens: first - sinks must not be negative where shift is positive. Rotary attention knows
differences of positions alone, so that sinks at the positions before the window's are what
re-assigning all positions within the cache gives, while only the sinks are rotated, each time from
their first keys. For inference: writes into the caches. Source: Xiao et al. 2023 (StreamingLLM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.ops._library import on_load, use_kernel


def decode_sinks(
    keys: Tensor,
    values: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
    length: Tensor,
    start: Tensor,
    *,
    inv_freq: Tensor,
    window: int,
    backend: str = "auto",
) -> None:
    """Write the sinks before the window of the token at slot `length`. Raises RuntimeError for
    shapes, dtypes and devices that do not fit.
    """
    arguments = (keys, values, sink_keys, sink_values, length, start)
    if use_kernel(keys, backend):
        torch.ops.hf_fuse.decode_sinks.default(*arguments, inv_freq, window)
    else:
        reference(*arguments, inv_freq=inv_freq, window=window)


def reference(
    keys: Tensor,
    values: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
    length: Tensor,
    start: Tensor,
    *,
    inv_freq: Tensor,
    window: int,
) -> None:
    """The same in plain torch."""
    sinks = sink_keys.shape[3]
    first = length + 1 - window
    slots = first - sinks + torch.arange(sinks, device=keys.device)
    shift = first - start - sinks  # [batch]
    for sequence in torch.nonzero(shift > 0)[:, 0].tolist():
        angles = shift[sequence].to(inv_freq.dtype) * inv_freq  # [layers, rotary_dim / 2]
        rotated = rotate(sink_keys[:, sequence], angles[:, None, None])
        keys[:, sequence].index_copy_(2, slots, rotated)
        values[:, sequence].index_copy_(2, slots, sink_values[:, sequence])


def rotate(keys: Tensor, angles: Tensor) -> Tensor:
    """`keys` [..., head_dim] rotated by `angles` [..., rotary_dim / 2], in halves, over the first
    rotary_dim elements: in float32, or wider where keys are, and rounded once.
    """
    wide = torch.promote_types(keys.dtype, torch.float32)
    cos, sin, half = angles.cos().to(wide), angles.sin().to(wide), angles.shape[-1]
    first, second, rest = keys.split([half, half, keys.shape[-1] - 2 * half], -1)
    first, second = first.to(wide), second.to(wide)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([turned.to(keys.dtype), rest], -1)


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::decode_sinks", lambda *arguments: None)
