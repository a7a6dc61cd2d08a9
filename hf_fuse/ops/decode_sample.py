"""decode_sample: the next token of each sequence, drawn from what the filters keep, and a step
forward.

    scores = logits; of tokens seen: score * penalty below 0, score / penalty above
    scores[eos] = -inf while step < min_step
    scores /= temperature
    keep the top_k largest and what equals the last of them
    keep the largest that reach the part top_p of the probability
    keep those at least min_p times as probable as the largest
    token[b] = argmax(softmax(scores[b]) / noise[b]), or pad where finished[b]

and then as decode_select; the token becomes seen. With noise of the exponential distribution that
is a draw from the softmax, the one that `torch.multinomial` makes on CUDA. Without noise it is the
largest score, the first of equal ones.

The rules and their order are those of transformers (generation/logits_process.py, one token at
least kept). Among equal scores at the border of top_p the higher indices are kept, which is how a
stable ascending sort leaves them. On CUDA scores closer than 2^-26 count as equal for top_k and
top_p, and probabilities as multiples of 2^-40 of the largest for top_p. Where a sequence's scores
are no distribution (NaN, or the largest is infinite), for which `torch.multinomial` raises, noise
gives the token -1.

Shapes: logits and noise [batch, vocab] float32, seen [batch, vocab] uint8, filters [5] float64
(`Filters`), the rest as in decode_select. The filters are read on the device, so that a captured
step serves any. Writes into all but logits, noise, filters and eos. A CUDA kernel; on a CPU the
reference runs.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from hf_fuse.ops._library import on_load, use_kernel
from hf_fuse.ops.decode_select import advance


@dataclass(frozen=True)
class Filters:
    """What is kept of the scores; the defaults keep all. top_k: 0 for none."""

    penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def tensor(self) -> Tensor:
        """As the op takes them, on the CPU."""
        return torch.tensor(astuple(self), dtype=torch.float64)


def decode_sample(
    token: Tensor,
    finished: Tensor,
    history: Tensor,
    length: Tensor,
    step: Tensor,
    scratch: Tensor,
    seen: Tensor | None,
    logits: Tensor,
    noise: Tensor | None,
    filters: Tensor,
    eos: Tensor,
    pad: int,
    min_step: int = 0,
    *,
    backend: str = "auto",
) -> None:
    """Draw from `logits`. `scratch` is decode_select's workspace. Raises RuntimeError for shapes,
    dtypes and devices that do not fit.
    """
    if logits.is_cuda and use_kernel(logits, backend):
        torch.ops.hf_fuse.decode_sample.default(
            token, finished, history, length, step, scratch, seen, logits, noise, filters, eos,
            pad, min_step,
        )  # fmt: skip
    else:
        reference(
            token, finished, history, length, step, seen, logits, noise, filters, eos, pad, min_step
        )


def kept_scores(logits: Tensor, seen: Tensor | None, filters: Tensor, eos: Tensor | None) -> Tensor:
    """The scores, -inf where the filters remove them; eos: the tokens that may not come yet."""
    penalty, temperature, top_k, top_p, min_p = filters.tolist()
    scores = logits
    if seen is not None:
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen != 0, penalised, scores)
    if eos is not None:
        scores = scores.index_fill(1, eos, -torch.inf)
    scores = scores / temperature
    if top_k:
        k = min(int(top_k), scores.shape[1])
        scores = scores.masked_fill(scores < scores.topk(k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(stable=True)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[:, -1] = False
        scores = scores.masked_fill(removed.scatter(1, order, removed), -torch.inf)
    if min_p:
        probability = scores.softmax(-1)
        least = min_p * probability.amax(-1, keepdim=True)
        scores = scores.masked_fill(probability < least, -torch.inf)
    return scores


def reference(
    token: Tensor,
    finished: Tensor,
    history: Tensor,
    length: Tensor,
    step: Tensor,
    seen: Tensor | None,
    logits: Tensor,
    noise: Tensor | None,
    filters: Tensor,
    eos: Tensor,
    pad: int,
    min_step: int = 0,
) -> None:
    """The same in plain torch."""
    scores = kept_scores(logits, seen, filters, eos if int(step) < min_step else None)
    if noise is None:
        drawn = scores.argmax(-1)
    else:
        drawn = (scores.softmax(-1) / noise).argmax(-1)
        drawn = torch.where(scores.amax(-1).isfinite(), drawn, -1)
    advance(token, finished, history, length, step, drawn, eos, pad)
    if seen is not None:
        inside = (token >= 0) & (token < seen.shape[1])
        seen[inside.nonzero()[:, 0], token[inside]] = 1


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::decode_sample", lambda *arguments: None)
