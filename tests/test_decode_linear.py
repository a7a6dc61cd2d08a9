"""decode_linear, decode_linear_two and decode_linear_sum: norm, matrix product and epilogue against
float64 truth, for one sequence and for many.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import (
    LAYOUTS,
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

from hf_fuse.ops import decode_linear, decode_linear_sum, decode_linear_two
from hf_fuse.ops.activations import ACTIVATIONS
from hf_fuse.ops.decode_linear import normed
from hf_fuse.ops.decode_linear import reference as linear_reference


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
        batch, size = self.x.shape
        many = batch >= (2 if size > 10240 else 3) and self.x.device.type == "cuda"
        return many and self.weights[0].dtype != torch.float32 and size % 32 == 0

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


MANY = [2, 3, 5, 8, 16, 17, 33, 64, 65]


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("batch", MANY)
@pytest.mark.parametrize(
    ("size", "rows"),
    # few rows, which a cluster of blocks shares; ragged; more than the blocks take at once
    [(2048, [40, 9, 3]), (1600, [333]), (8192, [130]), (64, [36001]), (768, [17]), (14336, [5])],
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


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("batch", [3, 8, 16, 32])
@pytest.mark.parametrize(
    ("size", "rows"),
    # by four warps of two blocks; two blocks, several tiles a warp; a block more than there is room
    [(1024, 4096), (1024, 16400), (4096, 6144), (160, 36001)],
    ids=name_of,
)
def test_linear_of_many_sequences_and_rows(
    size: int, rows: int, batch: int, dtype: torch.dtype
) -> None:
    call = make_linear(size, [rows], dtype, "cuda", batch=batch, biases=[True])
    call.check()
    assert torch.equal(call(backend="cuda"), call(backend="cuda"))


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
        (2, 10240, torch.bfloat16, "decode_linear_kernel"),
        (2, 14336, torch.bfloat16, "decode_matmul_kernel"),
        (64, 64, torch.float16, "decode_matmul_kernel"),
        (3, 64, torch.float32, "decode_linear_kernel"),
        (3, 40, torch.bfloat16, "decode_linear_kernel"),
        (3, 33, torch.bfloat16, "decode_linear_elements_kernel"),
    ],
    ids=name_of,
)
def test_which_kernel_runs(batch: int, size: int, dtype: torch.dtype, kernel: str) -> None:
    call = make_linear(size, [5], dtype, "cuda", batch=batch, norm="rms")
    assert kernel in kernels_of(lambda: call(backend="cuda"))


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The decode_linear kernels, by their names' beginning, that a call launches."""
    call()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    found = (re.search(r"decode_\w+_kernel", event.key) for event in profile.key_averages())
    return [match[0] for match in found if match]


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


def add_both(first: Linear, second: Linear, backend: str) -> Tensor:
    out = first.out()
    decode_linear_sum(
        out, (first.x, second.x), (first.weights[0], second.weights[0]),
        (first.biases[0], second.biases[0]), backend=backend,
    )  # fmt: skip
    return out


def make_sum(
    sizes: tuple[int, int], rows: int, dtype: torch.dtype, device: str, batch: int = 1
) -> tuple[Linear, Linear]:
    first, second = (
        make_linear(size, [rows], dtype, device, batch=batch, biases=[bias], epilogue="add")
        for size, bias in zip(sizes, (True, rows % 2 == 0), strict=True)
    )
    return first, second


@each_dtype
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(
    ("sizes", "rows"),
    # the first kernel for one sequence with few rows of a block, with several, the second, none
    [((9, 2), 5), ((24, 8), 77), ((320, 1280), 3000), ((2560, 10240), 301), ((4096, 16384), 530),
     ((32, 96), 36001), ((2048, 64), 33)],
    ids=name_of,
)  # fmt: skip
def test_sum_of_two_projections(
    sizes: tuple[int, int], rows: int, batch: int, dtype: torch.dtype, device: str
) -> None:
    first, second = make_sum(sizes, rows, dtype, device, batch)

    def separate(a: Linear, b: Linear) -> Tensor:
        return replace(b, start=a(linear_reference))(linear_reference)

    fused = add_both(first, second, device)
    truth = separate(first.map(Tensor.double), second.map(Tensor.double))
    assert_within(fused, separate(first, second), truth, atol=2 * torch.finfo(fused.dtype).eps)
    assert torch.equal(fused, add_both(first, second, device))
    assert torch.equal(add_both(first, second, "reference"), separate(first, second))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=name_of)
@pytest.mark.parametrize("sizes", [(2048, 8192), (2560, 10240), (4096, 16384)], ids=name_of)
def test_sum_of_two_projections_is_one_kernel(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    first, second = make_sum(sizes, 40, dtype, "cuda")
    assert kernels_of(lambda: add_both(first, second, "cuda")) == ["decode_linear_sum_kernel"]


def test_sum_of_weights_that_differ_names_the_tensor(device: str) -> None:
    first, second = make_sum((8, 16), 6, torch.bfloat16, device)
    for wrong, message in (
        (second.map(Tensor.half), "weight2 must have the dtype of weight1"),
        (make_linear(16, [5], torch.bfloat16, device, biases=[True]), r"out must be .*\[1, 5\]"),
        (replace(second, x=first.x), r"weight1 must be \[rows, 8\]"),
    ):
        with pytest.raises(RuntimeError, match=rf"hf_fuse decode_linear: {message}"):
            add_both(first, wrong, device)


def test_float64_is_refused(device: str) -> None:
    call = make_linear(8, [3], torch.float64, device)
    with pytest.raises(RuntimeError, match=r"hf_fuse decode_linear: .*got float64"):
        replace(call, start=torch.zeros(1, 3, device=device))(backend=device)


@pytest.mark.parametrize("dtype", LOW, ids=name_of)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    ops, check = registered(device), torch.library.opcheck
    linear = make_linear(32, [5, 5], dtype, device, norm="rms", epilogue="gated")
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
    first, second = make_sum((32, 8), 5, dtype, device)
    check(
        ops.decode_linear_sum.default,
        (first.out(), first.x, second.x, first.weights[0], first.biases[0], second.weights[0],
         None),
    )  # fmt: skip
