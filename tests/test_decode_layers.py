"""decode_layers: GPT-2's step as one kernel, against the chain of kernels and the float64 model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import relative_error
from models import REAL_SHAPES, Case
from torch import Tensor

import hf_fuse
from hf_fuse import ops
from hf_fuse.decode.engine import DecodeEngine
from hf_fuse.decode.obstacles import spec_of
from hf_fuse.decode.stack import Stack
from hf_fuse.ops.decode_layers import Layer, layer_table, suits, workspace

pytestmark = pytest.mark.cuda
GPT2_SHAPES = tuple(case for case in REAL_SHAPES if case.model_type == "gpt2")
SMALL = GPT2_SHAPES[0]
STEPS = 6
each_shape = pytest.mark.parametrize("case", GPT2_SHAPES, ids=lambda case: case.id)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("decode_layers needs sm_90")


def changed(case: Case, **changes: Any) -> Case:
    return replace(case, changes={**case.changes, **changes})


def engine_of(case: Case, dtype: torch.dtype, capacity: int) -> DecodeEngine:
    model = case.build(dtype=dtype, device="cuda")
    return DecodeEngine(spec_of(hf_fuse.patch(model)), 1, capacity)


def steps(engine: DecodeEngine, ids: Tensor, padding: int = 0) -> Tensor:
    """The logits of the last STEPS tokens of `ids`, each by a step."""
    start = torch.tensor([padding])
    engine.begin((), 0)
    engine.prepare(select=False)
    engine.prefill(ids[:, :-STEPS], start)
    rows = []
    for token in ids[0, -STEPS:]:
        engine.put(token[None])
        engine.advance(select=False)
        rows.append(engine.logits.clone())
    torch.cuda.synchronize()
    return torch.cat(rows)


@dataclass
class Layers:
    """A call of the op without a model, and what it is given by address."""

    layers: list[Layer]
    arguments: dict[str, Any]

    def __call__(self) -> Tensor:
        ops.decode_layers(**self.arguments)
        return self.arguments["residual"]


def make_layers(size: int, length: int) -> Layers:
    """Three layers in bfloat16 after `length` tokens, of which 3 are padding."""
    torch.manual_seed(0)
    heads, capacity = size // 64, length + 1

    def random(*shape: int, scale: float = 0.05) -> Tensor:
        return (torch.randn(shape, device="cuda") * scale).bfloat16()

    def norm_and(rows: int) -> tuple[Tensor, ...]:
        return random(size, scale=0.3) + 1, random(size), random(rows, size), random(rows)

    def layer() -> Layer:
        caches = (random(1, heads, capacity, 64, scale=1) for _ in range(2))
        return Layer(
            *norm_and(3 * size), random(size, size), random(size),
            *norm_and(4 * size), random(size, 4 * size), random(size), *caches,
        )  # fmt: skip

    layers, table = [layer() for _ in range(3)], random(50, size, scale=1)
    assert suits(table, layers, heads)
    token, at, start = (torch.tensor([i], device="cuda") for i in (7, length, 3))
    arguments = {
        "residual": torch.empty(1, size, device="cuda"),
        "scratch": workspace(size, table.device),
        "layers": layer_table(layers),
        "token": token,
        "table": table,
        "positions": random(capacity, size, scale=1),
        "length": at,
        "start": start,
    }
    sizes = {"num_heads": heads, "middle": 4 * size, "capacity": capacity}
    return Layers(layers, {**arguments, **sizes, "eps": 1e-5, "scaling": 0.125, "act": "gelu_tanh"})


def without_stack(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(Stack, "of", lambda *arguments: None)
        return make()


def names(engine: DecodeEngine) -> list[str]:
    return [kernel.name for kernel in engine.kernels]


def some_tokens(length: int, vocab: int = 4096) -> Tensor:
    torch.manual_seed(3)
    return torch.randint(vocab, (1, length), device="cuda")


@each_dtype
@pytest.mark.parametrize(
    ("length", "padding"), [(8, 0), (STEPS + 1, 0), (40, 7), (277, 0), (700, 33)]
)
@each_shape
def test_step_against_the_float64_model(
    case: Case, length: int, padding: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = some_tokens(length)
    engine = engine_of(case, dtype, length + 10)
    assert names(engine) == ["embed, layers", "norm, head"]
    logits = steps(engine, ids, padding)
    again = steps(engine, ids, padding)
    assert torch.equal(logits, again)

    chain = without_stack(monkeypatch, lambda: engine_of(case, dtype, length + 10))
    assert len(names(chain)) == 2 + 5 * len(chain.spec.layers)
    expected = steps(chain, ids, padding)
    model = case.build(dtype=dtype, device="cuda").double()
    with torch.no_grad():
        truth = model(ids[:, padding:]).logits[0, -STEPS:]
    assert relative_error(logits, truth) <= 2 * relative_error(expected, truth)
    for own, other in zip(
        (*engine.keys, *engine.values), (*chain.keys, *chain.values), strict=True
    ):
        same = slice(padding, length)
        assert relative_error(own[:, :, same], other[:, :, same].double()) < 0.02


@each_dtype
def test_generate_by_one_kernel_as_by_the_chain(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take the same token wherever the chain's two best differ by more than rounding."""
    ids = some_tokens(30)
    model = hf_fuse.patch(SMALL.build(dtype=dtype, device="cuda"))
    options = {"max_new_tokens": 40, "do_sample": False, "output_logits": True}
    kept = {**options, "return_dict_in_generate": True, "pad_token_id": 0}
    own = model.generate(ids, **kept)
    hf_fuse.unpatch(model)
    other = without_stack(monkeypatch, lambda: hf_fuse.patch(model).generate(ids, **kept))
    for i, (a, b) in enumerate(zip(own.logits, other.logits, strict=True)):
        best = b.topk(2).values[0]
        if own.sequences[0, 30 + i] != other.sequences[0, 30 + i]:
            assert best[0] - best[1] < 0.05 * b.std()
            return
        assert relative_error(a, b.double()) < 0.05


@pytest.mark.parametrize("where", ["embedding", "weight", "large"])
def test_what_is_no_number_stays_none(where: str) -> None:
    model = SMALL.build(dtype=torch.bfloat16, device="cuda")
    block = model.transformer.h[1]
    with torch.no_grad():
        if where == "embedding":
            model.transformer.wpe.weight[:] = torch.nan
        elif where == "weight":
            block.mlp.c_proj.weight[3, 5] = torch.nan
        else:
            block.attn.c_proj.weight[:] = 1e6
    engine = DecodeEngine(spec_of(hf_fuse.patch(model)), 1, 40)
    assert names(engine)[0] == "embed, layers"
    ids = some_tokens(20)
    assert steps(engine, ids).isnan().all()
    assert steps(engine, ids).isnan().all()


def test_a_result_that_is_no_number_leaves_no_trace() -> None:
    model = SMALL.build(dtype=torch.bfloat16, device="cuda")
    engine = DecodeEngine(spec_of(hf_fuse.patch(model)), 1, 40)
    ids = some_tokens(20)
    before = steps(engine, ids)
    weight = engine.spec.layers[0].mlp_out.weights[0]
    kept = weight.clone()
    weight.fill_(torch.nan)
    assert steps(engine, ids).isnan().all()
    weight.copy_(kept)
    assert torch.equal(steps(engine, ids), before)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (SMALL, torch.float32),
        (changed(SMALL, n_head=6), torch.bfloat16),
        (changed(SMALL, scale_attn_by_inverse_layer_idx=True), torch.bfloat16),
        (changed(SMALL, n_embd=96, n_head=6), torch.bfloat16),
        (changed(SMALL, n_inner=100), torch.bfloat16),
        (changed(SMALL, n_embd=2048, n_head=32), torch.bfloat16),
    ],
    ids=["float32", "heads of 128", "scaled by layer", "heads of 16", "odd middle", "too large"],
)
def test_what_does_not_suit_it_is_a_chain(case: Case, dtype: torch.dtype) -> None:
    engine = engine_of(case, dtype, 40)
    assert names(engine)[0] == "embed"
    assert steps(engine, some_tokens(20)).isfinite().all()


def test_several_sequences_are_a_chain() -> None:
    model = SMALL.build(dtype=torch.bfloat16, device="cuda")
    engine = DecodeEngine(spec_of(hf_fuse.patch(model)), 2, 40)
    assert names(engine)[0] == "embed"


def test_suits_by_addresses_and_shapes() -> None:
    engine = engine_of(SMALL, torch.bfloat16, 40)
    spec = engine.spec
    stack = Stack.of(spec, engine.keys, engine.values, "auto")
    assert stack is not None
    layer, *others = stack.layers
    odd = torch.empty(layer.mlp_in.numel() + 1, dtype=torch.bfloat16, device="cuda")[1:]
    for wrong in (
        layer._replace(mlp_in=odd.view_as(layer.mlp_in)),
        layer._replace(qkv=layer.qkv[:-1]),
        layer._replace(mlp_out=layer.mlp_out.T),
        layer._replace(qkv_bias=layer.qkv_bias.float()),
    ):
        assert not suits(spec.embedding, (wrong, *others), spec.num_heads)
    assert not suits(spec.embedding, stack.layers, spec.num_heads, backend="reference")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": lambda r: r.half()}, "residual must be float32"),
        ({"residual": lambda r: r[:, 1:]}, "residual must be a contiguous"),
        ({"scratch": lambda s: s[1:]}, "workspace must be"),
        ({"token": lambda t: t.int()}, "token must be 1 int64"),
        ({"positions": lambda p: p.float()}, "positions must have the dtype of table"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_tensor(changes: dict, message: str) -> None:
    call = make_layers(768, 41)
    for name, change in changes.items():
        call.arguments[name] = change(call.arguments[name])
    with pytest.raises(RuntimeError, match=message):
        call()
