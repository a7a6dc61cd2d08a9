"""decode_head_norm: the norms of q and k in place, against float64; v is never read."""

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

from hf_fuse.ops import decode_head_norm
from hf_fuse.ops.decode_head_norm import reference as head_norm_reference

EPS = 1e-6
ROUNDINGS = 2 * torch.finfo(torch.float32).eps  # of the sum, the root and two products
# Elements of a row of q and of k, rows of q and of k: norms of a head, or of all heads at once.
SIZES = {
    "one_element": (1, 1, 3, 1),
    "heads_of_7": (7, 7, 5, 2),
    "heads_of_128": (128, 128, 32, 8),
    "all_heads": (2049, 111, 1, 1),
    "longest": (16384, 4097, 1, 1),
    "without_k": (16, 16, 4, 0),
}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def make(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str, batch: int = 3
) -> tuple[Tensor, dict[str, Any]]:
    """qkv, whose v is NaN: nobody may read it. Rows of q and k of very different scale."""
    q_size, k_size, q_rows, k_rows = sizes
    q_width, k_width = q_size * q_rows, k_size * k_rows
    qkv = torch.randn(batch, q_width + k_width + 5) * torch.tensor([[1e-4], [1.0], [3e3]])[:batch]
    qkv[:, q_width + k_width :] = NAN
    weights = (torch.randn(size).to(device, dtype) for size in (q_size, k_size))
    q_weight, k_weight = weights
    widths = {"q_width": q_width, "k_width": k_width}
    return qkv.to(device), {"q_weight": q_weight, "k_weight": k_weight, **widths}


def truth_of(qkv: Tensor, arguments: dict[str, Any], offset: float) -> Tensor:
    doubles = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    truth = qkv.double()
    head_norm_reference(truth, **doubles, eps=EPS, offset=offset)
    return truth


@each_dtype
@pytest.mark.parametrize("offset", [0.0, 1.0])
@each_size
def test_error_against_float64(
    sizes: tuple[int, int, int, int], offset: float, dtype: torch.dtype, device: str
) -> None:
    qkv, arguments = make(sizes, dtype, device)
    truth, plain, fused = truth_of(qkv, arguments, offset), qkv.clone(), qkv.clone()
    head_norm_reference(plain, **arguments, eps=EPS, offset=offset)
    decode_head_norm(fused, **arguments, eps=EPS, offset=offset, backend=device)
    q, k = arguments["q_width"], arguments["k_width"]
    for part in (slice(0, q), slice(q, q + k)):
        for row in range(len(qkv)):  # each scale by itself
            assert_within(fused[row, part], plain[row, part], truth[row, part], atol=ROUNDINGS)
    assert_equal(fused[:, q + k :].isnan(), torch.ones_like(fused[:, q + k :]).bool(), "v")


@each_dtype
def test_the_same_bits_every_time(dtype: torch.dtype, device: str) -> None:
    qkv, arguments = make(SIZES["heads_of_128"], dtype, device)
    results: list[Tensor] = []

    def run() -> None:
        out = qkv.clone()
        decode_head_norm(out, **arguments, eps=EPS, backend=device)
        results.append(out[:, :-5])

    on_each_number_of_threads(run)
    assert_equal(results[0], results[1])


def test_no_sequences(device: str) -> None:
    qkv, arguments = make(SIZES["heads_of_7"], torch.float32, device, batch=1)
    decode_head_norm(qkv[:0].clone(), **arguments, eps=EPS, backend=device)


ERRORS: dict[str, tuple[str, Any, str]] = {
    "vector_qkv": ("qkv", lambda t: t[0], r"qkv must be \[batch, width\], got \[54\]"),
    "strided_qkv": ("qkv", lambda t: t[:, ::2], r"qkv must be a contiguous \[3, 27\]"),
    "half_qkv": ("qkv", Tensor.half, r"qkv must be float32, got float16"),
    "int_weight": ("q_weight", Tensor.int, r"q_weight must be float32, float16 or bfloat16"),
    "other_weight": ("k_weight", Tensor.half, r"k_weight must have the dtype .*got float16"),
    "wide_q": ("q_width", lambda n: n + 700, r"q_width and k_width must be within the 54 of qkv"),
    "ragged_q": ("q_width", lambda n: n - 1, r"the size of q_weight must divide its 34 .*got 7"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_tensor(case: str, device: str) -> None:
    name, change, message = ERRORS[case]
    qkv, arguments = make(SIZES["heads_of_7"], torch.bfloat16, device)
    arguments["qkv"] = qkv
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=rf"hf_fuse decode_head_norm: {message}"):
        decode_head_norm(**arguments, eps=EPS, backend=device)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    qkv, arguments = make(SIZES["heads_of_7"], dtype, device)
    qkv.nan_to_num_()
    torch.library.opcheck(
        registered(device).decode_head_norm.default, (qkv, *arguments.values(), EPS, 0.0)
    )
