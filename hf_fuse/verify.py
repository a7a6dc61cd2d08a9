"""patch's own check: one small input through the backbone, before and after, its last tokens over
the cache that the first ones leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_fuse.modules import CACHE

# Relative difference of the last hidden state that reordered roundings explain, with room: a wrong
# kernel is off by about 1. Two right computations of a 48-layer bfloat16 model differ by about
# 2e-2.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

BATCH, LENGTH, CACHED = 2, 9, 7


class VerificationError(RuntimeError):
    """The patched model did not answer as the unpatched one; it has been restored."""


@dataclass(frozen=True)
class Snapshot:
    """What the backbone answered: the last hidden states [batch, length, hidden_size] of all
    tokens, on CPU in float64.
    """

    hidden: Tensor
    dtype: torch.dtype


def snapshot(backbone: nn.Module) -> Snapshot | None:
    """Run the check's input. None when there is nothing to run on (meta parameters)."""
    weight: Any = backbone.get_input_embeddings().weight  # type: ignore[operator]
    offloaded = any(hasattr(m, "_hf_hook") for m in backbone.modules())  # accelerate brings them
    if any(p.is_meta for p in backbone.parameters()) and not offloaded:
        return None
    device = torch.device("cpu") if weight.is_meta else weight.device
    generator = torch.Generator().manual_seed(0)
    size = (BATCH, LENGTH)
    tokens = torch.randint(len(weight), size, generator=generator).to(device)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0  # left padding, so that masked rows are compared too
    with _undisturbed(backbone), torch.no_grad():
        first = backbone(
            input_ids=tokens[:, :CACHED], attention_mask=mask[:, :CACHED], use_cache=True
        )
        then = backbone(
            input_ids=tokens[:, CACHED:], attention_mask=mask, use_cache=True,
            **{CACHE: first[CACHE]},
        )  # fmt: skip
    hidden = torch.cat([first.last_hidden_state, then.last_hidden_state], dim=1)
    return Snapshot(hidden.double().cpu(), hidden.dtype)


def compare(before: Snapshot, after: Snapshot) -> str:
    """Raise VerificationError when the two disagree; else say how close they are."""
    tolerance = TOLERANCE.get(before.dtype, 1e-1)
    a, b = before.hidden, after.hidden
    if not torch.equal(a.isfinite(), b.isfinite()):
        raise VerificationError(
            "hf_fuse.patch: the patched model gives NaN or Inf where the unpatched one does not "
            "(or the reverse); the model has been restored"
        )
    finite = a.isfinite()
    difference = (
        ((a - b)[finite].norm() / a[finite].norm().clamp_min(1e-30)).item() if finite.any() else 0.0
    )
    if not difference <= tolerance:
        raise VerificationError(
            f"hf_fuse.patch: the patched model's last hidden state differs from the unpatched "
            f"one's by {difference:.2e} "
            f"(relative), more than {tolerance:.0e}, what {before.dtype} explains; the model has "
            f"been restored"
        )
    return f"relative difference {difference:.1e} (at most {tolerance:.0e})"


@contextmanager
def _undisturbed(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode (so that no random number is drawn); every module's mode is put back."""
    training = [m for m in backbone.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
