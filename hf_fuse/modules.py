"""What the fused classes of every architecture share: the normed row that travels with the residual
stream.

A pre-norm layer ends with an add and the next one opens with a norm of that sum. `carry` computes
both in one kernel and hangs the normed row on the residual tensor; the norm module that is called
with that very tensor (a `FusedNorm`) takes its row from there. Everything else sees what it always
saw: the layer returns the true residual stream, the norm module is called and its hooks fire. A
tensor without a row (first layer, replaced by a hook, written in place, another device) makes the
norm compute its own.

Under torch.compile the fused classes step aside and transformers' own code is traced: Inductor
fuses across what an opaque kernel would cut.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_fuse import ops
from hf_fuse.ops.rotary import reference as rotary_reference

STATE = "_hf_fuse"  # the key in a swapped module's __dict__
_CARRIED = "_hf_fuse_carried"  # the attribute of a residual tensor
# What transformers calls the key-value cache, as an argument and in outputs: "cache" from 5.24 on.
_OUTPUTS = {field.name for field in fields(BaseModelOutputWithPast)}
CACHE = "cache" if "cache" in _OUTPUTS else "past_key_values"


@dataclass(eq=False)
class Fused:
    """What a swapped module knows: what it was, where it runs, which norms read its output."""

    original: type[nn.Module]
    op: str
    backend: str = "auto"
    next_norms: tuple[Any, ...] = ()
    notes: Counter[str] = field(default_factory=Counter)  # why calls were left to transformers


class Carried:
    """The normed rows of one residual tensor, for the norm modules named. Never saved or copied
    with the tensor.
    """

    __slots__ = ("norms", "rows", "version")

    def __init__(
        self,
        norms: tuple[nn.Module, ...] = (),
        rows: Any = (),
        version: int | None = None,
    ):
        self.norms, self.rows, self.version = list(norms), list(rows), version

    def __bool__(self) -> bool:
        return bool(self.norms)

    def __reduce__(self) -> tuple[type, tuple]:
        return Carried, ()


step_aside = torch.compiler.is_compiling


def state_of(module: nn.Module) -> Fused:
    """The `Fused` of a swapped module."""
    return module.__dict__[STATE]


def by_name(
    module: nn.Module, positional: Sequence[Any], arguments: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a swapped layer's forward but its input, by the names that the installed
    transformers has for them. It takes the cache by its old name, too.
    """
    if positional:
        names = _names_after_input(state_of(module).original)  # type: ignore[arg-type]
        arguments = arguments | dict(zip(names, positional, strict=False))
    if CACHE != "past_key_values" and "past_key_values" in arguments:
        old = arguments.pop("past_key_values")
        arguments.setdefault(CACHE, old)
    return arguments


@functools.cache
def _names_after_input(layer: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(layer.forward).parameters)[2:]


def carry(
    layer: nn.Module,
    norms: tuple[Any, ...],
    x: Tensor,
    *deltas: Tensor,
    reason: str | None = None,
) -> Tensor:
    """The sum of `x` and `deltas`, carrying its rows for `norms`, in one kernel where possible.

    The order of the sum is (deltas[0] + deltas[1]) + x. Without deltas, `x` itself with rows hung
    on it. A `reason` says why no rows are wanted.
    """
    fused = state_of(layer)
    x, deltas = _one_dtype(x, deltas)
    if not norms and not reason:  # the architecture has none here
        return _sum(deltas) + x
    reason = reason or refusal(norms, x) or _unseen_writes(x, *norms)
    if reason:
        fused.notes[reason] += 1
        return _sum(deltas) + x if deltas else x
    weight, bias = norms[0].row_parameters()
    weight2, bias2 = norms[1].row_parameters() if len(norms) == 2 else (None, None)
    residual, *rows = ops.add_norm(
        x,
        weight,
        bias,
        eps=norms[0].norm_eps,
        kind=norms[0].kind,
        deltas=deltas,
        weight2=weight2,
        bias2=bias2,
        backend=fused.backend,
    )
    setattr(residual, _CARRIED, Carried(norms, rows[: len(norms)], _version(residual)))
    return residual


def hand_over(layer: nn.Module, x: Tensor, *deltas: Tensor) -> Tensor:
    """`carry` for the sum that ends a layer, to the norms that open the next."""
    reason = _cannot_cross(layer, x)
    return carry(layer, state_of(layer).next_norms, x, *deltas, reason=reason)


def enter(layer: nn.Module, norms: tuple[Any, ...], x: Tensor) -> Tensor:
    """What a layer does first with its input, which `norms` will read.

    Drops rows that a hook on this layer may have made stale unseen. Where the input feeds two norms
    and the layer before has not computed them, both are computed in one kernel.
    """
    if _unseen_writes(x, layer):
        x.__dict__.pop(_CARRIED, None)
        return x
    if len(norms) < 2 or getattr(x, _CARRIED, None) or _cannot_cross(layer, x):
        return x
    return carry(layer, norms, x)


def take(norm: nn.Module, x: Tensor) -> Tensor | None:
    """The row `x` carries for `norm`, if it is still the norm of `x`."""
    carried = getattr(x, _CARRIED, None)
    if carried is None:
        return None
    for i, owner in enumerate(carried.norms):
        if owner is norm and carried.version == _version(x):
            row = carried.rows[i]
            if torch.is_grad_enabled():
                # A row from a no_grad forward (reentrant checkpointing) must not cut the graph.
                return row if row.requires_grad or not x.requires_grad else None
            del carried.norms[i], carried.rows[i]  # kept hidden states must not keep the rows
            return row
    return None


def _sum(deltas: tuple[Tensor, ...]) -> Tensor:
    """One or two branches, in the order and dtype in which transformers adds them."""
    return deltas[0] + deltas[1] if len(deltas) == 2 else deltas[0]


def _one_dtype(x: Tensor, deltas: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Under autocast the branches are narrower than the stream; promote as `+` would."""
    if all(d.dtype == x.dtype for d in deltas):
        return x, deltas
    delta = _sum(deltas)
    dtype = torch.promote_types(delta.dtype, x.dtype)
    return x.to(dtype), (delta.to(dtype),)


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _cannot_cross(layer: nn.Module, x: Tensor) -> str | None:
    """Why a row may not leave or enter `layer` with the residual stream, or None."""
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        return "gradient checkpointing: a recomputed layer must find what it found the first time"
    return _unseen_writes(x, layer)


def _unseen_writes(x: Tensor, *modules: nn.Module) -> str | None:
    """In inference mode a tensor has no version: what a hook writes into it goes unnoticed."""
    if x.is_inference() and (
        _has_any_global_hook() or any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    ):
        return "hooks in inference mode: a write in place could not be seen"
    return None


def refusal(norms: tuple[Any, ...], x: Tensor) -> str | None:
    """Why `norms` of a tensor like `x` cannot be fused, or None."""
    dtype, device, shape = x.dtype, x.device, x.shape[-1:]
    for norm in norms:
        if not isinstance(norm, FusedNorm):
            return f"{type(norm).__name__} is not a fused norm"
        weight, bias = norm.row_parameters()
        if weight is None:
            return "the norm has no weight"
        for tensor in (weight,) if bias is None else (weight, bias):
            if type(tensor) not in (nn.Parameter, Tensor):
                return f"the norm's weight is a {type(tensor).__name__}"
            if tensor.dtype is not dtype or tensor.device != device or tensor.shape != shape:
                return "the norm's weight and its input differ in device, dtype or size"
    first, last = norms[0], norms[-1]
    if first is not last and (first.norm_eps != last.norm_eps or first.kind != last.kind):
        return "the norms of one row differ in kind or eps"
    if (
        dtype is not torch.float32
        and first.kind == "layer"
        and torch.is_autocast_enabled(device.type)
    ):
        return "autocast computes this LayerNorm in float32"
    return None


class FusedNorm(nn.Module):
    """A norm that takes its row from the tensor it is called with, or computes it with the fused
    op.
    """

    kind: str
    norm_eps: float

    def row_parameters(self) -> tuple[Any, Tensor | None]:
        """Weight and bias; read from where a module keeps them, which is quicker than by name."""
        return self._parameters.get("weight"), self._parameters.get("bias")

    def forward(self, hidden_states: Tensor) -> Tensor:
        if step_aside():
            return super().forward(hidden_states)
        row = take(self, hidden_states)
        if row is not None:
            return row
        fused = state_of(self)
        reason = refusal((self,), hidden_states)
        if reason:
            fused.notes[reason] += 1
            return super().forward(hidden_states)
        weight, bias = self.row_parameters()
        return ops.add_norm(
            hidden_states, weight, bias, eps=self.norm_eps, kind=self.kind, backend=fused.backend
        )[1]


class FusedLayerNorm(FusedNorm, nn.LayerNorm):
    """nn.LayerNorm over the last dimension."""

    kind = "layer"

    @property
    def norm_eps(self) -> float:  # type: ignore[override]
        return self.eps


def rotate_and_cache(
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_embeddings: Any,
    cache: Cache | None,
    kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate q and k and put k and v into the cache; returns what attention reads.

    With a plain static cache and nothing to differentiate, one kernel rotates and writes into the
    cache. q is [batch, heads, seq_len, head_dim], k and v [batch, kv_heads, seq_len, head_dim].
    `kwargs`: as in `update`.
    """
    cos, sin = position_embeddings
    fused = state_of(attention)
    if cos.dtype != q.dtype:  # autocast: torch promotes
        fused.notes["cos and sin differ from q in dtype"] += 1
        q, k = rotary_reference(q, k, cos, sin)
    else:
        static = _plain_static_layer(cache, attention.layer_idx, k, v)
        if static is not None:
            q = q.clone()  # q is a view of a projection's output, which a hook may have kept
            ops.rotary_cache_(
                q,
                k,
                v,
                cos,
                sin,
                static.keys,
                static.values,
                static.cumulative_length,
                backend=fused.backend,
            )
            return q, static.keys, static.values
        q, k = ops.rotary(q, k, cos, sin, backend=fused.backend)
    return q, *update(cache, k, v, attention.layer_idx, kwargs)


def update(
    cache: Cache | None, k: Tensor, v: Tensor, index: int, kwargs: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """k and v put into the cache, if there is one; returns what attention reads. `kwargs` are those
    of the attention function, which the paged cache of transformers 5.24 writes into.
    """
    if cache is None:
        return k, v
    if kwargs is None or CACHE != "cache":
        return cache.update(k, v, index)
    return cache.update(k, v, index, kwargs=kwargs)


def _plain_static_layer(cache: Cache | None, index: int, k: Tensor, v: Tensor) -> Any:
    """The static cache layer a fused write may go to, made ready; None when its own `update` must
    run.
    """
    layers: Any = getattr(cache, "layers", ())  # a paged cache has none
    if getattr(cache, "offloading", False) or len(layers) <= index:
        return None
    layer = layers[index]
    if type(layer) is not StaticLayer or (
        torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    ):
        return None
    if not layer.is_initialized:
        layer.lazy_initialization(k, v)
    assert layer.keys is not None
    if layer.keys.dtype != k.dtype or layer.keys.device != k.device:
        return None
    return layer
