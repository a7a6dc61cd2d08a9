"""decode_sinks: the first tokens before the window, against the reference and float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import LOW, NAN, assert_within, each_dtype, name_of, registered
from torch import Tensor

from hf_fuse.ops import decode_sinks
from hf_fuse.ops.decode_sinks import reference as sinks_reference
from hf_fuse.ops.decode_sinks import rotate

WINDOW, CAPACITY = 12, 40


def make_sinks(
    dtype: torch.dtype,
    device: str,
    *,
    head_dim: int = 16,
    half: int = 8,
    sinks: int = 4,
    length: int = 33,
    start: tuple[int, ...] = (0, -20000),
) -> dict[str, Tensor]:
    """Three layers, the last of them without rotation."""
    batch, heads = len(start), 3
    cache, few = (3, batch, heads, CAPACITY, head_dim), (3, batch, heads, sinks, head_dim)
    inv_freq = 10000 ** -(torch.arange(half) / max(half, 1)).repeat(3, 1)
    inv_freq[1] /= 3
    inv_freq[2] = 0
    return {
        "keys": torch.full(cache, NAN, device=device, dtype=dtype),
        "values": torch.full(cache, NAN, device=device, dtype=dtype),
        "sink_keys": torch.randn(few).to(device, dtype),
        "sink_values": torch.randn(few).to(device, dtype),
        "length": torch.tensor([length], device=device),
        "start": torch.tensor(start, device=device),
        "inv_freq": inv_freq.to(device),
    }


@each_dtype
@pytest.mark.parametrize(
    ("head_dim", "half"), [(16, 8), (80, 10), (111, 0), (7, 3), (256, 128)], ids=str
)
@pytest.mark.parametrize("sinks", [1, 4, 9])
def test_sinks_stand_before_the_window(
    sinks: int, head_dim: int, half: int, dtype: torch.dtype, device: str
) -> None:
    given = make_sinks(dtype, device, head_dim=head_dim, half=half, sinks=sinks)
    plain, wide = ({k: v.clone() for k, v in given.items()} for _ in range(2))
    decode_sinks(**given, window=WINDOW, backend=device)
    sinks_reference(**plain, window=WINDOW)
    slots = slice(34 - WINDOW - sinks, 34 - WINDOW)
    shift = 34 - WINDOW - sinks - given["start"]
    # The angles are the kernels' own: of far positions, fp32's are coarse.
    angles = (shift[None, :, None].float() * wide["inv_freq"][:, None]).double()
    exact = rotate(wide["sink_keys"].double(), angles[:, :, None, None])
    assert_within(given["keys"][..., slots, :], plain["keys"][..., slots, :], exact, name="keys")
    assert torch.equal(given["values"][..., slots, :], given["sink_values"])
    assert torch.equal(given["keys"][2, ..., slots, :], given["sink_keys"][2])
    for name in ("keys", "values"):
        untouched = given[name].clone()
        untouched[..., slots, :] = NAN
        assert untouched.isnan().all()


def test_nothing_is_written_while_the_sinks_are_in_their_slots(device: str) -> None:
    """The second sequence began 14 tokens before; the first ones, of padding, do not count."""
    given = make_sinks(torch.float32, device, start=(18, 4, 30))
    decode_sinks(**given, window=WINDOW, backend=device)
    assert given["keys"][:, 0].isnan().all()
    assert not given["keys"][:, 1, :, 18:22].isnan().any()
    assert given["values"][:, 2].isnan().all()


def test_no_sinks(device: str) -> None:
    given = make_sinks(torch.float32, device, sinks=0)
    decode_sinks(**given, window=WINDOW, backend=device)
    assert given["keys"].isnan().all()


def test_on_cpu_there_must_be_room_before_the_window() -> None:
    given = make_sinks(torch.float32, "cpu", length=12)
    with pytest.raises(RuntimeError, match="no room before a window of 12 at length 12"):
        decode_sinks(**given, window=WINDOW)


ERRORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "int_keys": ("keys", Tensor.int, r"keys must be float32, float16 or bfloat16.*got int32"),
    "one_layer": ("keys", lambda t: t[0], r"keys must be a contiguous \[layers, batch"),
    "short_values": (
        "values",
        lambda t: t[:, :, :, :7].clone(),
        r"values must have the shape of keys",
    ),
    "half_sinks": ("sink_keys", Tensor.half, r"sink_keys must have the dtype of keys"),
    "narrow_sinks": (
        "sink_keys",
        lambda t: t[..., :7].clone(),
        r"sink_keys must be \[3, 2, 3, sinks, 16\]",
    ),
    "strided_sinks": ("sink_values", lambda t: t.mT.contiguous().mT, "must be contiguous"),
    "low_frequencies": ("inv_freq", Tensor.bfloat16, r"inv_freq must be float32"),
    "one_frequency": ("inv_freq", lambda t: t[0], r"inv_freq must be \[3, up to 8\]"),
    "int32_length": ("length", Tensor.int, r"length must be 1 int64 in a row"),
    "one_start": ("start", lambda t: t[:1], r"start must be 2 int64 in a row"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_tensor(case: str, device: str) -> None:
    name, change, message = ERRORS[case]
    given = make_sinks(torch.bfloat16, device)
    given[name] = change(given[name])
    with pytest.raises(RuntimeError, match=rf"hf_fuse decode_sinks: .*{message}"):
        decode_sinks(**given, window=WINDOW, backend=device)


def test_a_window_of_nothing_is_refused(device: str) -> None:
    with pytest.raises(RuntimeError, match="window must be at least 1, got 0"):
        decode_sinks(**make_sinks(torch.float32, device), window=0, backend=device)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    given = make_sinks(dtype, device)
    given["keys"].zero_()
    given["values"].zero_()
    torch.library.opcheck(registered(device).decode_sinks.default, (*given.values(), WINDOW))
