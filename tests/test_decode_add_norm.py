"""decode_add_norm: residual stream and normed row against float64, with each norm or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LOW,
    NAN,
    assert_equal,
    assert_within,
    each_dtype,
    name_of,
    on_each_number_of_threads,
    registered,
)
from torch import Tensor

from hf_fuse.ops import decode_add_norm
from hf_fuse.ops.decode_add_norm import reference as add_norm_reference

EPS = 1e-6
ROUNDINGS = 2 * torch.finfo(torch.float32).eps  # of the sum, the root and two products
# Which of delta, delta_weight and weight there are.
VARIANTS = {
    "norm": ("weight",),
    "add": ("delta",),
    "add_norm": ("delta", "weight"),
    "post_norm_add": ("delta", "delta_weight"),
    "post_norm_add_norm": ("delta", "delta_weight", "weight"),
    "round": (),
}
each_variant = pytest.mark.parametrize("present", VARIANTS.values(), ids=VARIANTS)


def make(
    present: tuple[str, ...], size: int, dtype: torch.dtype, device: str, batch: int = 3
) -> dict[str, Any]:
    """Rows of very different scale."""
    scale = torch.tensor([[1e-3], [1.0], [300.0]])[:batch]
    tensors = {
        "delta": torch.randn(batch, size) * scale,
        "delta_weight": torch.randn(size).to(dtype),
        "weight": torch.randn(size).to(dtype),
    }
    given = {k: v.to(device) if k in present else None for k, v in tensors.items()}
    return {"residual": (torch.randn(batch, size) * scale).to(device), **given}


def copied(value: Tensor | None, wide: bool) -> Tensor | None:
    return None if value is None else value.double() if wide else value.clone()


@each_dtype
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 7, 2049, 16384])
@each_variant
def test_error_against_float64(
    present: tuple[str, ...], size: int, offset: float, dtype: torch.dtype, device: str
) -> None:
    given = make(present, size, dtype, device)

    def run(function: Any, out_dtype: torch.dtype, wide: bool = False, **options: Any) -> Any:
        arguments = {k: copied(v, wide) for k, v in given.items()}
        out = torch.full_like(arguments["residual"], NAN, dtype=out_dtype)
        function(out, **arguments, eps=EPS, offset=offset, **options)
        return out, arguments["residual"]

    truth = run(add_norm_reference, torch.float64, wide=True)
    plain = run(add_norm_reference, dtype)
    fused = run(decode_add_norm, dtype, backend=device)
    atol = max(ROUNDINGS, torch.finfo(dtype).eps / 2)
    for row in range(3):  # each scale by itself
        assert_within(fused[0][row], plain[0][row], truth[0][row], atol=atol, name="out")
        assert_within(fused[1][row], plain[1][row], truth[1][row], atol=ROUNDINGS, name="residual")
    if "delta" not in present:
        assert_equal(fused[1], given["residual"], "residual")


@each_dtype
def test_the_same_bits_every_time(dtype: torch.dtype, device: str) -> None:
    given = make(VARIANTS["post_norm_add_norm"], 2560, dtype, device)
    results: list[Tensor] = []

    def run() -> None:
        out = torch.empty_like(given["residual"], dtype=dtype)
        residual = given["residual"].clone()
        decode_add_norm(out, **{**given, "residual": residual}, eps=EPS, backend=device)
        results.extend((out, residual))

    on_each_number_of_threads(run)
    assert_equal(results[0], results[2])
    assert_equal(results[1], results[3])


def test_no_sequences(device: str) -> None:
    given = make(VARIANTS["add_norm"], 7, torch.float32, device)
    empty = {name: t[:0] if t is not None and t.dim() == 2 else t for name, t in given.items()}
    decode_add_norm(torch.empty(0, 7, device=device), **empty, eps=EPS, backend=device)


ERRORS: dict[str, tuple[str, Any, str]] = {
    "vector_out": ("out", lambda t: t[0], r"out must be \[batch, size\], got \[9\]"),
    "int_out": ("out", Tensor.int, r"out must be float32, float16 or bfloat16"),
    "half_residual": ("residual", Tensor.half, r"residual must be float32, got float16"),
    "narrow_delta": ("delta", lambda t: t[:, :7], r"delta must be a contiguous \[3, 9\]"),
    "half_delta": ("delta", Tensor.half, r"delta must be float32, got float16"),
    "no_delta": ("delta", lambda t: None, r"delta_weight needs delta"),
    "other_weight": ("weight", Tensor.half, r"weight must have the dtype of out, bfloat16"),
    "short_weight": ("delta_weight", lambda t: t[:7], r"delta_weight must be \[9\], got \[7\]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_tensor(case: str, device: str) -> None:
    name, change, message = ERRORS[case]
    given = make(VARIANTS["post_norm_add_norm"], 9, torch.bfloat16, device)
    given["out"] = torch.empty(3, 9, device=device, dtype=torch.bfloat16)
    given[name] = change(given[name])
    with pytest.raises(RuntimeError, match=rf"hf_fuse decode_add_norm: {message}"):
        decode_add_norm(**given, eps=EPS, backend=device)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    given = make(VARIANTS["post_norm_add_norm"], 9, dtype, device)
    out = torch.zeros(3, 9, device=device, dtype=dtype)
    torch.library.opcheck(
        registered(device).decode_add_norm.default, (out, *given.values(), EPS, 0.0)
    )
