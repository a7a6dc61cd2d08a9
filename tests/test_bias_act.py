"""bias_act: act(x + bias) against float64 truth on every magnitude, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

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
    strange,
)
from torch import Tensor, nn
from transformers import activations as hf_activations

from hf_fuse.ops.activations import ACTIVATIONS, from_module
from hf_fuse.ops.bias_act import bias_act, reference

each_act = pytest.mark.parametrize("act", ACTIVATIONS)
each_bias = pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])


def make(
    shape: tuple[int, ...],
    bias: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor | None]:
    x, vector = torch.randn(shape) * 3, torch.randn(shape[-1:])
    return x.to(device, dtype), vector.to(device, dtype) if bias else None


def grads_of(function: Callable, x: Tensor, bias: Tensor | None, act: str) -> list[Tensor]:
    x, bias = leaves((x, bias))
    return gradients([function(x, bias, act)], [x] if bias is None else [x, bias])


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def assert_accurate(x: Tensor, bias: Tensor | None, act: str, atol: float | None = None) -> None:
    wide = x.double(), double(bias)
    fused, unfused = bias_act(x, bias, act), reference(x, bias, act)
    assert_within(fused, unfused, reference(*wide, act))
    fused, unfused = grads_of(bias_act, x, bias, act), grads_of(reference, x, bias, act)
    truth = grads_of(reference, *wide, act)
    for name, a, b, true in zip(("x", "bias"), fused, unfused, truth, strict=False):
        assert_within(a, b, true, atol=atol, name=f"grad of {name}")


@each_dtype
@pytest.mark.parametrize("size", [1, 7, 111, 768, 2049, 2560, 4096, 65537])
@each_bias
@each_act
def test_accuracy(act: str, bias: bool, size: int, dtype: torch.dtype, device: str) -> None:
    tokens = 37 if size < 1000 else 3
    # A bias gradient is a sum over the tokens: one of few may come out small by chance.
    atol = 8 * torch.finfo(dtype).eps if size < 10 else None
    assert_accurate(*make((tokens, size), bias, dtype, device), act, atol)


def every_magnitude(dtype: torch.dtype) -> Tensor:
    """Every finite number of a 16-bit dtype; of float32 a dense grid: 2^13 values between the
    powers of two from 2^-4 to 2^7, 2^7 elsewhere, down to the subnormal ones, of both signs.
    """
    if dtype != torch.float32:
        values = torch.arange(-(2**15), 2**15).short().view(dtype)
    else:
        coarse = torch.arange(0, 0x7F800000, 2**16).int()
        fine = torch.arange(123 << 23, 134 << 23, 2**10).int()
        values = torch.cat([coarse, fine]).sort().values.view(torch.float32)
        values = torch.cat([-values.flip(0), values])
    values = values[values.isfinite()].sort().values
    return values[: len(values) // 256 * 256]


def exact(x: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """act(x) and its derivative in float64, also where float64's own formulas cancel."""
    x = x.double().requires_grad_()
    if act == "gelu":
        cdf = 0.5 * torch.erfc(-x * 0.5**0.5)
        density = torch.exp(-0.5 * x * x) / (2 * torch.pi) ** 0.5
        return (x * cdf).detach(), (cdf + x * density).detach()
    if act == "gelu_tanh":
        scale = (2 / torch.pi) ** 0.5
        inner = scale * (x + 0.044715 * x**3)
        sigmoid, rest = torch.sigmoid(2 * inner), torch.sigmoid(-2 * inner)
        slope = 2 * x * sigmoid * rest * scale * (1 + 3 * 0.044715 * x**2)
        return (x * sigmoid).detach(), (sigmoid + slope).detach()
    out = reference(x, None, act)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


@each_dtype
@each_act
def test_accuracy_at_every_magnitude(act: str, dtype: torch.dtype, device: str) -> None:
    """The largest error among 256 neighbours is at most twice eager's, plus one rounding."""
    x = every_magnitude(dtype).to(device)
    truth, slope = exact(x, act)
    info = torch.finfo(dtype)

    def check(fused: Tensor, unfused: Tensor, truth: Tensor, name: str) -> None:
        usable = unfused.isfinite() & truth.isfinite() & (truth.abs() <= info.max)
        assert fused[usable].isfinite().all(), name
        truth = truth.where(usable, 0)
        errors = [(t.double().where(usable, 0) - truth).abs() for t in (fused, unfused)]
        got, eager = (e.view(-1, 256).amax(1) for e in errors)
        largest = truth.abs().view(-1, 256).amax(1)
        allowed = 2 * eager + info.eps / 2 * largest + info.smallest_normal * info.eps
        worst = (got / allowed).argmax()
        assert got[worst] <= allowed[worst], (
            f"{name} near {x[256 * worst].item():.4g}: error {got[worst]:.3e}, eager's "
            f"{eager[worst]:.3e}, of {largest[worst]:.3e}"
        )

    check(bias_act(x, None, act), reference(x, None, act), truth, act)
    ones = torch.ones_like(x)

    def derivative(function: Callable) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf, None, act), leaf, ones)[0]

    check(derivative(bias_act), derivative(reference), slope, f"{act}'")


@each_dtype
@pytest.mark.parametrize(
    "module",
    [
        *(hf_activations.ACT2FN[n] for n in ("gelu", "gelu_new", "gelu_fast", "relu", "silu")),
        *(hf_activations.ACT2FN[n] for n in ("gelu_pytorch_tanh", "relu2")),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.ReLU(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_known_modules(module: nn.Module, dtype: torch.dtype, device: str) -> None:
    act = from_module(module)
    assert act in ACTIVATIONS
    x, _ = make((37, 111), False, dtype, device)
    assert_within(bias_act(x, None, act), module(x), module(x.double()))


def test_unknown_modules_are_left_alone() -> None:
    class Mine(nn.GELU):
        pass

    assert from_module(nn.Tanh()) is None
    assert from_module(Mine("tanh")) in (None, "gelu_tanh")
    assert from_module(hf_activations.ACT2FN["quick_gelu"]) is None


@pytest.mark.parametrize("leading", [(), (1,), (37,), (2, 3), (2, 1, 3)], ids=name_of)
@each_bias
@each_act
def test_leading_shapes(act: str, bias: bool, leading: tuple[int, ...], device: str) -> None:
    x, vector = make((*leading, 130), bias, device=device)
    assert_accurate(x, vector, act)
    flat = bias_act(x.reshape(-1, 130), vector, act)
    assert_equal(bias_act(x, vector, act), flat.view(*leading, 130))


@pytest.mark.parametrize("shape", [(0, 130), (2, 0, 130), (3, 0)], ids=name_of)
@each_backend
@each_bias
def test_no_elements(bias: bool, shape: tuple[int, ...], backend: str, device: str) -> None:
    x, vector = make(shape, bias, device=device)
    assert bias_act(x, vector, "gelu", backend=backend).shape == shape
    for grad, t in zip(grads_of(bias_act, x, vector, "gelu"), (x, vector), strict=False):
        assert_equal(grad, torch.zeros_like(t))


@each_dtype
@each_layout
@each_bias
def test_layouts(bias: bool, layout: Callable, dtype: torch.dtype, device: str) -> None:
    """The layout of the inputs does not change a bit of the answer."""
    for size in (111, 768):
        x, vector = make((2, 5, size), bias, dtype, device)
        moved = layout(x), layout(vector) if bias and layout is LAYOUTS["unaligned"] else vector
        assert_equal(bias_act(*moved, "gelu_tanh"), bias_act(x, vector, "gelu_tanh"))
        expected = grads_of(bias_act, x, vector, "gelu_tanh")
        for a, b in zip(grads_of(bias_act, *moved, "gelu_tanh"), expected, strict=True):
            assert_equal(a, b)


@each_dtype
@each_bias
@each_act
def test_strange_values_come_out_as_in_eager(
    act: str, bias: bool, dtype: torch.dtype, device: str
) -> None:
    largest = torch.finfo(dtype).max
    if act == "relu2":  # its square overflows here too, twice its value in no rounding
        largest /= 4
    values = [float("nan"), float("inf"), -float("inf"), largest, -largest, 0.0, -0.0, 1.0, -1.0]
    x = torch.tensor(values).to(device, dtype).repeat_interleave(3)
    vector = torch.tensor([0.0, -1.0, largest] * 9).to(device, dtype) if bias else None
    # oneDNN's GELU makes a NaN of +Inf, and Inf of the largest float; torch's own does not.
    with torch.backends.mkldnn.flags(enabled=False):
        unfused = [reference(x, vector, act), *grads_of(reference, x, vector, act)]
    fused = [bias_act(x, vector, act), *grads_of(bias_act, x, vector, act)]
    for a, b in zip(fused, unfused, strict=True):
        assert_equal(strange(a), strange(b))


@each_dtype
@each_act
def test_same_bits_on_every_number_of_threads(act: str, dtype: torch.dtype, device: str) -> None:
    x, bias = make((301, 768), True, dtype, device)

    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        out = bias_act(leaf, bias, act)
        return torch.stack([out.detach(), torch.autograd.grad(out, leaf, x)[0]])

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2, threads):
            torch.set_num_threads(count)
            assert_equal(run(), first, f"with {count} threads")
    finally:
        torch.set_num_threads(threads)


@each_bias
@each_act
def test_gradcheck(act: str, bias: bool) -> None:
    x, vector = make((3, 5), bias, torch.float64)
    if act.startswith("relu"):  # away from the bend
        x = torch.where((x + (vector if bias else 0)).abs() < 0.1, x + 0.3, x)
    inputs = [t for t in leaves((x, vector)) if t is not None]
    assert torch.autograd.gradcheck(lambda x, b=None: bias_act(x, b, act), inputs)


@each_bias
@each_act
def test_opcheck(act: str, bias: bool, device: str) -> None:
    ops, number = registered(device), ACTIVATIONS.index(act)
    x, vector = make((2, 3, 33), bias, device=device)
    torch.library.opcheck(ops.bias_act.default, (x, vector, number))
    torch.library.opcheck(ops.bias_act.default, (*leaves((x, vector)), number))
    torch.library.opcheck(ops.bias_act_backward.default, (x, x, vector, number))


@each_bias
def test_compile(bias: bool, device: str) -> None:
    x, vector = make((2, 3, 130), bias, device=device)
    compiled = compile_whole(bias_act)
    assert_equal(compiled(x, vector, "gelu_tanh"), bias_act(x, vector, "gelu_tanh"))
    expected = grads_of(bias_act, x, vector, "gelu_tanh")
    for a, b in zip(grads_of(compiled, x, vector, "gelu_tanh"), expected, strict=True):
        assert_equal(a, b)


def test_one_call(device: str) -> None:
    x, vector = make((2, 3, 130), True, device=device)
    with count_ops() as calls:
        bias_act(x, vector, "gelu_tanh")
    assert dict(calls) == {"hf_fuse::bias_act": 1}
    with count_ops() as calls:
        bias_act(x, vector, "gelu_tanh", backend="reference")
    assert calls["hf_fuse::bias_act"] == 0


ERRORS: dict[str, tuple[Callable, Callable, str]] = {
    "int": (Tensor.long, Tensor.long, r"x must be .*float.*got .*int64"),
    "half_bias": (Tensor.clone, Tensor.half, r"bias must .*float32.*got .*float16"),
    "narrow_bias": (Tensor.clone, lambda t: t[:7], r"bias must .*\[8\].*got .*\[7\]"),
    "matrix_bias": (Tensor.clone, lambda t: t[None], r"bias must .*\[8\].*got .*\[1, 8\]"),
    "scalar": (lambda t: t[0, 0], Tensor.clone, r"x must .*got .*(scalar|\[\])"),
}


@each_backend
@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_tensor(case: str, backend: str, device: str) -> None:
    change_x, change_bias, message = ERRORS[case]
    x, bias = make((2, 8), True, device=device)
    with pytest.raises(RuntimeError, match=rf"hf_fuse bias_act: {message}"):
        bias_act(change_x(x), change_bias(bias), "gelu", backend=backend)


@each_backend
def test_values_that_are_not_known(backend: str, device: str) -> None:
    x, bias = make((2, 8), True, device=device)
    with pytest.raises(ValueError, match=r"bias_act: act must be one of gelu, .*got 'swish'"):
        bias_act(x, bias, "swish", backend=backend)
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*got 'tpu'"):
        bias_act(x, bias, "gelu", backend="tpu")


@pytest.mark.cuda
@each_backend
def test_tensors_on_two_devices(backend: str) -> None:
    for device, other in (("cuda", "cpu"), ("cpu", "cuda")):
        x, bias = make((2, 8), True, device=device)
        with pytest.raises(RuntimeError, match=rf"bias must .*{device}.*got .*{other}"):
            bias_act(x, bias.to(other), "gelu", backend=backend)
