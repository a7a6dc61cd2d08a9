"""A step's projections by matrix products, as for many sequences on a GPU."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_within

from hf_fuse.decode.projection import (
    LARGE,
    MAX_SEQUENCES,
    MAX_SEQUENCES_OF_LARGE,
    MAX_SEQUENCES_OF_OTHERS,
    by_matmul,
    matmul,
)
from hf_fuse.decode.spec import Norm, Projection
from hf_fuse.ops.decode_linear import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
@pytest.mark.parametrize("epilogue", ["store", "act", "gated", "add"])
def test_matmul_is_decode_linear(epilogue: str, kind: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    size, rows, batch = 136, (90, 90), 17

    def tensor(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape).to(device, of)

    weights = tuple(tensor(r, size) / size**0.5 for r in rows)
    biases = (tensor(rows[0]), None)
    vectors = None if kind == "none" else (tensor(size), tensor(size) if kind == "layer" else None)
    x = tensor(batch, size, of=torch.float32 if vectors else dtype)
    wide = epilogue in ("store", "add")
    out_dtype = torch.float32 if wide else dtype
    columns = rows[0] if epilogue == "gated" else sum(rows)
    start = tensor(batch, columns, of=out_dtype)

    fused = start.clone()
    norm = Norm(*vectors, 1e-5, kind) if vectors else None
    projection = Projection(weights, biases)
    matmul(fused, x, projection, norm=norm, epilogue=epilogue, act="silu")

    def run(of: torch.dtype) -> torch.Tensor:
        """In the precision `of`, rounded where transformers rounds."""

        def cast(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(of)

        out = start.to(of)
        norm = (*map(cast, vectors), 1e-5, kind) if vectors else None
        reference(
            out, x.to(of), [*map(cast, weights)], [*map(cast, biases)], norm=norm,
            epilogue=epilogue, act="silu",
        )  # fmt: skip
        return out

    # What a layer in `dtype` may lose: the normed row and each product's row are rounded.
    truth = run(torch.float64)
    assert fused.dtype == out_dtype
    atol = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)  # fp32: the order of sums
    assert_within(fused, truth.to(dtype).to(out_dtype), truth, atol=atol)


@pytest.mark.parametrize(
    ("size", "rows", "dtype", "most"),
    [
        (64, 3, torch.bfloat16, MAX_SEQUENCES),
        (64, 3, torch.float16, MAX_SEQUENCES),
        (64, 3, torch.float32, MAX_SEQUENCES_OF_OTHERS),
        (40, 3, torch.bfloat16, MAX_SEQUENCES_OF_OTHERS),  # not whole steps of the tensor cores
        (4096, LARGE // 4096, torch.bfloat16, MAX_SEQUENCES_OF_LARGE),
        (4096, LARGE // 4096 + 1, torch.bfloat16, MAX_SEQUENCES),
        (4096, LARGE // 4096 - 1, torch.bfloat16, MAX_SEQUENCES),
    ],
)
def test_few_sequences_stay_with_the_kernels(
    size: int, rows: int, dtype: torch.dtype, most: int, device: str
) -> None:
    few, many = (torch.empty(n, size, device=device) for n in (most, most + 1))
    projection = Projection((torch.empty(rows, size, dtype=dtype, device=device),), (None,))
    assert not by_matmul(few, projection, "auto")
    assert by_matmul(many, projection, "auto") == (device == "cuda")
    assert not by_matmul(many, projection, "reference")


@pytest.mark.cuda
def test_a_large_projection_with_a_bias_stays_with_the_kernels() -> None:
    x = torch.empty(MAX_SEQUENCES, 4096, device="cuda")
    weight = torch.empty(LARGE // 4096, 4096, dtype=torch.bfloat16, device="cuda")
    assert by_matmul(x, Projection((weight,), (None,)), "auto")
    assert not by_matmul(x, Projection((weight,), (weight[:, 0],)), "auto")
