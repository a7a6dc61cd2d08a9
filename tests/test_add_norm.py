"""add_norm: against float64 truth and, where eager's bits are meant, against eager's bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import (
    LAYOUTS,
    assert_equal,
    assert_within,
    compile_whole,
    count_ops,
    each_backend,
    each_dtype,
    each_layout,
    gradients,
    leaves,
    name_of,
    registered,
    relative_error,
    strange,
)
from torch import Tensor

from hf_fuse.ops.add_norm import KINDS, add_norm, reference

Outputs = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Variant:
    kind: str
    inputs: int = 1
    norms: int = 1
    bias: bool = False
    eps: float = 1e-5

    def __str__(self) -> str:
        parts = [self.kind + ("_bias" if self.bias else "")]
        parts += [f"add{self.inputs}"] if self.inputs > 1 else []
        parts += ["two_norms"] if self.norms == 2 else []
        return "-".join(parts)


NORMS = (("rms", False), ("layer", False), ("layer", True))
VARIANTS = [
    Variant(kind, inputs, norms, bias)
    for kind, bias in NORMS
    for inputs in (1, 2, 3)
    for norms in (1, 2)
]
VARIANTS += [
    Variant(kind, inputs, norms)
    for kind in ("rms_once", "rms_offset")
    for inputs, norms in ((1, 1), (3, 2))
]
FEW = [
    Variant("rms"),
    Variant("rms", 2),
    Variant("layer", 1, 2, True),
    Variant("layer", 3, 2, True),
    Variant("rms_offset", 2),
]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
few_variants = pytest.mark.parametrize("variant", FEW, ids=str)


@dataclass
class Args:
    """One call's tensors, in the order of `tensors`."""

    variant: Variant
    tensors: list[Tensor | None]  # x, delta1, delta2, weight, bias, weight2, bias2

    def __call__(self, function: Callable[..., Outputs] = add_norm, **options: Any) -> Outputs:
        x, delta1, delta2, weight, bias, weight2, bias2 = self.tensors
        deltas = [d for d in (delta1, delta2) if d is not None]
        return function(
            x,
            weight,
            bias,
            eps=self.variant.eps,
            kind=self.variant.kind,
            deltas=deltas,
            weight2=weight2,
            bias2=bias2,
            **options,
        )

    def map(self, f: Callable[[Tensor], Tensor]) -> Args:
        return Args(self.variant, [None if t is None else f(t) for t in self.tensors])

    def map_rows(self, f: Callable[[Tensor], Tensor]) -> Args:
        """`f` of x and the deltas alone."""
        rows = [None if t is None else f(t) for t in self.tensors[:3]]
        return Args(self.variant, rows + self.tensors[3:])

    def double(self) -> Args:
        return self.map(Tensor.double)

    def gradients(self, function: Callable[..., Outputs] = add_norm) -> dict[str, Tensor]:
        """Of every tensor, for all outputs at once."""
        args = Args(self.variant, leaves(self.tensors))
        inputs = [t for t in args.tensors if t is not None]
        outputs = args(function)
        # Without deltas the residual is x itself and carries no gradient of its own.
        used = outputs[self.variant.inputs == 1 :]
        found = iter(gradients([o for o in used if o is not None], inputs))
        names = ("x", "delta1", "delta2", "weight", "bias", "weight2", "bias2")
        return {
            f"grad of {n}": next(found)
            for n, t in zip(names, args.tensors, strict=True)
            if t is not None
        }


def make(
    variant: Variant,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Args:
    def rows(wanted: bool = True) -> Tensor | None:
        return torch.randn(shape).to(device, dtype) if wanted else None

    def vector(wanted: bool, shift: float) -> Tensor | None:
        return (torch.randn(shape[-1:]) * 0.3 + shift).to(device, dtype) if wanted else None

    inputs = [rows(), rows(variant.inputs > 1), rows(variant.inputs > 2)]
    two = variant.norms == 2
    norms = [
        vector(True, 1),
        vector(variant.bias, 0),
        vector(two, 1),
        vector(two and variant.bias, 0),
    ]
    return Args(variant, inputs + norms)


def named(outputs: Outputs) -> dict[str, Tensor]:
    names = ("residual", "normed", "normed2")
    return {n: o for n, o in zip(names, outputs, strict=True) if o is not None}


def assert_accurate(args: Args, atol: float | None = None) -> None:
    truth, unfused = args.double(), args(reference)
    for name, fused in named(args()).items():
        expected = named(truth(reference))[name]
        assert_within(fused, named(unfused)[name], expected, atol=atol, name=name)
    expected, unfused = truth.gradients(reference), args.gradients(reference)
    for name, fused in args.gradients().items():
        assert_within(fused, unfused[name], expected[name], atol=atol, name=name)


@each_dtype
@pytest.mark.parametrize("hidden_size", [1, 7, 111, 768, 2049, 2560, 4096])
@each_variant
def test_accuracy(variant: Variant, hidden_size: int, dtype: torch.dtype, device: str) -> None:
    tokens, atol = 37 if hidden_size <= 768 else 5, None
    if hidden_size == 1:
        # eps alone keeps the gradient of such a row from being zero, and a sum over the tokens that
        # comes out small has the error of its terms.
        variant, atol = replace(variant, eps=0.3), 8 * torch.finfo(dtype).eps
    assert_accurate(make(variant, (tokens, hidden_size), dtype, device), atol)


@each_dtype
@few_variants
def test_accuracy_at_the_largest_hidden_size(
    variant: Variant, dtype: torch.dtype, device: str
) -> None:
    assert_accurate(make(variant, (3, 65536), dtype, device))


@each_dtype
@few_variants
def test_accuracy_over_many_tokens(variant: Variant, dtype: torch.dtype, device: str) -> None:
    assert_accurate(make(variant, (1023, 111), dtype, device))


@pytest.mark.parametrize("leading", [(), (1,), (3,), (37,), (2, 3), (2, 1, 3)], ids=name_of)
@few_variants
def test_leading_shapes(variant: Variant, leading: tuple[int, ...], device: str) -> None:
    args = make(variant, (*leading, 130), device=device)
    assert_accurate(args)
    flat = args.map_rows(lambda t: t.reshape(-1, 130))()
    for name, output in named(args()).items():
        assert output.shape == (*leading, 130)
        assert_equal(output.reshape(-1, 130), named(flat)[name], name)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=name_of)
@few_variants
def test_no_tokens(variant: Variant, leading: tuple[int, ...], device: str) -> None:
    args = make(variant, (*leading, 130), device=device)
    for output in named(args()).values():
        assert output.shape == (*leading, 130)
    for name, grad in args.gradients().items():
        assert_equal(grad, torch.zeros_like(grad), name)


@each_dtype
@each_layout
@few_variants
def test_layouts(variant: Variant, layout: Callable, dtype: torch.dtype, device: str) -> None:
    """The layout of the inputs does not change the answer: on CPU not a bit; on CUDA, rows that
    are not aligned are summed one element at a time, which may move the last bit or two.
    """

    def check(output: Tensor, expected: Tensor, name: str) -> None:
        if device == "cpu" or name == "residual":
            assert_equal(output, expected, name)
        else:
            assert relative_error(output, expected) < 4 * torch.finfo(dtype).eps, name

    for hidden_size in (111, 768):
        args = make(variant, (2, 5, hidden_size), dtype, device)
        moved = args.map_rows(layout)
        if layout is LAYOUTS["unaligned"]:
            moved = args.map(layout)
        for name, output in named(moved()).items():
            check(output, named(args())[name], name)
        expected = args.gradients()
        for name, grad in moved.gradients().items():
            check(grad, expected[name], name)


def test_expanded_rows(device: str) -> None:
    args = make(Variant("layer", 2), (1, 96), device=device)
    wide = args.map_rows(lambda t: t.expand(4, 96))
    for name, output in named(wide()).items():
        assert_equal(output, named(args())[name].repeat(4, 1), name)


@each_dtype
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_rows_far_from_zero(kind: str, dtype: torch.dtype, device: str) -> None:
    """Mean 1e4 and standard deviation 1: a one-pass variance in fp32 would have no digit left."""
    args = make(Variant(kind, bias=kind == "layer"), (37, 2560), torch.float32, device)
    # fp16 and bf16 numbers near 1e4 are 8 and 64 apart.
    deviation = {torch.float32: 1, torch.float16: 8, torch.bfloat16: 64}[dtype]
    args.tensors[0] = args.tensors[0] * deviation + 1e4
    args = args.map(lambda t: t.to(dtype))
    truth, unfused, fused = args.double()(reference)[1], args(reference)[1], args()[1]
    assert_within(fused, unfused, truth)
    stated = {torch.float32: 6e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    assert relative_error(fused, truth) < stated[dtype]


@each_dtype
@pytest.mark.parametrize("hidden_size", [7, 768, 2049])
@each_variant
def test_residual_is_eagers_sum_and_norm_of_it_is_the_plain_norm(
    variant: Variant, hidden_size: int, dtype: torch.dtype, device: str
) -> None:
    args = make(variant, (37, hidden_size), dtype, device)
    x, delta1, delta2, weight, bias, weight2, bias2 = args.tensors
    residual, normed, normed2 = args()
    if variant.inputs == 1:
        assert residual is x
    if variant.inputs == 2:
        assert_equal(residual, delta1 + x)
    if variant.inputs == 3:
        assert_equal(residual, (delta1 + delta2) + x)
    plain = {"eps": variant.eps, "kind": variant.kind}
    assert_equal(normed, add_norm(residual, weight, bias, **plain)[1])
    assert (normed2 is None) == (variant.norms == 1)
    if normed2 is not None:
        assert_equal(normed2, add_norm(residual, weight2, bias2, **plain)[1])


@each_dtype
@few_variants
def test_training_and_inference_have_the_same_bits(
    variant: Variant, dtype: torch.dtype, device: str
) -> None:
    args = make(variant, (37, 768), dtype, device)
    trained = Args(variant, leaves(args.tensors))()
    with torch.inference_mode():
        for name, output in named(args()).items():
            assert_equal(named(trained)[name].detach(), output, name)


@each_dtype
@pytest.mark.parametrize("shape", [(3, 2560), (301, 768)], ids=name_of)
@few_variants
def test_same_bits_on_every_run_and_number_of_threads(
    variant: Variant, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    args = make(variant, shape, dtype, device)

    def run() -> dict[str, Tensor]:
        return {**named(args()), **args.gradients()}

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2, threads):
            torch.set_num_threads(count)
            for name, output in run().items():
                assert_equal(output, first[name], f"{name} with {count} threads")
    finally:
        torch.set_num_threads(threads)


@each_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "largest"])
@few_variants
def test_strange_values_come_out_as_in_eager(
    variant: Variant, value: Any, dtype: torch.dtype, device: str
) -> None:
    args = make(variant, (5, 130), dtype, device)
    clean = named(args())
    if value == "largest":  # fp16: the sum overflows to Inf; others: its square does, in fp32
        value = torch.finfo(dtype).max
    for rows in args.tensors[:3]:
        if rows is not None:
            rows[1, 3] = value
            rows[4, 129] = value
    unfused = named(args(reference))
    for name, output in named(args()).items():
        assert_equal(strange(output), strange(unfused[name]), name)
        assert_equal(output[[0, 2, 3]], clean[name][[0, 2, 3]], name)
        finite, atol = unfused[name].isfinite(), 4 * torch.finfo(dtype).eps
        eager = unfused[name][finite]
        assert_within(output[finite], eager, eager.double(), atol=atol)


@few_variants
def test_gradients_of_strange_rows_stay_in_their_rows(variant: Variant, device: str) -> None:
    args = make(variant, (5, 130), device=device)
    clean = args.gradients()
    args.tensors[0][1, 3] = float("nan")
    eager = args.gradients(reference)
    for name, grad in args.gradients().items():
        assert_equal(grad.isnan(), eager[name].isnan(), name)
        if grad.dim() == 2:
            assert_equal(grad[[0, 2, 3, 4]], clean[name][[0, 2, 3, 4]], name)


def op_arguments(args: Args, stats: bool) -> tuple:
    return (*args.tensors, args.variant.eps, KINDS.index(args.variant.kind), stats)


@few_variants
def test_opcheck(variant: Variant, device: str) -> None:
    args = make(variant, (2, 3, 33), device=device)
    op = registered(device).add_norm.default
    torch.library.opcheck(op, op_arguments(args, stats=False))
    torch.library.opcheck(op, op_arguments(Args(variant, leaves(args.tensors)), stats=True))


@few_variants
def test_opcheck_backward(variant: Variant, device: str) -> None:
    args = make(variant, (2, 3, 33), device=device)
    ops = registered(device)
    outputs = ops.add_norm.default(*op_arguments(args, stats=True))
    residual, _, normed2, mean, rstd = outputs
    x, delta1, _, weight, _, weight2, _ = args.tensors
    grads = (
        None if delta1 is None else torch.randn_like(x),
        torch.randn_like(x),
        None if normed2 is None else torch.randn_like(x),
    )
    saved = (x if residual is None else residual, weight, weight2, mean, rstd)
    bias = variant.bias
    flags = (KINDS.index(variant.kind), bias, bias and variant.norms == 2)
    torch.library.opcheck(ops.add_norm_backward.default, (*grads, *saved, *flags))


@each_variant
def test_gradcheck(variant: Variant) -> None:
    args = make(variant, (3, 5), torch.float64)
    present = [t is not None for t in args.tensors]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        outputs = Args(variant, [next(given) if p else None for p in present])()
        return tuple(named(outputs).values())

    assert torch.autograd.gradcheck(function, [t for t in leaves(args.tensors) if t is not None])


@pytest.mark.parametrize("wanted", ["residual", "normed", "normed2"])
def test_gradient_of_one_output_alone(wanted: str, device: str) -> None:
    args = make(Variant("layer", 3, 2, True), (37, 130), device=device)

    def grads_of(function: Callable, args: Args) -> list[Tensor]:
        rows = leaves(args.tensors[:3])
        output = named(Args(args.variant, rows + args.tensors[3:])(function))[wanted]
        return gradients([output], rows)

    truth, unfused = grads_of(reference, args.double()), grads_of(reference, args)
    for fused, eager, true in zip(grads_of(add_norm, args), unfused, truth, strict=True):
        assert_within(fused, eager, true)


@few_variants
def test_compile(variant: Variant, device: str) -> None:
    args = make(variant, (2, 3, 130), device=device)

    def function(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(named(Args(variant, list(tensors))()).values())

    compiled = compile_whole(function)
    expected = named(args()).values()
    for output, eager in zip(compiled(*args.tensors), expected, strict=True):
        assert_equal(output, eager)

    def grads_of(function: Callable) -> list[Tensor]:
        tensors = leaves(args.tensors)
        outputs = function(*tensors)[variant.inputs == 1 :]
        return gradients(outputs, [t for t in tensors if t is not None])

    for grad, eager in zip(grads_of(compiled), grads_of(function), strict=True):
        assert_equal(grad, eager)


@few_variants
def test_one_call_and_no_separate_add(variant: Variant, device: str) -> None:
    args = make(variant, (2, 3, 130), device=device)
    with count_ops() as calls:
        args()
    assert dict(calls) == {"hf_fuse::add_norm": 1}
    with count_ops() as calls:
        args(backend="reference")
    assert calls["hf_fuse::add_norm"] == 0
    assert calls["aten::add"] >= variant.inputs - 1


ERRORS: dict[str, tuple[Callable[[Args], Any], str]] = {
    "int_x": (lambda a: a.map(Tensor.long), r"x must be .*float.*got .*int64"),
    "half_delta1": (
        lambda a: replace_at(a, 1, a.tensors[1].half()),
        r"delta1 must .*float32.*got .*float16",
    ),
    "half_weight": (
        lambda a: replace_at(a, 3, a.tensors[3].half()),
        r"weight1 must .*float32.*got .*float16",
    ),
    "half_bias2": (
        lambda a: replace_at(a, 6, a.tensors[6].half()),
        r"bias2 must .*float32.*got .*float16",
    ),
    "short_delta1": (
        lambda a: replace_at(a, 1, a.tensors[1][:1]),
        r"delta1 must .*\[2, 8\].*got .*\[1, 8\]",
    ),
    "narrow_delta2": (
        lambda a: replace_at(a, 2, a.tensors[2][:, :7]),
        r"delta2 must .*\[2, 8\].*got .*\[2, 7\]",
    ),
    "wrong_hidden_size": (
        lambda a: replace_at(a, 3, torch.ones(9, device=a.tensors[0].device)),
        r"weight1 must .*\[8\].*got .*\[9\]",
    ),
    "matrix_weight2": (
        lambda a: replace_at(a, 5, a.tensors[5][None]),
        r"weight2 must .*\[8\].*got .*\[1, 8\]",
    ),
    "bias2_without_weight2": (lambda a: replace_at(a, 5, None), r"bias2 needs weight2"),
    "scalar_x": (
        lambda a: a.map_rows(lambda t: t[0, 0]),
        r"x must .*got (a scalar|\[\]|\(\))",
    ),
    "empty_rows": (lambda a: a.map(lambda t: t[..., :0]), r".*x must be .*1 to 65536.*got .*0"),
}


def replace_at(args: Args, index: int, value: Tensor | None) -> Args:
    return Args(args.variant, [value if i == index else t for i, t in enumerate(args.tensors)])


@each_backend
@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_tensor(case: str, backend: str, device: str) -> None:
    change, message = ERRORS[case]
    args = make(Variant("layer", 3, 2, True), (2, 8), device=device)
    with pytest.raises(RuntimeError, match=rf"hf_fuse add_norm: {message}"):
        change(args)(backend=backend)


@each_backend
@pytest.mark.parametrize("name", ["bias1", "bias2"])
def test_rms_norm_has_no_bias(name: str, backend: str, device: str) -> None:
    args = make(Variant("rms", 1, 2), (2, 8), device=device)
    args = replace_at(args, 4 if name == "bias1" else 6, torch.zeros(8, device=device))
    with pytest.raises(RuntimeError, match=rf"add_norm: {name} .*RMSNorm has no bias"):
        args(backend=backend)


@each_backend
def test_values_that_are_not_known(backend: str, device: str) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(
        ValueError, match=r"add_norm: kind must be one of rms, layer, .*got 'batch'"
    ):
        add_norm(x, x[0], eps=1e-5, kind="batch", backend=backend)
    with pytest.raises(ValueError, match=r"add_norm: at most 2 deltas, got 3"):
        add_norm(x, x[0], eps=1e-5, kind="rms", deltas=[x, x, x], backend=backend)


def test_unknown_backend(device: str) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*got 'tpu'"):
        add_norm(x, x[0], eps=1e-5, kind="rms", backend="tpu")
    other = "cuda" if device == "cpu" else "cpu"
    with pytest.raises(RuntimeError, match=rf"backend '{other}' .*tensor is on {device}"):
        add_norm(x, x[0], eps=1e-5, kind="rms", backend=other)


@pytest.mark.cuda
@each_backend
@pytest.mark.parametrize("index", [1, 3], ids=["delta1", "weight1"])
def test_tensors_on_two_devices(index: int, backend: str) -> None:
    for device, other in (("cuda", "cpu"), ("cpu", "cuda")):
        args = make(Variant("rms", 2), (2, 8), device=device)
        args = replace_at(args, index, args.tensors[index].to(other))
        name = "delta1" if index == 1 else "weight1"
        with pytest.raises(RuntimeError, match=rf"{name} must .*{device}.*got .*{other}"):
            args(backend=backend)


@pytest.mark.cuda
def test_float64_on_cuda_takes_the_reference_or_is_refused_by_name() -> None:
    args = make(Variant("rms"), (2, 8), torch.float64, "cuda")
    assert_equal(args()[1], args(reference)[1], "normed")
    with pytest.raises(RuntimeError, match=r"x must be float32, float16 or bfloat16.*got float64"):
        args(backend="cuda")
