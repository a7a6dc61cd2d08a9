"""How the tests measure errors, count op calls and lay tensors out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fuse.ops._library import kernels

LOW = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *LOW)
NAN = float("nan")


def name_of(value: Any) -> str | None:
    """A readable test id: "bfloat16", "2x3" for a shape."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return "x".join(map(str, value)) or "scalar"
    return None


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
few_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
each_backend = pytest.mark.parametrize("backend", ["auto", "reference"])


def registered(device: str) -> Any:
    """torch.ops.hf_fuse with what `device` has kernels for, as an op's first call leaves it."""
    assert kernels(device)
    return torch.ops.hf_fuse


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual - truth‖ / ‖truth‖ in float64; the plain norm of the difference where truth is 0."""
    actual, truth = actual.detach().double(), truth.detach().double()
    norm = truth.norm().item()
    return (actual - truth).norm().item() / (norm or 1.0)


def largest_error(actual: Tensor, truth: Tensor) -> float:
    """max |actual - truth| / max |truth|, so that one wrong element of many does not hide."""
    if truth.numel() == 0:
        return 0.0
    actual, truth = actual.detach().double(), truth.detach().double()
    return (actual - truth).abs().max().item() / (truth.abs().max().item() or 1.0)


def assert_within(
    fused: Tensor,
    unfused: Tensor,
    truth: Tensor,
    factor: float = 2.0,
    atol: float | None = None,
    name: str = "output",
) -> None:
    """`fused` is as close to the float64 `truth` as `factor` times `unfused` is, plus `atol`.

    In the norm and at the worst element. `atol` is relative to the truth's norm and largest
    element; the default is one rounding to nearest of the dtype, which a lucky `unfused` of few
    elements may not have.
    """
    assert fused.dtype == unfused.dtype, name
    assert fused.shape == unfused.shape == truth.shape, name
    assert fused.isfinite().all(), f"{name}: not finite"
    if atol is None:
        atol = torch.finfo(fused.dtype).eps / 2
    for measure in (relative_error, largest_error):
        got, allowed = measure(fused, truth), factor * measure(unfused, truth) + atol
        assert got <= allowed, f"{name}: {measure.__name__} {got:.2e}, at most {allowed:.2e}"


def assert_equal(actual: Tensor, expected: Tensor, name: str = "output") -> None:
    """Bit for bit, the same dtype and shape."""
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    assert torch.equal(actual, expected), f"{name}: {largest_error(actual, expected):.2e}"


def strange(x: Tensor) -> Tensor:
    """Where x is +Inf (1), -Inf (-1), NaN (2) and finite (0)."""
    return x.isnan() * 2 + x.isposinf() * 1 - x.isneginf() * 1


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_ops() -> Iterator[Counter[str]]:
    """Counts the ops that run in the block by name, below autograd: composite ops come as their
    parts (`layer_norm` as `aten::native_layer_norm`), in-place ops under their own name
    (`aten::add_`).
    """
    with _Counter() as counter:
        yield counter.calls


def compile_whole(function: Callable) -> Callable:
    """`function` through dynamo and AOT autograd, as one graph or not at all."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def on_each_number_of_threads(run: Callable[[], None]) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            run()
    finally:
        torch.set_num_threads(threads)


# A tensor of the same values in another place in memory: rows with gaps between them, leading
# dimensions in another order, rows that are not contiguous themselves, a data pointer that is not
# aligned to more than an element.


def _gaps(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), NAN)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -2).contiguous().transpose(0, -2) if x.dim() > 2 else x


def _columns(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x


def _unaligned(x: Tensor) -> Tensor:
    flat = x.new_full((x.numel() + 1,), NAN)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


LAYOUTS = {"gaps": _gaps, "transposed": _transposed, "columns": _columns, "unaligned": _unaligned}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def leaves(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values as leaves that require grad, in the same layout."""
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """d(sum of outputs, each weighted with its own random tensor)/d(inputs).

    The weights depend on `seed` and the shapes, and are the same values for every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for output in outputs:
        values = torch.randn(output.shape, generator=generator).bfloat16()
        grads.append(values.to(output.device, output.dtype))
    return list(torch.autograd.grad(outputs, inputs, grads))
