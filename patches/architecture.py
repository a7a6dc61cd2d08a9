"""How an architecture states what it fuses. One walker, in hf_fuse/patching.py, applies every
statement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hf_fuse.ops.activations import ACTIVATIONS, from_module


def accept(module: nn.Module) -> str | None:
    """Nothing to refuse."""
    return None


@dataclass(frozen=True)
class Swap:
    """Modules of exactly the class `original` become `fused` when `op` is asked for, unless
    `refuse` gives a reason.
    """

    op: str
    original: type[nn.Module]
    fused: type[nn.Module]
    refuse: Callable[[nn.Module], str | None] = accept

    def __post_init__(self) -> None:
        # Device maps and FSDP policies go by the layer's class name; pickle goes by __qualname__,
        # which stays.
        self.fused.__name__ = self.original.__name__


@dataclass(frozen=True)
class Architecture:
    """One transformers architecture: its backbone class, where its layers and norms are, and what
    is swapped.
    """

    model_type: str
    summary: str  # what is fused, for the table in the README
    backbone: type[nn.Module]
    layers: str  # attribute of the backbone: the list of decoder layers
    final_norm: str  # attribute of the backbone
    opening_norms: Callable[
        [nn.Module], tuple[nn.Module, ...]
    ]  # the norms that read a layer's input
    swaps: tuple[Swap, ...]
    refuse: Callable[[nn.Module], str | None] = accept

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops this architecture can use."""
        return tuple(dict.fromkeys(swap.op for swap in self.swaps))

    def refusal(self, backbone: nn.Module) -> str | None:
        """Why `backbone` cannot be patched, or None."""
        reason = self.refuse(backbone)
        if reason is not None:
            return reason
        # A layer class that is not transformers' own (FSDP2's, say) would lose what it adds.
        known = {c for swap in self.swaps for c in (swap.original, swap.fused)}
        for layer in getattr(backbone, self.layers):
            if type(layer) not in known and any(isinstance(layer, c) for c in known):
                return f"its layers are {type(layer).__qualname__}; patch before wrapping them"
        return None


def unknown_activation(attribute: str) -> Callable[[nn.Module], str | None]:
    """A refusal for MLPs whose activation, at `attribute`, the kernels do not know."""

    def refuse(module: nn.Module) -> str | None:
        act = getattr(module, attribute)
        if from_module(act) is None:
            return (
                f"activation {type(act).__name__} has no kernel (known: {', '.join(ACTIVATIONS)})"
            )
        return None

    return refuse
