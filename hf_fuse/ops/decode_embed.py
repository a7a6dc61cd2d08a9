"""decode_embed: the embedding of each sequence's new token, in fp32.

    residual[b] = scale * table[token[b]] (+ positions[length - start[b]])

Shapes: residual [batch, size], token [batch] int64, table [vocab, size], positions [num_positions,
size] or None, length [1] and start [batch] int64. Dtypes: table and positions float32, float16 or
bfloat16, alike; residual float32. For inference: writes into `residual`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.ops._library import on_load, use_kernel


def decode_embed(
    residual: Tensor,
    token: Tensor,
    table: Tensor,
    positions: Tensor | None,
    length: Tensor,
    start: Tensor,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> None:
    """Write the embeddings into `residual`. Raises RuntimeError for shapes, dtypes and devices that
    do not fit.
    """
    if use_kernel(table, backend):
        torch.ops.hf_fuse.decode_embed.default(
            residual, token, table, positions, length, start, scale
        )
    else:
        reference(residual, token, table, positions, length, start, scale=scale)


def reference(
    residual: Tensor,
    token: Tensor,
    table: Tensor,
    positions: Tensor | None,
    length: Tensor,
    start: Tensor,
    *,
    scale: float = 1.0,
) -> None:
    """The same in plain torch."""
    residual.copy_(table[token]).mul_(scale)
    if positions is not None:
        residual.add_(positions[length - start])


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::decode_embed", lambda *arguments: None)
