"""gated_act: act(gate) * up against float64 truth, forward and backward, in any layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import (
    DTYPES,
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
from torch import Tensor

from hf_fuse.ops.activations import ACTIVATIONS
from hf_fuse.ops.gated_act import gated_act, reference

each_act = pytest.mark.parametrize("act", ACTIVATIONS)
GATED = pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """gate over the whole range where an activation bends, and up."""
    return (torch.randn(shape) * 3).to(device, dtype), torch.randn(shape).to(device, dtype)


def grads_of(function: Callable, gate: Tensor, up: Tensor, act: str) -> list[Tensor]:
    gate, up = leaves((gate, up))
    return gradients([function(gate, up, act)], [gate, up])


def assert_accurate(gate: Tensor, up: Tensor, act: str) -> None:
    wide = gate.double(), up.double()
    assert_within(gated_act(gate, up, act), reference(gate, up, act), reference(*wide, act))
    fused, unfused = grads_of(gated_act, gate, up, act), grads_of(reference, gate, up, act)
    truth = grads_of(reference, *wide, act)
    for name, a, b, true in zip(("gate", "up"), fused, unfused, truth, strict=True):
        assert_within(a, b, true, name=f"grad of {name}")


@each_dtype
@pytest.mark.parametrize("size", [1, 7, 111, 768, 2049, 2560, 4096, 65537])
@each_act
def test_accuracy(act: str, size: int, dtype: torch.dtype, device: str) -> None:
    tokens = 37 if size < 1000 else 3
    assert_accurate(*make((tokens, size), dtype, device), act)


@pytest.mark.parametrize("leading", [(), (1,), (37,), (2, 3), (2, 1, 3)], ids=name_of)
@GATED
def test_leading_shapes(act: str, leading: tuple[int, ...], device: str) -> None:
    gate, up = make((*leading, 130), device=device)
    assert_accurate(gate, up, act)
    flat = gated_act(gate.reshape(-1, 130), up.reshape(-1, 130), act)
    assert_equal(gated_act(gate, up, act), flat.view(*leading, 130))


@pytest.mark.parametrize("shape", [(0, 130), (2, 0, 130), (3, 0)], ids=name_of)
@each_backend
def test_no_elements(shape: tuple[int, ...], backend: str, device: str) -> None:
    gate, up = make(shape, device=device)
    assert gated_act(gate, up, "silu", backend=backend).shape == shape
    for grad in grads_of(gated_act, gate, up, "silu"):
        assert grad.shape == shape


@each_dtype
@each_layout
@GATED
def test_layouts(act: str, layout: Callable, dtype: torch.dtype, device: str) -> None:
    """The layout of the inputs does not change a bit of the answer."""
    for size in (111, 768):
        gate, up = make((2, 5, size), dtype, device)
        assert_equal(gated_act(layout(gate), layout(up), act), gated_act(gate, up, act))
        moved = grads_of(gated_act, layout(gate), layout(up), act)
        for a, b in zip(moved, grads_of(gated_act, gate, up, act), strict=True):
            assert_equal(a, b)


@each_dtype
def test_halves_of_one_projection(dtype: torch.dtype, device: str) -> None:
    both = torch.cat(make((37, 111), dtype, device), dim=-1)
    gate, up = both.chunk(2, dim=-1)
    assert_equal(gated_act(gate, up, "silu"), gated_act(gate.contiguous(), up.contiguous(), "silu"))


@GATED
def test_expanded_gradient(act: str, device: str) -> None:
    gate, up = leaves(make((5, 130), device=device))
    gated_act(gate, up, act).sum().backward()
    truth = leaves((gate.double(), up.double()))
    reference(*truth, act).sum().backward()
    unfused = leaves((gate, up))
    reference(*unfused, act).sum().backward()
    assert_within(gate.grad, unfused[0].grad, truth[0].grad)
    assert_within(up.grad, unfused[1].grad, truth[1].grad)


@each_dtype
@each_act
def test_strange_values_come_out_as_in_eager(act: str, dtype: torch.dtype, device: str) -> None:
    largest = torch.finfo(dtype).max
    if act == "relu2":  # its square overflows here too, twice its value in no rounding
        largest /= 4
    values = [float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -1.0]
    gates, ups = (torch.tensor(v).to(device, dtype) for v in ([*values, largest, -largest], values))
    gate, up = (t.contiguous() for t in torch.broadcast_tensors(gates[:, None], ups))
    # oneDNN's GELU makes a NaN of +Inf, and Inf of the largest float; torch's own does not.
    with torch.backends.mkldnn.flags(enabled=False):
        unfused = [reference(gate, up, act), *grads_of(reference, gate, up, act)]
    fused = [gated_act(gate, up, act), *grads_of(gated_act, gate, up, act)]
    for name, a, b in zip(("output", "grad of gate", "grad of up"), fused, unfused, strict=True):
        assert_equal(strange(a), strange(b), name)


@each_dtype
@GATED
def test_same_bits_on_every_number_of_threads(act: str, dtype: torch.dtype, device: str) -> None:
    gate, up = make((301, 768), dtype, device)

    def run() -> list[Tensor]:
        return [gated_act(gate, up, act), *grads_of(gated_act, gate, up, act)]

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2, threads):
            torch.set_num_threads(count)
            for a, b in zip(run(), first, strict=True):
                assert_equal(a, b, f"with {count} threads")
    finally:
        torch.set_num_threads(threads)


@each_act
def test_gradcheck(act: str) -> None:
    gate, up = make((3, 5), torch.float64)
    if act.startswith("relu"):  # away from the bend
        gate = gate + gate.sign() * 0.1
    assert torch.autograd.gradcheck(lambda g, u: gated_act(g, u, act), leaves((gate, up)))


@each_act
def test_opcheck(act: str, device: str) -> None:
    ops, number = registered(device), ACTIVATIONS.index(act)
    gate, up = make((2, 3, 33), device=device)
    torch.library.opcheck(ops.gated_act.default, (gate, up, number))
    torch.library.opcheck(ops.gated_act.default, (*leaves((gate, up)), number))
    torch.library.opcheck(ops.gated_act_backward.default, (up, gate, up, number))


@GATED
def test_compile(act: str, device: str) -> None:
    gate, up = make((2, 3, 130), device=device)
    compiled = compile_whole(gated_act)
    assert_equal(compiled(gate, up, act), gated_act(gate, up, act))
    expected = grads_of(gated_act, gate, up, act)
    for a, b in zip(grads_of(compiled, gate, up, act), expected, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_call(dtype: torch.dtype, device: str) -> None:
    gate, up = make((2, 3, 130), dtype, device)
    with count_ops() as calls:
        gated_act(gate, up, "silu")
    assert dict(calls) == {"hf_fuse::gated_act": 1}
    with count_ops() as calls:
        gated_act(gate, up, "silu", backend="reference")
    assert calls["hf_fuse::gated_act"] == 0


ERRORS: dict[str, tuple[Callable, Callable, str]] = {
    "int": (Tensor.long, Tensor.long, r"gate must be .*float.*got .*int64"),
    "half_up": (Tensor.clone, Tensor.half, r"up must .*float32.*got .*float16"),
    "narrow_up": (
        Tensor.clone,
        lambda t: t[:, :7],
        r"up must .*\[2, 8\].*got .*\[2, 7\]",
    ),
    "flat_up": (Tensor.clone, Tensor.flatten, r"up must .*\[2, 8\].*got .*\[16\]"),
    "scalar": (lambda t: t[0, 0], lambda t: t[0, 0], r"gate must .*got .*(scalar|\[\])"),
}


@each_backend
@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_tensor(case: str, backend: str, device: str) -> None:
    change_gate, change_up, message = ERRORS[case]
    gate, up = make((2, 8), device=device)
    with pytest.raises(RuntimeError, match=rf"hf_fuse gated_act: {message}"):
        gated_act(change_gate(gate), change_up(up), "silu", backend=backend)


@each_backend
def test_values_that_are_not_known(backend: str, device: str) -> None:
    gate, up = make((2, 8), device=device)
    with pytest.raises(ValueError, match=r"gated_act: act must be one of gelu, .*got 'swish'"):
        gated_act(gate, up, "swish", backend=backend)
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*got 'tpu'"):
        gated_act(gate, up, "silu", backend="tpu")


@pytest.mark.cuda
@each_backend
def test_tensors_on_two_devices(backend: str) -> None:
    for device, other in (("cuda", "cpu"), ("cpu", "cuda")):
        gate, up = make((2, 8), device=device)
        with pytest.raises(RuntimeError, match=rf"up must .*{device}.*got .*{other}"):
            gated_act(gate, up.to(other), "silu", backend=backend)
