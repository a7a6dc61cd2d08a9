"""The ops of a decoding step: against float64 truth, and decode_embed and decode_select against the
reference's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, LOW, assert_equal, assert_within, each_dtype, name_of
from torch import Tensor

from hf_fuse.ops import (
    decode_attention,
    decode_embed,
    decode_linear,
    decode_linear_two,
    decode_select,
)
from hf_fuse.ops.activations import ACTIVATIONS
from hf_fuse.ops.decode_attention import reference as attention_reference
from hf_fuse.ops.decode_embed import reference as embed_reference
from hf_fuse.ops.decode_linear import normed
from hf_fuse.ops.decode_linear import reference as linear_reference
from hf_fuse.ops.decode_select import reference as select_reference
from hf_fuse.ops.decode_select import workspace

NAN = float("nan")
few_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)


def on_each_number_of_threads(run: Callable[[], None]) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            run()
    finally:
        torch.set_num_threads(threads)


# decode_linear


@dataclass(frozen=True)
class Linear:
    """One call. `start` is what `out` holds before; without one it is poisoned."""

    x: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None] = ()
    norm: tuple[Tensor | None, Tensor | None, float, str] | None = None
    epilogue: str = "store"
    act: str = "gelu"
    start: Tensor | None = None

    def out(self) -> Tensor:
        if self.start is not None:
            return self.start.clone()
        rows = [w.shape[0] for w in self.weights]
        dtype = self.weights[0].dtype
        if self.epilogue in ("store", "add"):
            dtype = torch.promote_types(dtype, torch.float32)
        columns = rows[0] if self.epilogue == "gated" else sum(rows)
        return self.x.new_full((len(self.x), columns), NAN, dtype=dtype)

    def __call__(self, function: Callable[..., None] = decode_linear, **options: Any) -> Tensor:
        out = self.out()
        function(
            out, self.x, self.weights, self.biases, norm=self.norm, epilogue=self.epilogue,
            act=self.act, **options,
        )  # fmt: skip
        return out

    def map(self, f: Callable[[Tensor], Tensor]) -> Linear:
        def g(t: Tensor | None) -> Tensor | None:
            return None if t is None else f(t)

        norm = self.norm and (g(self.norm[0]), g(self.norm[1]), *self.norm[2:])
        weights, biases = map(f, self.weights), map(g, self.biases)
        return replace(
            self, x=f(self.x), weights=[*weights], biases=[*biases], norm=norm, start=g(self.start)
        )

    def normed_first(self) -> Linear:
        """The same with the normed row as x, rounded to the weights' dtype."""
        return replace(self, x=normed(self.x, self.norm).to(self.weights[0].dtype), norm=None)

    @property
    def on_tensor_cores(self) -> bool:
        """Whether the kernel for many sequences runs, which reads a normed row that is rounded."""
        few = self.x.device.type == "cpu" or len(self.x) < 3
        return not few and self.weights[0].dtype != torch.float32 and self.x.shape[1] % 32 == 0

    def check(self) -> None:
        """An fp32 sum of few terms may lose two roundings where torch was lucky."""
        fused = self(backend=self.x.device.type)
        like = self.normed_first() if self.norm and self.on_tensor_cores else self
        unfused = like(linear_reference)
        truth = self.map(Tensor.double)(linear_reference)
        atol = torch.finfo(fused.dtype).eps * (2 if fused.dtype == torch.float32 else 0.5)
        assert_within(fused, unfused, truth, atol=atol)


NORMS = ("none", "rms", "layer", "layer_bias")


def make_linear(
    size: int,
    rows: Sequence[int],
    dtype: torch.dtype,
    device: str,
    *,
    batch: int = 1,
    norm: str = "none",
    biases: Sequence[bool] = (),
    epilogue: str = "store",
    act: str = "gelu",
) -> Linear:
    def tensor(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(shape) * scale + shift).to(device, dtype)

    norms = None
    if norm != "none":
        bias = tensor(size, scale=0.3) if norm == "layer_bias" else None
        norms = (tensor(size, scale=0.3, shift=1), bias, 1e-5, norm.removesuffix("_bias"))
    x = tensor(batch, size)
    weights = [tensor(r, size, scale=size**-0.5) for r in rows]
    given = [tensor(r) if b else None for r, b in zip(rows, biases, strict=False)]
    start = torch.randn(batch, sum(rows), device=device) if epilogue == "add" else None
    return Linear(x.float() if norms else x, weights, given, norms, epilogue, act, start)


LINEAR_SHAPES = [
    (1, 1), (1, 5000), (7, 3), (64, 5000), (111, 301), (1600, 257), (2560, 64), (4096, 35),
    (8192, 9), (14336, 5),
]  # fmt: skip


@each_dtype
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=name_of)
def test_linear_of_every_size(
    shape: tuple[int, int], norm: str, dtype: torch.dtype, device: str
) -> None:
    size, rows = shape
    make_linear(size, [rows], dtype, device, norm=norm).check()


EPILOGUES = [
    ("store", "gelu"),
    ("add", "gelu"),
    *((epilogue, act) for epilogue in ("act", "gated") for act in ACTIVATIONS),
]


@each_dtype
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("epilogue", "act"), EPILOGUES)
def test_linear_epilogues_and_batches(
    epilogue: str, act: str, batch: int, dtype: torch.dtype, device: str
) -> None:
    rows = [77, 77] if epilogue == "gated" else [77]
    for norm, biases in (("none", ()), ("rms", (True, True))):
        make_linear(
            320, rows, dtype, device, batch=batch, norm=norm, biases=biases, epilogue=epilogue,
            act=act,
        ).check()  # fmt: skip


@each_dtype
@pytest.mark.parametrize("biases", ["none", "all", "second"])
@pytest.mark.parametrize("rows", [(33,), (33, 1), (301, 33, 70)], ids=name_of)
def test_linear_of_several_weights(
    rows: tuple[int, ...], biases: str, dtype: torch.dtype, device: str
) -> None:
    given = {"none": (), "all": (True,) * 3, "second": (False, True, False)}[biases]
    for epilogue in ("store", "add", "act"):
        make_linear(
            96, rows, dtype, device, batch=2, norm="layer", biases=given, epilogue=epilogue
        ).check()


@each_dtype
@pytest.mark.parametrize("layout", ["gaps", "unaligned"])
def test_linear_of_strided_and_unaligned_weights(
    layout: str, dtype: torch.dtype, device: str
) -> None:
    for size in (111, 256):
        plain = make_linear(size, [70, 5], dtype, device, batch=2, biases=(True, True))
        strided = replace(plain, weights=[LAYOUTS[layout](w) for w in plain.weights])
        strided.check()
        if layout == "unaligned":
            replace(strided, x=LAYOUTS[layout](plain.x)).check()


@each_dtype
def test_linear_keeps_the_variance_of_rows_far_from_zero(dtype: torch.dtype, device: str) -> None:
    call = make_linear(2560, [65], dtype, device, batch=2, norm="layer_bias")
    replace(call, x=call.x + 1e4).check()


@few_dtypes
def test_linear_of_a_nan_and_an_infinity(dtype: torch.dtype, device: str) -> None:
    call = make_linear(96, [33], dtype, device, batch=2)
    clean = call()
    call.x[1, 3] = NAN
    call.weights[0][4, 95] = float("inf")
    out = call()
    assert out[1].isnan().all()
    assert out[0].isinf().nonzero().tolist() == [[4]]
    rest = torch.arange(33, device=device) != 4
    assert_equal(out[0, rest], clean[0, rest])


@each_dtype
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("epilogue", ["store", "add", "gated"])
def test_linear_has_the_same_bits_on_every_run_and_number_of_threads(
    epilogue: str, batch: int, dtype: torch.dtype, device: str
) -> None:
    call = make_linear(768, [1501, 1501], dtype, device, batch=batch, norm="rms", epilogue=epilogue)
    first = call()
    on_each_number_of_threads(lambda: assert_equal(call(), first))


@each_dtype
def test_linear_on_cpu_takes_no_notice_of_the_other_sequences(dtype: torch.dtype) -> None:
    call = make_linear(768, [301], dtype, "cpu", batch=7, norm="layer")
    together = call()
    for b in range(7):
        assert_equal(replace(call, x=call.x[b : b + 1])(), together[b : b + 1])


MANY = [3, 5, 8, 16, 17, 33, 64, 65]


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("batch", MANY)
@pytest.mark.parametrize(
    ("size", "rows"),
    # few rows, which a cluster of blocks shares; ragged; more than the blocks take at once
    [(2048, [40, 9, 3]), (1600, [333]), (8192, [130]), (64, [36001]), (768, [17])],
    ids=name_of,
)
def test_linear_of_many_sequences(
    size: int, rows: list[int], batch: int, dtype: torch.dtype, device: str
) -> None:
    biases = [index % 2 == 0 for index in range(len(rows))]
    for norm, epilogue in (("none", "add"), ("rms", "store"), ("layer_bias", "act")):
        call = make_linear(
            size, rows, dtype, device, batch=batch, norm=norm, biases=biases, epilogue=epilogue
        )
        if norm == "none" or device == "cuda":
            call.check()
    if device == "cuda":
        assert torch.equal(call(backend=device), call(backend=device))


@pytest.mark.parametrize("batch", [5, 33])
def test_gated_of_many_sequences_with_strided_rows(batch: int, device: str) -> None:
    call = make_linear(
        320, [261, 261], torch.bfloat16, device, batch=batch, norm="rms", biases=(True, True),
        epilogue="gated", act="silu",
    )  # fmt: skip
    wide = [torch.cat((w, w), 1) for w in call.weights]
    replace(call, weights=[wide[0][:, :320], wide[1][:, 320:]]).check()


def test_a_sequence_does_not_depend_on_the_others(device: str) -> None:
    call = make_linear(2048, [130], torch.bfloat16, device, batch=16, norm="rms")
    out = call(backend=device)
    for batch in (3, 5, 8):
        assert torch.equal(replace(call, x=call.x[:batch].clone())(backend=device), out[:batch])


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("batch", "size", "dtype", "kernel"),
    [
        (2, 64, torch.bfloat16, "decode_linear_kernel"),
        (3, 64, torch.bfloat16, "decode_matmul_kernel"),
        (64, 64, torch.float16, "decode_matmul_kernel"),
        (3, 64, torch.float32, "decode_linear_kernel"),
        (3, 40, torch.bfloat16, "decode_linear_kernel"),
        (3, 33, torch.bfloat16, "decode_linear_elements_kernel"),
    ],
    ids=name_of,
)
def test_which_kernel_runs(batch: int, size: int, dtype: torch.dtype, kernel: str) -> None:
    call = make_linear(size, [5], dtype, "cuda", batch=batch, norm="rms")
    call(backend="cuda")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call(backend="cuda")
        torch.cuda.synchronize()
    assert any(kernel in event.key for event in profile.key_averages())


def replace_weight(call: Linear, weight: Tensor) -> Linear:
    return replace(call, weights=[call.weights[0], weight])


def replace_norm(call: Linear, index: int, value: Any) -> Linear:
    norm = list(call.norm)
    norm[index] = value
    return replace(call, norm=tuple(norm))


LINEAR_ERRORS: dict[str, tuple[Callable[[Linear], Linear], str]] = {
    "vector_x": (lambda c: replace(c, x=c.x[0], start=c.out()), r"x must be \[batch, size\]"),
    "strided_x": (lambda c: replace(c, x=c.x.mT.contiguous().mT), r"x must be a contiguous"),
    "half_x_under_norm": (
        lambda c: replace(c, x=c.x.half()),
        r"x under a norm must be float32, got float16",
    ),
    "wide_x": (
        lambda c: replace(c, norm=None),
        r"x must have the dtype of weight1, bfloat16, got float32",
    ),
    "int_weight1": (
        lambda c: replace(c, weights=[c.weights[0].int()], start=c.out()),
        r"weight1 must be float32, float16 or bfloat16.*got int32",
    ),
    "half_weight2": (
        lambda c: replace_weight(c, c.weights[1].half()),
        r"weight2 must have the dtype of weight1, bfloat16, got float16",
    ),
    "narrow_weight2": (
        lambda c: replace_weight(c, c.weights[1][:, :7]),
        r"weight2 must be \[rows, 8\].*got \[3, 7\]",
    ),
    "columns_weight2": (
        lambda c: replace_weight(c, c.weights[1].mT.contiguous().mT),
        r"weight2 must be \[rows, 8\] with contiguous rows",
    ),
    "half_bias1": (
        lambda c: replace(c, biases=[c.biases[0].half(), None]),
        r"bias1 must have the dtype of weight1, bfloat16, got float16",
    ),
    "short_bias2": (
        lambda c: replace(c, biases=[None, c.biases[1][:2]]),
        r"bias2 must be \[3\], got \[2\]",
    ),
    "float_norm_weight": (
        lambda c: replace_norm(c, 0, c.norm[0].float()),
        r"norm_weight must have the dtype of weight1, bfloat16, got float32",
    ),
    "short_norm_weight": (
        lambda c: replace_norm(c, 0, c.norm[0][:7]),
        r"norm_weight must be \[8\], got \[7\]",
    ),
    "short_norm_bias": (
        lambda c: replace_norm(c, 1, c.norm[1][:7]),
        r"norm_bias must have the shape of norm_weight, \[8\], got \[7\]",
    ),
    "rms_norm_bias": (lambda c: replace_norm(c, 3, "rms"), r"norm_bias needs a LayerNorm"),
    "no_norm_weight": (
        lambda c: replace(replace_norm(c, 0, None), x=c.x.bfloat16()),
        r"norm_bias needs norm_weight",
    ),
    "narrow_out": (
        lambda c: replace(c, start=c.out()[:, :7].clone()),
        r"out must be a contiguous \[2, 8\], got \[2, 7\]",
    ),
    "low_out": (
        lambda c: replace(c, start=c.out().bfloat16()),
        r"out must be float32, got bfloat16",
    ),
    "float_out_of_act": (
        lambda c: replace(c, epilogue="act", start=c.out().float()),
        r"out must have the dtype of weight1, bfloat16, got float32",
    ),
    "gated_of_other_rows": (
        lambda c: replace(c, epilogue="gated", start=c.out()),
        r"a gated epilogue needs two weights of as many rows",
    ),
    "gated_of_one": (
        lambda c: replace(c, weights=c.weights[:1], epilogue="gated", start=c.out()),
        r"a gated epilogue needs two weights of as many rows",
    ),
}


def linear_for_errors(device: str) -> Linear:
    return make_linear(
        8, [5, 3], torch.bfloat16, device, batch=2, norm="layer_bias", biases=(True, True)
    )


@pytest.mark.parametrize("case", LINEAR_ERRORS)
def test_linear_errors_name_the_tensor(case: str, device: str) -> None:
    change, message = LINEAR_ERRORS[case]
    call = change(linear_for_errors(device))
    with pytest.raises(RuntimeError, match=rf"hf_fuse decode_linear: {message}"):
        call(backend=device)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_linear_of_values_that_are_not_known(backend: str, device: str) -> None:
    call = linear_for_errors(device)
    with pytest.raises(ValueError, match=r"decode_linear: epilogue must be .*got 'sub'"):
        replace(call, epilogue="sub")(backend=backend)
    with pytest.raises(ValueError, match="decode_linear: 1 to 3 weights, got 4"):
        replace(call, weights=[*call.weights] * 2)(backend=backend)


def test_linear_of_an_activation_that_is_not_known(device: str) -> None:
    call = replace(linear_for_errors(device), epilogue="act", act="mish")
    with pytest.raises(ValueError, match=r"decode_linear: act must be .*got 'mish'"):
        call(backend=device)


@each_dtype
@pytest.mark.parametrize("norm", NORMS[1:])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("size", "rows"),
    [(9, (2, 3)), (768, (2304, 3072)), (2560, (900, 1200)), (4096, (290, 7))],
    ids=name_of,
)
def test_two_projections_of_one_row(
    size: int, rows: tuple[int, int], batch: int, norm: str, dtype: torch.dtype, device: str
) -> None:
    first, second = (
        make_linear(size, [r], dtype, device, batch=batch, norm=norm, biases=[b], **options)
        for r, b, options in zip(
            rows, (True, False), ({}, {"epilogue": "act", "act": "gelu_tanh"}), strict=True
        )
    )
    calls = first, replace(second, x=first.x)
    for backend in (device, "reference"):
        outs = tuple(call.out() for call in calls)
        decode_linear_two(
            outs, first.x, tuple(c.weights[0] for c in calls), tuple(c.biases[0] for c in calls),
            tuple(c.norm for c in calls), act=second.act, backend=backend,
        )  # fmt: skip
        for out, call in zip(outs, calls, strict=True):
            assert torch.equal(out, call(backend=backend))


def test_two_projections_whose_norms_differ_in_kind(device: str) -> None:
    call = make_linear(8, [5], torch.float32, device, norm="rms")
    layer = make_linear(8, [5], torch.float32, device, norm="layer").norm
    with pytest.raises(ValueError, match=r"decode_linear_two: the norms must share eps and kind"):
        decode_linear_two(
            (call.out(), call.out()), call.x, (call.weights[0],) * 2, (None, None),
            (call.norm, layer), act="silu",
        )  # fmt: skip


# decode_attention


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
            **options,
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
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 96, 128])
def test_attention_of_every_head(
    head_dim: int, group: int, dtype: torch.dtype, device: str
) -> None:
    make_attention(dtype, device, head_dim=head_dim, group=group, start=(0, 5)).check()


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


# decode_embed


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


# decode_select


@dataclass(frozen=True)
class Select:
    """One call and what it starts from."""

    logits: Tensor
    finished: Sequence[int] = ()
    eos: Sequence[int] = ()
    pad: int = 0
    min_step: int = 0
    step: int = 0
    max_steps: int = 4
    host_history: bool = True

    def __call__(self, function: Callable[..., None] = decode_select, **options: Any) -> dict:
        """Everything that is written, on the CPU."""
        batch, device = len(self.logits), self.logits.device

        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        history = torch.full((self.max_steps, batch), -1)
        if not self.host_history:
            history = history.to(device)
        elif device.type == "cuda":
            history = history.pin_memory()
        written = {
            "token": ints(*[-1] * batch),
            "finished": ints(*(self.finished or [0] * batch)),
            "history": history,
            "length": ints(17),
            "step": ints(self.step),
        }
        scratch = () if function is select_reference else (workspace(batch, device),)
        function(
            *written.values(),
            *scratch,
            self.logits,
            ints(*self.eos),
            self.pad,
            self.min_step,
            **options,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {name: tensor.cpu() for name, tensor in written.items()}

    def check(self) -> dict:
        """Equal to the reference, on the CPU, where torch.argmax promises the first index."""
        written = self(backend=self.logits.device.type)
        expected = replace(self, logits=self.logits.cpu())(select_reference)
        for name, tensor in written.items():
            assert_equal(tensor, expected[name], name)
        return written


@pytest.mark.parametrize("host_history", [False, True], ids=["device_history", "host_history"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("vocab", [1, 7, 50257, 128256])
def test_select_of_every_vocabulary(
    vocab: int, batch: int, host_history: bool, device: str
) -> None:
    logits = torch.randn(batch, vocab, device=device)
    Select(logits, step=2, host_history=host_history).check()
    Select(logits - 100).check()


@pytest.mark.parametrize("vocab", [7, 1000, 50257])
def test_select_takes_the_first_of_the_largest(vocab: int, device: str) -> None:
    for index in (0, 1, vocab // 2, vocab - 2):
        logits = torch.randn(2, vocab, device=device)
        logits[:, index] = logits[:, -1] = 9.0
        assert Select(logits).check()["token"].tolist() == [index] * 2


@pytest.mark.parametrize("value", [0.0, -float("inf"), float("inf"), NAN])
def test_select_of_equal_logits_is_0(value: float, device: str) -> None:
    written = Select(torch.full((2, 50257), value, device=device)).check()
    assert written["token"].tolist() == [0, 0]


def test_select_takes_the_first_nan(device: str) -> None:
    logits = torch.randn(3, 50257, device=device)
    logits[:, 5] = float("inf")
    logits[0, [300, 40000]] = NAN
    logits[1, -1] = NAN
    assert Select(logits).check()["token"].tolist() == [300, 50256, 5]


def test_select_finishes_at_an_eos_and_pads_from_then_on(device: str) -> None:
    logits = torch.randn(5, 111, device=device)
    logits[torch.arange(5), torch.tensor([3, 4, 5, 6, 3])] = 9.0
    written = Select(logits, finished=(0, 0, 0, 1, 1), eos=(3, 5), pad=77, step=1).check()
    assert written["token"].tolist() == [3, 4, 5, 77, 77]
    assert written["finished"].tolist() == [1, 0, 1, 1, 1]
    assert written["history"].tolist() == [[-1] * 5, [3, 4, 5, 77, 77], [-1] * 5, [-1] * 5]
    assert (written["length"].item(), written["step"].item()) == (18, 2)


def test_select_before_the_least_step_takes_no_eos(device: str) -> None:
    logits = torch.randn(2, 50257, device=device)
    logits[0, [3, 50256]] = torch.tensor([9.0, 8.0], device=device)
    logits[1, [50256, 7]] = torch.tensor([9.0, 8.0], device=device)
    early = Select(logits, eos=(3, 50256), step=1, min_step=2).check()
    assert early["token"].tolist()[1] == 7
    assert early["token"].tolist()[0] not in (3, 50256)
    assert Select(logits, eos=(3, 50256), step=2, min_step=2).check()["token"].tolist() == [
        3,
        50256,
    ]


@pytest.mark.parametrize("step", [3, 4, 100])
def test_select_past_the_last_step_writes_no_history(step: int, device: str) -> None:
    written = Select(torch.randn(2, 7, device=device), step=step).check()
    assert (written["history"] >= 0).any().item() == (step < 4)


def test_select_again_with_the_same_workspace(device: str) -> None:
    batch, logits = 3, torch.randn(10, 3, 50257, device=device)
    token, finished = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
    history = torch.full((10, batch), -1, device=device)
    length, step = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
    scratch, eos = workspace(batch, token.device), token.new_tensor([])
    for each in logits:
        decode_select(token, finished, history, length, step, scratch, each, eos, 0)
    assert_equal(history, logits.argmax(-1))
    assert (length.item(), step.item()) == (10, 10)


SELECT_ERRORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "vector_logits": ("logits", lambda t: t[0], r"logits must be \[batch, vocab\], got \[8\]"),
    "empty_logits": ("logits", lambda t: t[:, :0], r"logits must be \[batch, vocab\]"),
    "strided_logits": ("logits", lambda t: t[:, ::2], r"logits must be a contiguous"),
    "low_logits": ("logits", Tensor.bfloat16, r"logits must be float32, got bfloat16"),
    "int32_token": ("token", Tensor.int, r"token must be 2 int64 in a row, got int32"),
    "one_finished": ("finished", lambda t: t[:1], r"finished must be 2 int64 in a row"),
    "bool_finished": ("finished", Tensor.bool, r"finished must be 2 int64 in a row, got bool"),
    "int32_eos": ("eos", Tensor.int, r"eos must be 1 int64 in a row, got int32"),
    "two_lengths": ("length", lambda t: t.repeat(2), r"length must be 1 int64 in a row"),
    "two_steps": ("step", lambda t: t.repeat(2), r"step must be 1 int64 in a row"),
    "narrow_history": ("history", lambda t: t[:, :1], r"history must be \[steps, 2\], got"),
    "int32_history": ("history", Tensor.int, r"history must be 8 int64 in a row, got int32"),
    "int32_workspace": ("scratch", Tensor.int, r"workspace must be .* int64 in a row, got int32"),
}


@pytest.mark.parametrize("case", SELECT_ERRORS)
def test_select_errors_name_the_tensor(case: str, device: str) -> None:
    name, change, message = SELECT_ERRORS[case]
    ints = torch.zeros(2, dtype=torch.int64, device=device)
    arguments = {
        "token": ints.clone(),
        "finished": ints.clone(),
        "history": ints.repeat(4, 1),
        "length": ints[:1].clone(),
        "step": ints[:1].clone(),
        "scratch": workspace(2, ints.device),
        "logits": torch.randn(2, 8, device=device),
        "eos": ints[:1].clone(),
        "pad": 0,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=rf"hf_fuse decode_select: {message}"):
        decode_select(**arguments, backend=device)


# all of them


def test_float64_is_refused(device: str) -> None:
    double = torch.float64
    with pytest.raises(RuntimeError, match=r"hf_fuse decode_linear: .*got float64"):
        replace(
            make_linear(8, [3], double, device), start=torch.zeros(1, 3, device=device)
        )(backend=device)  # fmt: skip
    with pytest.raises(RuntimeError, match=r"hf_fuse decode_attention: .*got float64"):
        make_attention(double, device, length=3)(backend=device)
    with pytest.raises(RuntimeError, match=r"hf_fuse decode_embed: .*got float64"):
        decode_embed(torch.zeros(3, 9, device=device), **make_embed(double, device, 9),
                     backend=device)  # fmt: skip


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    ops, check = torch.ops.hf_fuse, torch.library.opcheck
    linear = make_linear(32, [5, 5], dtype, device, norm="rms", epilogue="gated")
    linear(backend=device)  # the ops are there from the first call on
    norm, weights = linear.norm, linear.weights
    check(
        ops.decode_linear.default,
        (
            linear.out(),
            linear.x,
            norm[0],
            norm[1],
            norm[2],
            True,
            *weights,
            None,
            *[None] * 3,
            2,
            3,
        ),
    )
    check(
        ops.decode_linear_two.default,
        (linear.x.new_empty(1, 5), weights[0].new_empty(1, 5), linear.x, norm[0], None, norm[0],
         None, norm[2], True, weights[0], None, weights[1], None, 3),
    )  # fmt: skip
    call = make_attention(dtype, device, length=5)
    caches = [t.nan_to_num() for t in (call.key_cache, call.value_cache)]
    out = caches[0].new_zeros(1, call.heads, 64)
    check(
        ops.decode_attention.default,
        (out, call.qkv, *caches, call.length, call.start, call.inv_freq, 1.0, False, call.scaling),
    )
    check(
        ops.decode_embed.default,
        (torch.zeros(3, 9, device=device), *make_embed(dtype, device, 9).values()),
    )
    ints = [torch.zeros(n, dtype=torch.int64, device=device) for n in (2, 2, 1, 1, 1)]
    token, finished, length, step, eos = ints
    scratch, logits = workspace(2, token.device), torch.randn(2, 8, device=device)
    history = token.repeat(4, 1)
    check(
        ops.decode_select.default,
        (token, finished, history, length, step, scratch, logits, eos, 0),
    )
