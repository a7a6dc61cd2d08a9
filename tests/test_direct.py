"""direct: the call past torch's dispatcher gives the op's bits, and stands back where others must
see the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_equal
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fuse import jit
from hf_fuse.ops import add_norm

pytestmark = pytest.mark.skipif(
    not (jit.load("cpu") and jit.direct), reason="built without Python's headers"
)

SIZE = 333


class Watched:
    """`jit.direct`, with a list of what it answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[bool] = []
        call = jit.direct.add_norm

        def watched(*arguments: Any) -> Any:
            out = call(*arguments)
            self.taken.append(out is not None)
            return out

        monkeypatch.setattr(jit, "direct", SimpleNamespace(add_norm=watched))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def arguments(kind: str = "layer", deltas: int = 1, norms: int = 1, **make: Any) -> dict[str, Any]:
    def row(*shape: int) -> Tensor:
        return torch.randn(*shape, SIZE, **make)

    second = {"weight2": row(), "bias2": row() if kind == "layer" else None} if norms == 2 else {}
    return {
        "x": row(2, 5),
        "weight": row(),
        "bias": row() if kind == "layer" else None,
        "eps": 1e-5,
        "kind": kind,
        "deltas": tuple(row(2, 5) for _ in range(deltas)),
        **second,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("deltas", [0, 1, 2])
@pytest.mark.parametrize("norms", [1, 2])
def test_gives_the_bits_of_the_op(
    dtype: torch.dtype,
    kind: str,
    deltas: int,
    norms: int,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = arguments(kind, deltas, norms, dtype=dtype)
    found = add_norm(**call)
    assert watched.taken == [True]
    monkeypatch.setattr(jit, "direct", None)
    expected = add_norm(**call)
    assert (found[0] is call["x"]) == (deltas == 0)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_equal(ours, theirs)


def test_parameters_without_a_graph_and_inference_mode(watched: Watched) -> None:
    call = arguments()
    call["weight"] = nn.Parameter(call["weight"])
    with torch.no_grad():
        assert not add_norm(**call)[1].requires_grad
    with torch.inference_mode():
        assert add_norm(**call)[1].is_inference()
    assert watched.taken == [True, True]
    assert add_norm(**call)[1].requires_grad
    assert watched.taken == [True, True, False]


class Subclass(Tensor):
    pass


class Unseeing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class UnseeingFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def profiled() -> Iterator[None]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield
    assert "hf_fuse::add_norm" in {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("mode", [Unseeing, UnseeingFunctions, profiled])
def test_stands_back_where_a_mode_or_a_profiler_must_see_the_op(
    mode: Callable[[], Any], watched: Watched
) -> None:
    call = arguments()
    expected = add_norm(**call)
    with mode():
        found = add_norm(**call)
    assert watched.taken == [True, False]
    assert_equal(found[1], expected[1])


def test_stands_back_for_a_tensor_subclass(watched: Watched) -> None:
    call = arguments()
    call["x"] = call["x"].as_subclass(Subclass)
    assert isinstance(add_norm(**call)[1], Subclass)
    assert watched.taken == [False]


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "strided": lambda c: {"x": torch.randn(2, 5, 2 * SIZE)[..., ::2]},
    "float64": lambda c: {"x": c["x"].double()},
    "integers": lambda c: {"x": c["x"].long()},
    "another dtype": lambda c: {"weight": c["weight"].half()},
    "another size": lambda c: {"weight": c["weight"][:-1]},
    "another shape": lambda c: {"deltas": (c["deltas"][0][:1],)},
    "another device": lambda c: {"weight": c["weight"].to("meta")},
    "matrix weight": lambda c: {"weight": c["weight"][None]},
    "empty": lambda c: {"x": c["x"][:0], "deltas": (c["deltas"][0][:0],)},
    "scalar": lambda c: {"x": c["x"][0, 0, 0], "deltas": ()},
    "three deltas": lambda c: {"deltas": c["deltas"] * 3},
    "bias of an rms": lambda c: {"kind": "rms"},
    "bias2 alone": lambda c: {"bias2": c["bias"]},
    "unknown kind": lambda c: {"kind": "batch"},
    "no weight": lambda c: {"weight": None},
    "conjugate": lambda c: {"x": torch.randn(2, 5, SIZE, dtype=torch.complex64).conj().imag},
}


@pytest.mark.parametrize("change", CHANGES)
def test_leaves_what_is_not_plain_to_the_op(change: str, watched: Watched) -> None:
    call = arguments()
    call |= CHANGES[change](call)
    takes = nullcontext() if change in ("strided", "empty", "conjugate") else pytest.raises(
        (RuntimeError, ValueError, AttributeError, TypeError)
    )  # fmt: skip
    with takes:
        add_norm(**call)
    assert watched.taken == [False]
