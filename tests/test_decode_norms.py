"""decode_add_norm and decode_head_norm: within twice the reference's error of float64 truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LOW, NAN, assert_equal, assert_within, each_dtype, name_of, registered
from torch import Tensor

from hf_fuse.ops import decode_add_norm, decode_head_norm
from hf_fuse.ops.decode_add_norm import reference as add_norm_reference
from hf_fuse.ops.decode_head_norm import reference as head_norm_reference

EPS = 1e-6
offsets = pytest.mark.parametrize("offset", [0.0, 1.0])


def vector(size: int, dtype: torch.dtype, device: str) -> Tensor:
    return (torch.randn(size) * 0.3 + 0.5).to(device, dtype)


def make_add_norm(
    dtype: torch.dtype, device: str, size: int = 111, batch: int = 3, which: str = "both"
) -> dict[str, Any]:
    """which: of the delta's norm and the sum's, the ones there are."""
    return {
        "out": torch.full((batch, size), NAN, dtype=dtype, device=device),
        "residual": torch.randn(batch, size, device=device),
        "delta": None if which == "no_delta" else 3 * torch.randn(batch, size, device=device),
        "delta_weight": vector(size, dtype, device) if which in ("both", "delta") else None,
        "weight": vector(size, dtype, device) if which in ("both", "sum", "no_delta") else None,
    }


def after(
    function: Callable[..., None], arguments: dict[str, Any], offset: float, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """out and residual, from the same input; in float64 where `wide`."""
    given = {
        name: t if t is None else t.double() if wide else t.clone() for name, t in arguments.items()
    }
    function(**given, eps=EPS, offset=offset)
    return given["out"], given["residual"]


@each_dtype
@offsets
@pytest.mark.parametrize("which", ["both", "delta", "sum", "none", "no_delta"])
@pytest.mark.parametrize("size", [1, 7, 111, 768, 4096, 4097, 16384])
def test_add_norm(size: int, which: str, offset: float, dtype: torch.dtype, device: str) -> None:
    arguments = make_add_norm(dtype, device, size, which=which)

    def kernel(**given: Any) -> None:
        decode_add_norm(**given, backend=device)

    fused, unfused = (after(f, arguments, offset) for f in (kernel, add_norm_reference))
    truth = after(add_norm_reference, arguments, offset, wide=True)
    for name, *found in zip(("out", "residual"), fused, unfused, truth, strict=True):
        assert_within(*found, atol=4 * torch.finfo(found[0].dtype).eps, name=name)
    for again, first in zip(after(kernel, arguments, offset), fused, strict=True):
        assert_equal(again, first)


@each_dtype
@offsets
@pytest.mark.parametrize("whole", [False, True], ids=["each_head", "all_heads"])
@pytest.mark.parametrize("head_dim", [1, 7, 64, 128, 256])
def test_head_norm(
    head_dim: int, whole: bool, offset: float, dtype: torch.dtype, device: str
) -> None:
    heads, kv_heads = 20, 5
    widths = {"q_width": heads * head_dim, "k_width": kv_heads * head_dim}
    sizes = widths.values() if whole else (head_dim, head_dim)
    q_weight, k_weight = (vector(size, dtype, device) for size in sizes)
    qkv = torch.randn(3, (heads + 2 * kv_heads) * head_dim, device=device)
    fused, unfused, truth = qkv.clone(), qkv.clone(), qkv.double()
    decode_head_norm(fused, q_weight, k_weight, **widths, eps=EPS, offset=offset, backend=device)
    head_norm_reference(unfused, q_weight, k_weight, **widths, eps=EPS, offset=offset)
    head_norm_reference(
        truth, q_weight.double(), k_weight.double(), **widths, eps=EPS, offset=offset
    )
    assert_within(fused, unfused, truth, atol=4 * torch.finfo(torch.float32).eps)
    values = slice(sum(widths.values()), None)
    assert_equal(fused[:, values], qkv[:, values], "values")


def test_rows_far_longer_than_a_block(device: str) -> None:
    size, q_width = 16384, 32768
    weight = vector(size, torch.float32, device)
    qkv = torch.randn(2, q_width + 2 * size, device=device)
    truth = qkv.double()
    decode_head_norm(qkv, weight, weight, q_width=q_width, k_width=size, eps=EPS, backend=device)
    wide = weight.double()
    head_norm_reference(truth, wide, wide, q_width=q_width, k_width=size, eps=EPS, offset=0.0)
    torch.testing.assert_close(qkv.double(), truth, rtol=1e-5, atol=1e-6)


ADD_NORM_ERRORS: dict[str, tuple[dict[str, Callable[[Tensor], Tensor | None]], str]] = {
    "int_out": ({"out": Tensor.int}, "out must be float32, float16 or bfloat16.*got int32"),
    "low_residual": ({"residual": Tensor.half}, "residual must be float32, got float16"),
    "narrow_delta": (
        {"delta": lambda t: t[:, :7].clone()},
        r"delta must be a contiguous \[3, 111\], got \[3, 7\]",
    ),
    "other_weight": (
        {"weight": Tensor.half},
        "weight must have the dtype of out, bfloat16, got float16",
    ),
    "short_weight": ({"delta_weight": lambda t: t[:9].clone()}, r"delta_weight must be \[111\]"),
    "no_delta": ({"delta": lambda t: None}, "delta_weight needs delta"),
}


@pytest.mark.parametrize("case", ADD_NORM_ERRORS)
def test_add_norm_errors_name_the_tensor(case: str, device: str) -> None:
    changes, message = ADD_NORM_ERRORS[case]
    arguments = make_add_norm(torch.bfloat16, device)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    with pytest.raises(RuntimeError, match=f"hf_fuse decode_add_norm: {message}"):
        decode_add_norm(**arguments, eps=EPS, backend=device)


def test_add_norm_refuses_rows_beyond_its_registers(device: str) -> None:
    arguments = make_add_norm(torch.float32, device, 16385)
    with pytest.raises(RuntimeError, match="size must be at most 16384, got 16385"):
        decode_add_norm(**arguments, eps=EPS, backend=device)


HEAD_NORM_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "low_qkv": ({"qkv": torch.zeros(2, 80).bfloat16()}, "qkv must be float32, got bfloat16"),
    "wide": ({"q_width": 80}, "q_width and k_width must be within the 80 of qkv, got 80 and 16"),
    "no_divisor": ({"q_weight": torch.ones(5)}, "the size of q_weight must divide its 32"),
    "other_dtype": ({"k_weight": torch.ones(8).half()}, "k_weight must have the dtype of q_weight"),
}


@pytest.mark.parametrize("case", HEAD_NORM_ERRORS)
def test_head_norm_errors_name_the_tensor(case: str, device: str) -> None:
    changes, message = HEAD_NORM_ERRORS[case]
    arguments: dict[str, Any] = {
        "qkv": torch.zeros(2, 80), "q_weight": torch.ones(8), "k_weight": torch.ones(8),
        "q_width": 32, "k_width": 16, **changes,
    }  # fmt: skip
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"hf_fuse decode_head_norm: {message}"):
        decode_head_norm(**moved, eps=EPS, backend=device)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    ops = registered(device)
    arguments = make_add_norm(dtype, device)
    torch.library.opcheck(ops.decode_add_norm.default, (*arguments.values(), EPS, 1.0))
    weights = vector(8, dtype, device), vector(8, dtype, device)
    qkv = torch.randn(2, 80, device=device)
    torch.library.opcheck(ops.decode_head_norm.default, (qkv, *weights, 32, 16, EPS, 0.0))
