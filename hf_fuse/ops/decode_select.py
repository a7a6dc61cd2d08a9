"""decode_select: the next token of each sequence, the most likely one, and a step forward.

    token[b] = argmax(logits[b]), or pad where finished[b]
    history[step, b] = token[b];  finished[b] |= token[b] in eos;  length += 1;  step += 1

While step < min_step the logits of eos count as -inf.

Ties go to the lowest index and a NaN counts as the largest. Shapes: logits [batch, vocab] float32;
token, finished [batch], eos [any], length, step [1], history [max_steps, batch], int64. history may
lie in pinned host memory, where the host reads it without stopping the device. A step past
max_steps writes no history. For inference: writes into all but logits and eos. `workspace` makes
what the kernel needs beside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse.ops._library import on_load, use_kernel


def workspace(batch: int, device: torch.device) -> Tensor:
    """Scratch for decode_select at this batch: zero at first, and kept between calls."""
    return torch.zeros(batch * 256 + 2, dtype=torch.int64, device=device)


def decode_select(
    token: Tensor,
    finished: Tensor,
    history: Tensor,
    length: Tensor,
    step: Tensor,
    scratch: Tensor,
    logits: Tensor,
    eos: Tensor,
    pad: int,
    min_step: int = 0,
    *,
    backend: str = "auto",
) -> None:
    """Select from `logits`. Raises RuntimeError for shapes, dtypes and devices that do not fit."""
    if use_kernel(logits, backend):
        torch.ops.hf_fuse.decode_select.default(
            token, finished, history, length, step, scratch, logits, eos, pad, min_step
        )
    else:
        reference(token, finished, history, length, step, logits, eos, pad, min_step)


def reference(
    token: Tensor,
    finished: Tensor,
    history: Tensor,
    length: Tensor,
    step: Tensor,
    logits: Tensor,
    eos: Tensor,
    pad: int,
    min_step: int = 0,
) -> None:
    """The same in plain torch."""
    if int(step) < min_step:
        logits = logits.index_fill(1, eos, -torch.inf)
    advance(token, finished, history, length, step, logits.argmax(-1), eos, pad)


def advance(
    token: Tensor,
    finished: Tensor,
    history: Tensor,
    length: Tensor,
    step: Tensor,
    chosen: Tensor,
    eos: Tensor,
    pad: int,
) -> None:
    """The end of a step in plain torch, after `chosen` [batch] for the sequences not finished."""
    token.copy_(torch.where(finished != 0, pad, chosen))
    finished.logical_or_(torch.isin(token, eos))
    if int(step) < len(history):
        history[int(step)] = token.to(history.device)
    length.add_(1)
    step.add_(1)


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::decode_select", lambda *arguments: None)
