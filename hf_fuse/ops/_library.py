"""Which ops are there, and the way into them.

`kernels(device_type)` builds and loads a backend on the first question and answers from a dict
afterwards. Once the C++ schemas exist, every op's fake (meta) implementation and autograd formula
are registered with `torch.library`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_fuse import jit

NAMESPACE = "hf_fuse"
BACKENDS = ("auto", "cuda", "cpu", "reference")
_COMMON = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = {"cuda": frozenset(_COMMON), "cpu": frozenset((*_COMMON, torch.float64))}

_ready: dict[str, bool] = {}
_registrations: list[Callable[[], None]] = []


def on_load(register: Callable[[], None]) -> Callable[[], None]:
    """Decorator: run `register` once, when the schemas exist."""
    _registrations.append(register)
    return register


@torch.compiler.assume_constant_result  # dynamo calls it, and does not trace a build
def kernels(device_type: str) -> bool:
    """True when the fused kernels for tensors on `device_type` are loaded."""
    ready = _ready.get(device_type)
    return _prepare(device_type) if ready is None else ready


def _prepare(device_type: str) -> bool:
    if device_type not in ("cpu", "cuda"):
        return False
    ready = jit.load(device_type)
    if ready:
        while _registrations:
            _registrations.pop()()
    _ready[device_type] = ready
    return ready


def use_kernel(x: torch.Tensor, backend: str) -> bool:
    """Whether an op on `x` runs its kernel (True) or its reference (False): with "auto", its kernel
    where there is one for its device and dtype.

    Raises ValueError for an unknown backend and RuntimeError when "cpu" or "cuda" was asked for and
    cannot be had.
    """
    if backend == "auto":
        device_type = x.device.type
        return x.dtype in DTYPES.get(device_type, ()) and kernels(device_type)
    if backend == "reference":
        return False
    if backend not in BACKENDS:
        raise ValueError(f"hf_fuse: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if x.device.type != backend:
        raise RuntimeError(
            f"hf_fuse: backend {backend!r} was asked for, but the tensor is on {x.device}"
        )
    if not kernels(backend):
        raise RuntimeError(
            f"hf_fuse: backend {backend!r} was asked for, but it could not be built: "
            f"{jit.failures[backend]}"
        )
    return True


def no_autograd(*tensors: torch.Tensor | None) -> bool:
    """True when nothing is to be differentiated, so that a call may skip the (Python) autograd
    layer.
    """
    if not torch.is_grad_enabled():
        return True
    return not any(t is not None and t.requires_grad for t in tensors)


_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def call_below_autograd(op: Any, *arguments: Any) -> Any:
    """Call an op past its (Python) autograd layer. torch.compile, which cannot follow that, has no
    such layer to skip.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    with _BelowAutograd():
        return op._op(*arguments)  # the builtin itself: OpOverload.__call__ costs 0.4 µs


def mark_written(*tensors: torch.Tensor) -> None:
    """Tell autograd that an op called below it wrote into `tensors`: using a stale one is an error.

    Inference tensors have no version to raise; torch.compile knows from the schema.
    """
    if torch.compiler.is_compiling():
        return
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def refuse_second_derivative(backward_op: str) -> None:
    """Differentiating a backward raises, where torch would warn and give no gradient."""

    def refuse(ctx: object, *grads: object) -> None:
        raise NotImplementedError(
            f"hf_fuse: {backward_op} has no derivative (create_graph=True asks for second ones); "
            'unpatch the model, or patch it with backend="reference"'
        )

    torch.library.register_autograd(f"hf_fuse::{backward_op}", refuse)
