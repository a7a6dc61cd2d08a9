"""decode_attention: the output and the new key against float64 truth; the new value and every other
slot of the caches to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import (
    LOW,
    NAN,
    assert_equal,
    assert_within,
    each_dtype,
    few_dtypes,
    name_of,
    on_each_number_of_threads,
    registered,
)
from torch import Tensor

from hf_fuse.ops import decode_attention
from hf_fuse.ops.decode_attention import reference as attention_reference


@dataclass(frozen=True)
class Attention:
    """One call, over caches that hold a NaN where nothing may be read."""

    qkv: Tensor
    key_cache: Tensor
    value_cache: Tensor
    length: Tensor
    start: Tensor
    heads: int
    scaling: float
    inv_freq: Tensor | None = None
    rope_scale: float = 1.0
    interleaved: bool = False
    window: int = 0
    softcap: float = 0.0

    def __call__(
        self, function: Callable[..., None] = decode_attention, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output and the caches after it."""
        keys, values = (_same_layout(t) for t in (self.key_cache, self.value_cache))
        shape = (len(self.qkv), self.heads, keys.shape[-1])
        out = keys.new_full(shape, NAN)
        function(
            out, self.qkv, keys, values, self.length, self.start, scaling=self.scaling,
            inv_freq=self.inv_freq, rope_scale=self.rope_scale, interleaved=self.interleaved,
            window=self.window, softcap=self.softcap, **options,
        )  # fmt: skip
        return out, keys, values

    def double(self) -> Attention:
        names = ("qkv", "key_cache", "value_cache")
        inv_freq = None if self.inv_freq is None else self.inv_freq.double()
        tensors = {n: getattr(self, n).double() for n in names}
        return replace(self, inv_freq=inv_freq, **tensors)

    def check(self) -> None:
        """The output and the new key within twice the reference's error, and a rounding; the new
        value to the bit; every other slot as it was.
        """
        fused, unfused = self(backend=self.qkv.device.type), self(attention_reference)
        truth = self.double()(attention_reference)
        new, dtype = self.length.item(), self.key_cache.dtype
        atol = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 0.5)
        assert_within(fused[0], unfused[0], truth[0], atol=atol)
        keys = [t[1][:, :, new] for t in (fused, unfused, truth)]
        assert_within(*keys, atol=atol, name="key")
        assert_equal(fused[2][:, :, new], unfused[2][:, :, new], "value")
        others = torch.arange(self.key_cache.shape[2], device=self.qkv.device) != new
        for before, after in zip((self.key_cache, self.value_cache), fused[1:], strict=True):
            untouched = [t[:, :, others].nan_to_num(123) for t in (after, before)]
            assert_equal(*untouched, "other slots")


def _same_layout(x: Tensor) -> Tensor:
    """A copy with x's strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def make_attention(
    dtype: torch.dtype,
    device: str,
    *,
    head_dim: int = 64,
    group: int = 2,
    kv_heads: int = 2,
    length: int = 129,
    start: Sequence[int] = (0,),
    capacity: int | None = None,
    rotary_dim: int | None = None,
    rope_scale: float = 1.0,
    interleaved: bool = False,
) -> Attention:
    """rotary_dim: all of head_dim if None, no rotation if 0."""
    batch, heads = len(start), kv_heads * group
    capacity = capacity or length + 3
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    slot = torch.arange(capacity)
    held = (slot >= torch.tensor(start)[:, None]) & (slot < length)

    def cache() -> Tensor:
        values = torch.randn(batch, kv_heads, capacity, head_dim)
        return values.where(held[:, None, :, None], NAN).to(device, dtype)

    inv_freq = None
    if rotary_dim:
        exponent = torch.arange(0, rotary_dim, 2, device=device) / rotary_dim
        inv_freq = 10000.0**-exponent
    return Attention(
        torch.randn(batch, (heads + 2 * kv_heads) * head_dim, device=device),
        cache(),
        cache(),
        torch.tensor([length], device=device),
        torch.tensor(start, device=device),
        heads,
        head_dim**-0.5,
        inv_freq,
        rope_scale,
        interleaved,
    )


@each_dtype
@pytest.mark.parametrize("capacity", [132, 600])  # on a GPU, heads one by one or in groups
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 96, 128])
def test_attention_of_every_head(
    head_dim: int, group: int, capacity: int, dtype: torch.dtype, device: str
) -> None:
    make_attention(
        dtype, device, head_dim=head_dim, group=group, start=(0, 5), capacity=capacity
    ).check()


@each_dtype
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [0, 1, 5, 127, 128, 129, 1000, 5000])
def test_attention_of_every_length(
    length: int, batch: int, dtype: torch.dtype, device: str
) -> None:
    start = (0, length // 2, length)[:batch]
    make_attention(dtype, device, length=length, start=start).check()


@few_dtypes
@pytest.mark.parametrize("group", [2, 3, 5, 16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_attention_over_a_long_cache(
    head_dim: int, group: int, dtype: torch.dtype, device: str
) -> None:
    make_attention(
        dtype, device, head_dim=head_dim, group=group, length=4500, start=(0, 4450), capacity=5000
    ).check()


@each_dtype
@pytest.mark.parametrize("rope_scale", [1.0, 1.25])
@pytest.mark.parametrize("rotary_dim", [0, 16, 80])
@pytest.mark.parametrize("interleaved", [False, True], ids=["in_turn", "interleaved"])
def test_attention_rotations(
    interleaved: bool, rotary_dim: int, rope_scale: float, dtype: torch.dtype, device: str
) -> None:
    make_attention(
        dtype, device, head_dim=80, group=1, kv_heads=3, length=70, start=(0, 33),
        rotary_dim=rotary_dim, rope_scale=rope_scale, interleaved=interleaved,
    ).check()  # fmt: skip


@few_dtypes
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("window", [1, 2, 100, 1500, 9000])
@pytest.mark.parametrize("length", [0, 99, 100, 5000])
def test_attention_in_a_window(
    length: int, window: int, group: int, dtype: torch.dtype, device: str
) -> None:
    start = (0, length // 2, length)
    call = make_attention(dtype, device, group=group, length=length, start=start)
    replace(call, window=window).check()


@few_dtypes
def test_attention_reads_nothing_outside_its_window(dtype: torch.dtype, device: str) -> None:
    call = replace(make_attention(dtype, device, length=700, start=(0, 3)), window=50)
    expected = call()[0]
    for cache in (call.key_cache, call.value_cache):
        cache[:, :, : 700 + 1 - 50] = NAN
    assert_equal(call()[0], expected)


@few_dtypes
def test_a_window_takes_positions_before_the_first_slot(dtype: torch.dtype, device: str) -> None:
    """`start` counts positions alone, once the window has left it: it may be before the cache."""
    call = make_attention(dtype, device, length=300, start=(0, 0))
    shifted = torch.tensor([-5000, -1], device=device)
    replace(call, window=64, start=shifted).check()


@each_dtype
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("length", [5, 1300])
def test_attention_of_capped_scores(
    length: int, head_dim: int, group: int, dtype: torch.dtype, device: str
) -> None:
    call = make_attention(
        dtype, device, head_dim=head_dim, group=group, length=length, start=(0, 3)
    )
    for window in (0, 400):
        replace(call, qkv=4 * call.qkv, softcap=2.0, window=window).check()


@each_dtype
def test_attention_fills_the_last_slot(dtype: torch.dtype, device: str) -> None:
    make_attention(dtype, device, length=299, capacity=300).check()


@each_dtype
def test_attention_of_strided_caches(dtype: torch.dtype, device: str) -> None:
    call = make_attention(dtype, device, start=(0, 7))
    both = torch.full((2, 5, 2, 140, 64), NAN, dtype=dtype, device=device).transpose(0, 2)
    caches = both[:, 1:3, :, :132].transpose(0, 2)  # [2 of them, kv_heads, batch, capacity, 64]
    caches = caches.transpose(1, 2)
    caches[0], caches[1] = call.key_cache, call.value_cache
    replace(call, key_cache=caches[0], value_cache=caches[1]).check()


@few_dtypes
def test_attention_of_large_scores(dtype: torch.dtype, device: str) -> None:
    """exp(score) alone would overflow, and one slot takes all the weight."""
    call = make_attention(dtype, device, length=700, start=(0, 300))
    replace(call, qkv=call.qkv * 30, scaling=1.0).check()


@each_dtype
@pytest.mark.parametrize("length", [3, 1000])
def test_attention_has_the_same_bits_on_every_run_and_number_of_threads(
    length: int, dtype: torch.dtype, device: str
) -> None:
    call = make_attention(dtype, device, group=4, length=length, start=(0, 1, length))
    first = call()

    def same() -> None:
        for again, tensor in zip(call(), first, strict=True):
            assert_equal(again.nan_to_num(123), tensor.nan_to_num(123))

    on_each_number_of_threads(same)


@each_dtype
def test_attention_on_cpu_takes_no_notice_of_the_padding(dtype: torch.dtype) -> None:
    call = make_attention(dtype, "cpu", length=600)
    padding = 77
    caches = {
        name: torch.nn.functional.pad(getattr(call, name), (0, 0, padding, 0), value=NAN)
        for name in ("key_cache", "value_cache")
    }
    padded = replace(call, length=call.length + padding, start=call.start + padding, **caches)
    assert_equal(padded()[0], call()[0])


def with_cache(call: Attention, **changes: Callable[[Tensor], Tensor]) -> Attention:
    return replace(call, **{name: f(getattr(call, name)) for name, f in changes.items()})


ATTENTION_ERRORS: dict[str, tuple[Callable[[Attention], Attention], str]] = {
    "bool_key_cache": (
        lambda c: with_cache(c, key_cache=Tensor.bool, value_cache=Tensor.bool),
        r"key_cache must be float32, float16 or bfloat16.*got bool",
    ),
    "half_value_cache": (
        lambda c: with_cache(c, value_cache=Tensor.half),
        r"value_cache must have the dtype of key_cache, bfloat16, got float16",
    ),
    "short_value_cache": (
        lambda c: with_cache(c, value_cache=lambda t: t[:, :, :5]),
        r"value_cache must have the shape of key_cache",
    ),
    "wrong_batch": (
        lambda c: with_cache(c, key_cache=lambda t: t[:1], value_cache=lambda t: t[:1]),
        r"key_cache must be \[2, kv_heads, capacity, 16\], got \[1, 2, 12, 16\]",
    ),
    "heads_no_multiple": (
        lambda c: replace(c, heads=5),
        r"the heads of out, 5, must be a multiple of the cache's, 2",
    ),
    "strided_slots": (
        lambda c: with_cache(c, key_cache=lambda t: t.repeat(1, 1, 2, 1)[:, :, ::2]),
        r"the last two dimensions of the caches must be contiguous",
    ),
    "narrow_qkv": (
        lambda c: with_cache(c, qkv=lambda t: t[:, 16:].clone()),
        r"qkv must be a contiguous \[2, 128\], got \[2, 112\]",
    ),
    "low_qkv": (
        lambda c: with_cache(c, qkv=Tensor.bfloat16),
        r"qkv must be float32, got bfloat16",
    ),
    "int32_length": (
        lambda c: with_cache(c, length=Tensor.int),
        r"length must be 1 int64 in a row, got int32",
    ),
    "one_start": (
        lambda c: with_cache(c, start=lambda t: t[:1]),
        r"start must be 2 int64 in a row, got int64 \[1\]",
    ),
    "low_inv_freq": (
        lambda c: with_cache(c, inv_freq=Tensor.half),
        r"inv_freq must be float32, got float16",
    ),
    "long_inv_freq": (
        lambda c: with_cache(c, inv_freq=lambda t: t.repeat(2)),
        r"inv_freq must be \[up to 8\], got \[16\]",
    ),
    "negative_window": (
        lambda c: replace(c, window=-1),
        r"window and softcap must not be negative, got -1 and 0",
    ),
    "interleaved_groups": (
        lambda c: replace(c, interleaved=True),
        r"interleaved q, k and v need as many key heads as query heads",
    ),
}


def attention_for_errors(device: str) -> Attention:
    return make_attention(torch.bfloat16, device, head_dim=16, length=9, start=(0, 2))


@pytest.mark.parametrize("case", ATTENTION_ERRORS)
def test_attention_errors_name_the_tensor(case: str, device: str) -> None:
    change, message = ATTENTION_ERRORS[case]
    call = change(attention_for_errors(device))
    with pytest.raises(RuntimeError, match=rf"hf_fuse decode_attention: {message}"):
        call(backend=device)


def test_attention_on_cpu_refuses_a_full_cache_and_a_start_past_the_end() -> None:
    call = attention_for_errors("cpu")
    with pytest.raises(RuntimeError, match="length must be below the capacity of 12, got 12"):
        with_cache(call, length=lambda t: t + 3)()
    with pytest.raises(RuntimeError, match="start must be 0 to the length of 9, got 10"):
        with_cache(call, start=lambda t: t + 8)()


def test_float64_is_refused(device: str) -> None:
    with pytest.raises(RuntimeError, match=r"hf_fuse decode_attention: .*got float64"):
        make_attention(torch.float64, device, length=3)(backend=device)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    call = make_attention(dtype, device, length=5)
    caches = [t.nan_to_num() for t in (call.key_cache, call.value_cache)]
    out = caches[0].new_zeros(1, call.heads, 64)
    torch.library.opcheck(
        registered(device).decode_attention.default,
        (out, call.qkv, *caches, call.length, call.start, call.inv_freq, 1.0, False, call.scaling),
    )
