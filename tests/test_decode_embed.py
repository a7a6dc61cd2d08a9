"""decode_embed: the tokens' rows, with positions or without, against the reference's bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import LOW, NAN, assert_equal, each_dtype, name_of, registered
from torch import Tensor

from hf_fuse.ops import decode_embed
from hf_fuse.ops.decode_embed import reference as embed_reference


def make_embed(
    dtype: torch.dtype, device: str, size: int = 111, positions: bool = True
) -> dict[str, Tensor | None]:
    table = torch.randn(301, size).to(device, dtype)
    return {
        "token": torch.tensor([300, 0, 7], device=device),
        "table": table,
        "positions": table.flip(0)[:40].contiguous() if positions else None,
        "length": torch.tensor([39], device=device),
        "start": torch.tensor([0, 39, 5], device=device),
    }


@each_dtype
@pytest.mark.parametrize("positions", [False, True], ids=["tokens_alone", "positions"])
@pytest.mark.parametrize("size", [1, 7, 768, 4096])
def test_embed(size: int, positions: bool, dtype: torch.dtype, device: str) -> None:
    arguments = make_embed(dtype, device, size, positions)
    out, expected = (torch.full((3, size), NAN, device=device) for _ in range(2))
    decode_embed(out, **arguments, backend=device)
    embed_reference(expected, **arguments)
    assert_equal(out, expected)


@each_dtype
def test_a_scaled_embedding(dtype: torch.dtype, device: str) -> None:
    """A GPU multiplies and adds in one rounding."""
    arguments = make_embed(dtype, device)
    out, expected = (torch.full((3, 111), NAN, device=device) for _ in range(2))
    decode_embed(out, **arguments, scale=1.7, backend=device)
    embed_reference(expected, **arguments, scale=1.7)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


EMBED_ERRORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "int_table": ("table", Tensor.int, r"table must be float32, float16 or bfloat16.*got int32"),
    "vector_table": ("table", lambda t: t[0], r"table must be \[vocab, size\], got \[111\]"),
    "strided_table": ("table", lambda t: t[:, ::2], r"table must be a contiguous"),
    "low_residual": ("residual", Tensor.bfloat16, r"residual must be float32, got bfloat16"),
    "narrow_residual": (
        "residual",
        lambda t: t[:, :7].clone(),
        r"residual must be a contiguous \[3, 111\], got \[3, 7\]",
    ),
    "int32_token": ("token", Tensor.int, r"token must be 3 int64 in a row, got int32"),
    "two_lengths": ("length", lambda t: t.repeat(2), r"length must be 1 int64 in a row"),
    "one_start": ("start", lambda t: t[:1], r"start must be 3 int64 in a row"),
    "half_positions": (
        "positions",
        Tensor.half,
        r"positions must have the dtype of table, bfloat16, got float16",
    ),
    "narrow_positions": (
        "positions",
        lambda t: t[:, :7].clone(),
        r"positions must be a contiguous \[40, 111\], got \[40, 7\]",
    ),
}


@pytest.mark.parametrize("case", EMBED_ERRORS)
def test_embed_errors_name_the_tensor(case: str, device: str) -> None:
    name, change, message = EMBED_ERRORS[case]
    arguments = make_embed(torch.bfloat16, device)
    arguments["residual"] = torch.zeros(3, 111, device=device)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=rf"hf_fuse decode_embed: {message}"):
        decode_embed(**arguments, backend=device)


def test_embed_on_cpu_refuses_what_is_not_in_the_tables() -> None:
    residual = torch.zeros(3, 111)
    arguments = make_embed(torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="decode_embed: token 301 is not one of 301"):
        decode_embed(residual, **{**arguments, "token": arguments["token"] + 1})
    with pytest.raises(RuntimeError, match="decode_embed: position 40 is not one of 40"):
        decode_embed(residual, **{**arguments, "length": arguments["length"] + 1})


def test_float64_is_refused(device: str) -> None:
    residual = torch.zeros(3, 9, device=device)
    with pytest.raises(RuntimeError, match=r"hf_fuse decode_embed: .*got float64"):
        decode_embed(residual, **make_embed(torch.float64, device, 9), backend=device)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    arguments = torch.zeros(3, 9, device=device), *make_embed(dtype, device, 9).values()
    torch.library.opcheck(registered(device).decode_embed.default, arguments)
