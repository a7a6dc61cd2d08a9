"""rotary: transformers' rotation bit for bit, in all layouts projections give, and into a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from helpers import (
    LOW,
    assert_equal,
    assert_within,
    compile_whole,
    count_ops,
    each_backend,
    each_dtype,
    gradients,
    leaves,
    registered,
    strange,
)
from torch import Tensor
from transformers.cache_utils import StaticLayer
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from hf_fuse.ops.rotary import reference, rotary, rotary_, rotary_cache_


@dataclass(frozen=True)
class Shape:
    head_dim: int
    rotary_dim: int
    heads: int = 4
    kv_heads: int = 4
    batch: int = 2
    seq_len: int = 5

    def __str__(self) -> str:
        heads = f"{self.heads}of{self.head_dim}"
        kv = f"-kv{self.kv_heads}" if self.kv_heads != self.heads else ""
        return f"{heads}-rotary{self.rotary_dim}{kv}-{self.batch}x{self.seq_len}"


SHAPES = [
    Shape(80, 20),  # Pythia-2.8B
    Shape(64, 64, heads=8, kv_heads=2),
    Shape(128, 128, heads=6, kv_heads=1, batch=1, seq_len=37),
    Shape(256, 64, seq_len=1),
    Shape(2, 2),
    Shape(7, 4, heads=3, kv_heads=3),
    Shape(111, 110, batch=1, seq_len=3),
    Shape(16, 0),
    Shape(64, 16, heads=2, kv_heads=1, batch=1, seq_len=2049),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
few_shapes = pytest.mark.parametrize("shape", SHAPES[:3], ids=str)


def _projected(shape: Shape) -> list[Tensor]:
    """LLaMA: each projection [batch, seq_len, heads * head_dim], viewed as heads and transposed."""
    batch, seq_len, head_dim = shape.batch, shape.seq_len, shape.head_dim

    def heads(count: int) -> Tensor:
        rows = torch.randn(batch, seq_len, count * head_dim)
        return rows.view(batch, seq_len, count, head_dim).transpose(1, 2)

    return [heads(n) for n in (shape.heads, shape.kv_heads, shape.kv_heads)]


def _packed(shape: Shape) -> list[Tensor]:
    """GPT-NeoX: q, k and v of a head beside each other in one projection."""
    qkv = torch.randn(shape.batch, shape.seq_len, shape.heads, 3 * shape.head_dim)
    q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)
    return [q, k[:, : shape.kv_heads], v[:, : shape.kv_heads]]


def _contiguous(shape: Shape) -> list[Tensor]:
    return [t.contiguous() for t in _projected(shape)]


def _unaligned(shape: Shape) -> list[Tensor]:
    def moved(t: Tensor) -> Tensor:
        flat = torch.empty(t.numel() + 1)
        flat[1:] = t.flatten()
        return flat[1:].view(t.shape)

    return [moved(t) for t in _contiguous(shape)]


LAYOUTS = {
    "projected": _projected,
    "packed": _packed,
    "contiguous": _contiguous,
    "unaligned": _unaligned,
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def _to(t: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """In the same place of memory of its own, gaps and offset included."""
    base = torch.empty(0).set_(t.untyped_storage()).to(device, dtype)
    return base.as_strided(t.shape, t.stride(), t.storage_offset())


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    tensors: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = (self.q, self.k, self.cos, self.sin)

    def double(self) -> list[Tensor]:
        return [t.double() for t in self.tensors]


def make(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "projected",
    rows_of_cos: str = "each",
    model: bool = False,
) -> Case:
    """`rows_of_cos`: one row of positions for "each" sequence, or one for "all". `model`: both
    halves of cos and of sin alike, as models have them; else all elements differ."""
    batch = shape.batch if rows_of_cos == "each" else 1
    angles = torch.rand(batch, shape.seq_len, shape.rotary_dim, dtype=torch.float64) * 6.3
    if model:
        angles = angles[..., : shape.rotary_dim // 2].repeat(1, 1, 2)
    qkv = [_to(t, dtype, device) for t in LAYOUTS[layout](shape)]
    return Case(*qkv, angles.cos().to(device, dtype), angles.sin().to(device, dtype))


def grads_of(function: Callable, tensors: Any) -> list[Tensor]:
    q, k = leaves(tensors[:2])
    return gradients(function(q, k, *tensors[2:]), [q, k])


@each_dtype
@pytest.mark.parametrize("rows_of_cos", ["each", "all"])
@each_shape
def test_accuracy(shape: Shape, rows_of_cos: str, dtype: torch.dtype, device: str) -> None:
    case = make(shape, dtype, device, rows_of_cos=rows_of_cos)
    fused, unfused = rotary(*case.tensors), reference(*case.tensors)
    for name, a, b, true in zip("qk", fused, unfused, reference(*case.double()), strict=True):
        assert_within(a, b, true, name=name)
    fused, unfused = grads_of(rotary, case.tensors), grads_of(reference, case.tensors)
    truth = grads_of(reference, case.double())
    for name, a, b, true in zip("qk", fused, unfused, truth, strict=True):
        assert_within(a, b, true, name=f"grad of {name}")


@each_dtype
@each_layout
@each_shape
def test_same_bits_as_transformers(
    shape: Shape, layout: str, dtype: torch.dtype, device: str
) -> None:
    case = make(shape, dtype, device, layout, model=True)
    expected = [modeling_gpt_neox.apply_rotary_pos_emb(*case.tensors)]
    if shape.head_dim == shape.rotary_dim:
        expected.append(modeling_llama.apply_rotary_pos_emb(*case.tensors))
    fused = rotary(*case.tensors)
    for eager in expected:
        for name, a, b in zip("qk", fused, eager, strict=True):
            assert_equal(a, b, name)


@each_dtype
@each_layout
@few_shapes
def test_layouts(shape: Shape, layout: str, dtype: torch.dtype, device: str) -> None:
    """The layout does not change a bit of the gradients."""
    case = make(shape, dtype, device, layout)
    plain = [t.contiguous() for t in case.tensors]
    for name, a, b in zip(
        "qk", grads_of(rotary, case.tensors), grads_of(rotary, plain), strict=True
    ):
        assert_equal(a, b, f"grad of {name}")


def test_cos_and_sin_cut_from_longer_tables(device: str) -> None:
    shape = SHAPES[0]
    case = make(shape, device=device, rows_of_cos="all")
    table = torch.randn(2, 1, 9, 2 * shape.rotary_dim, device=device)
    cos, sin = table[:, :, 2 : 2 + shape.seq_len, 3 : 3 + shape.rotary_dim]
    expected = rotary(case.q, case.k, cos.contiguous(), sin.contiguous())
    for a, b in zip(rotary(case.q, case.k, cos, sin), expected, strict=True):
        assert_equal(a, b)


@each_dtype
@each_layout
@each_shape
def test_in_place(shape: Shape, layout: str, dtype: torch.dtype, device: str) -> None:
    case = make(shape, dtype, device, layout)
    before = [t.clone() for t in (case.q, case.k, case.v, case.cos, case.sin)]
    expected = rotary(*case.tensors)
    assert_equal(case.q, before[0], "q after the out-of-place form")
    assert rotary_(*case.tensors) is None
    for name, a, b in zip("qk", (case.q, case.k), expected, strict=True):
        assert_equal(a, b, name)
    for a, b in zip((case.q, case.k), before, strict=False):
        assert_equal(a[..., shape.rotary_dim :], b[..., shape.rotary_dim :], "pass-through")
    for name, a, b in zip(
        ("v", "cos", "sin"), (case.v, case.cos, case.sin), before[2:], strict=True
    ):
        assert_equal(a, b, name)


@pytest.mark.parametrize("empty", ["batch", "seq_len"])
@each_backend
def test_no_tokens(empty: str, backend: str, device: str) -> None:
    shape = replace(SHAPES[1], **{empty: 0})
    case = make(shape, device=device)
    for a, b in zip(rotary(*case.tensors, backend=backend), case.tensors, strict=False):
        assert a.shape == b.shape
    for grad in grads_of(rotary, case.tensors):
        assert grad.numel() == 0
    rotary_(*case.tensors, backend=backend)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@each_dtype
def test_strange_values_come_out_as_in_eager(value: float, dtype: torch.dtype, device: str) -> None:
    case = make(SHAPES[0], dtype, device)
    case.q[0, 1, 2, 3] = case.k[1, 0, 0, 15] = case.q[0, 0, 0, 70] = value
    for a, b in zip(rotary(*case.tensors), reference(*case.tensors), strict=True):
        assert_equal(strange(a), strange(b))
        assert_equal(a.nan_to_num(), b.nan_to_num())


@dataclass
class Cache:
    keys: Tensor
    values: Tensor
    length: Tensor

    @classmethod
    def of(cls, shape: Shape, capacity: int, dtype: torch.dtype, device: str) -> Cache:
        sizes = (shape.batch, shape.kv_heads, capacity, shape.head_dim)
        keys, values = (torch.zeros(sizes, dtype=dtype, device=device) for _ in range(2))
        return cls(keys, values, torch.zeros(1, dtype=torch.int64, device=device))


@each_dtype
@each_backend
@pytest.mark.parametrize("layout", ["projected", "packed"])
@few_shapes
def test_cache_as_transformers_updates_it(
    shape: Shape, layout: str, backend: str, dtype: torch.dtype, device: str
) -> None:
    cache, layer = Cache.of(shape, 9, dtype, device), StaticLayer(max_cache_len=9)
    for seq_len in (5, 1, 1, 2):
        case = make(replace(shape, seq_len=seq_len), dtype, device, layout)
        q, k = rotary(*case.tensors)
        expected = layer.update(k, case.v)
        q_in, k_in, v_in = case.q, case.k.clone(), case.v.clone()
        rotary_cache_(
            q_in, case.k, case.v, case.cos, case.sin, *vars(cache).values(), backend=backend
        )
        assert_equal(q_in, q, "q")
        assert_equal(case.k, k_in, "k")
        assert_equal(case.v, v_in, "v")
        assert_equal(cache.keys, expected[0], "key_cache")
        assert_equal(cache.values, expected[1], "value_cache")
        assert cache.length.item() == layer.get_seq_length().item()
    assert cache.length.item() == 9


@each_backend
def test_cache_takes_the_layers_own_tensors(backend: str, device: str) -> None:
    """transformers' length is a scalar tensor, and a cache may be a part of a larger one."""
    shape = SHAPES[1]
    case = make(shape, device=device)
    layer = StaticLayer(max_cache_len=8)
    layer.lazy_initialization(case.k, case.v)
    whole = Cache.of(replace(shape, batch=3), 8, torch.float32, device)
    rotary_cache_(
        case.q.clone(),
        *(case.k, case.v, case.cos, case.sin),
        *(layer.keys, layer.values, layer.cumulative_length),
        backend=backend,
    )
    assert layer.get_seq_length().item() == shape.seq_len
    part = (whole.keys[1:], whole.values[1:], whole.length)
    rotary_cache_(case.q, case.k, case.v, case.cos, case.sin, *part, backend=backend)
    assert_equal(whole.keys[1:], layer.keys)
    assert_equal(whole.values[1:], layer.values)
    assert not whole.keys[0].any()


@each_backend
def test_a_full_cache_refuses_and_stays_as_it_was(backend: str) -> None:
    shape = SHAPES[1]
    cache = Cache.of(shape, 8, torch.float32, "cpu")
    case = make(shape)
    rotary_cache_(*(case.q, case.k, case.v, case.cos, case.sin), *vars(cache).values())
    case = make(shape)
    tensors = (case.q, case.k, case.v, case.cos, case.sin, *vars(cache).values())
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError, match=r"holds 5 of 8 positions and cannot take 5 more"):
        rotary_cache_(*tensors, backend=backend)
    for a, b in zip(tensors, before, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("rows_of_cos", ["each", "all"])
@few_shapes
def test_gradcheck(shape: Shape, rows_of_cos: str) -> None:
    shape = replace(shape, batch=2, seq_len=1, heads=2, kv_heads=1)
    case = make(shape, torch.float64, rows_of_cos=rows_of_cos)
    q, k = leaves((case.q, case.k))
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, case.cos, case.sin), (q, k))


@each_layout
@few_shapes
def test_opcheck(shape: Shape, layout: str, device: str) -> None:
    case = make(replace(shape, seq_len=3), device=device, layout=layout)
    ops = registered(device)
    for transpose in (False, True):
        torch.library.opcheck(ops.rotary.default, (*case.tensors, transpose))
    q, k = leaves((case.q, case.k))
    torch.library.opcheck(ops.rotary.default, (q, k, case.cos, case.sin, False))
    torch.library.opcheck(ops.rotary_.default, case.tensors)
    cache = Cache.of(shape, 9, torch.float32, device)
    tensors = (case.q, case.k, case.v, case.cos, case.sin, *vars(cache).values())
    torch.library.opcheck(ops.rotary_cache_.default, tensors)


@few_shapes
def test_compile(shape: Shape, device: str) -> None:
    case = make(shape, device=device)
    compiled = compile_whole(rotary)
    for a, b in zip(compiled(*case.tensors), rotary(*case.tensors), strict=True):
        assert_equal(a, b)
    for a, b in zip(grads_of(compiled, case.tensors), grads_of(rotary, case.tensors), strict=True):
        assert_equal(a, b)


def test_compile_in_place(device: str) -> None:
    shape = SHAPES[1]
    case, cache = make(shape, device=device), Cache.of(shape, 9, torch.float32, device)

    def function(q, k, v, cos, sin, keys, values, length):
        rotary_cache_(q, k, v, cos, sin, keys, values, length)
        rotary_(q, k, cos, sin)

    tensors = (case.q, case.k, case.v, case.cos, case.sin, *vars(cache).values())
    others = [t.clone() for t in tensors]
    with torch.no_grad():
        compile_whole(function)(*tensors)
        function(*others)
    for a, b in zip(tensors, others, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("dtype", LOW)
def test_calls_are_counted(dtype: torch.dtype, device: str) -> None:
    case = make(SHAPES[0], dtype, device)
    with count_ops() as calls, torch.no_grad():
        rotary(*case.tensors)
        rotary_(*case.tensors)
    assert dict(calls) == {"hf_fuse::rotary": 1, "hf_fuse::rotary_": 1}


@each_backend
def test_in_place_forms_refuse_what_needs_a_gradient(backend: str, device: str) -> None:
    shape = SHAPES[0]
    case, cache = make(shape, device=device), Cache.of(shape, 9, torch.float32, device)
    case.k.requires_grad_()
    with pytest.raises(RuntimeError, match=r"rotary_: works in place and has no gradient"):
        rotary_(*case.tensors, backend=backend)
    tensors = (case.q, case.k, case.v, case.cos, case.sin, *vars(cache).values())
    with pytest.raises(RuntimeError, match=r"rotary_cache_: works in place and has no gradient"):
        rotary_cache_(*tensors, backend=backend)
    with torch.no_grad():
        rotary_cache_(*tensors, backend=backend)


# name of the tensor, what becomes of it, what is said
ERRORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "int_q": ("q", Tensor.long, r"q must be .*float.*got .*int64"),
    "three_dimensions": ("q", lambda t: t[0], r"q must be .*\[batch, heads, seq_len, head_dim\]"),
    "half_k": ("k", Tensor.half, r"k must .*float32.*got .*float16"),
    "half_cos": ("cos", Tensor.half, r"cos must .*float32.*got .*float16"),
    "half_sin": ("sin", Tensor.half, r"sin must .*float32.*got .*float16"),
    "short_k": (
        "k",
        lambda t: t[:, :, 1:],
        r"k must have the batch, seq_len and head_dim of q, \[2, 4, 5, 80\], got \[2, 4, 4, 80\]",
    ),
    "short_cos": ("cos", lambda t: t[:, 1:], r"(cos|sin) .*must .*\[2, 4, 20\]"),
    "wrong_batch": ("both", lambda t: t.repeat(2, 1, 1), r"cos .*must .*\[4, 5, 20\]"),
    "flat_cos": ("both", lambda t: t[0], r"cos .*must .*\[5, 20\]"),
    "odd_rotary_dim": ("both", lambda t: t[..., 1:], r"rotary_dim.* must be even .*got 19"),
    "wide_rotary_dim": (
        "both",
        lambda t: t.repeat(1, 1, 5),
        r"rotary_dim.* at most head_dim 80, got 100",
    ),
}


@each_backend
@pytest.mark.parametrize("function", [rotary, rotary_])
@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_tensor(case: str, function: Callable, backend: str, device: str) -> None:
    name, change, message = ERRORS[case]
    made = make(SHAPES[0], device=device)
    tensors = dict(zip(("q", "k", "cos", "sin"), made.tensors, strict=True))
    for changed in ("cos", "sin") if name == "both" else (name,):
        tensors[changed] = change(tensors[changed])
    with pytest.raises(RuntimeError, match=rf"hf_fuse rotary_?: .*{message}"):
        function(**tensors, backend=backend)


CACHE_ERRORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "half_v": ("v", Tensor.half, r"v must .*float32.*got .*float16"),
    "wrong_v": ("v", lambda t: t[:, :1], r"v must .*\[2, 4, 5, 80\].*got .*\[2, 1, 5, 80\]"),
    "half_cache": ("keys", Tensor.half, r"key_cache must .*float32.*got .*float16"),
    "wrong_cache": ("both", lambda t: t[:, :1], r"key_cache must .*got .*\[2, 1, 9, 80\]"),
    "two_caches": ("values", lambda t: t[:, :, 1:], r"value_cache must .*got .*\[2, 4, 8, 80\]"),
    "int32_length": ("length", Tensor.int, r"length must be one int64 .*got .*int32"),
    "two_lengths": ("length", lambda t: t.repeat(2), r"length must be one int64 .*got .*\[2\]"),
}


@each_backend
@pytest.mark.parametrize("case", CACHE_ERRORS)
def test_cache_errors_name_the_tensor(case: str, backend: str, device: str) -> None:
    name, change, message = CACHE_ERRORS[case]
    made = make(SHAPES[0], device=device)
    tensors = {"v": made.v, **vars(Cache.of(SHAPES[0], 9, torch.float32, device))}
    for changed in ("keys", "values") if name == "both" else (name,):
        tensors[changed] = change(tensors[changed])
    with pytest.raises(RuntimeError, match=rf"hf_fuse rotary_cache_: {message}"):
        rotary_cache_(
            *(made.q, made.k, tensors["v"], made.cos, made.sin),
            *(tensors["keys"], tensors["values"], tensors["length"]),
            backend=backend,
        )


@pytest.mark.parametrize("function", [rotary, rotary_])
def test_unknown_backend(function: Callable, device: str) -> None:
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*got 'tpu'"):
        function(*make(SHAPES[0], device=device).tensors, backend="tpu")


@pytest.mark.cuda
@each_backend
@pytest.mark.parametrize("index", [1, 2, 3], ids=["k", "cos", "sin"])
def test_tensors_on_two_devices(index: int, backend: str) -> None:
    name = ("q", "k", "cos", "sin")[index]
    for device, other in (("cuda", "cpu"), ("cpu", "cuda")):
        tensors = list(make(SHAPES[0], device=device).tensors)
        tensors[index] = tensors[index].to(other)
        with pytest.raises(RuntimeError, match=rf"{name} must .*{device}.*got .*{other}"):
            rotary(*tensors, backend=backend)
