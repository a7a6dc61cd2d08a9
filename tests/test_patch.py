"""patch, unpatch and report: what runs, what changes, what is refused, and how a failure ends."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from answers import checkpoint
from helpers import count_ops, largest_error
from models import (
    FAMILY,
    GPT2,
    GPT_NEOX,
    GPT_NEOX_SERIAL,
    LLAMA,
    PLAIN,
    Case,
    architecture_of,
    backbone_of,
    cases,
    heads_of_16,
    layers_of,
    norms_of,
    tokens_for,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import hf_fuse
from hf_fuse import ops as fused_ops
from hf_fuse import patching
from hf_fuse.modules import STATE
from hf_fuse.patches import ARCHITECTURES, decoder, gpt_neox

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = (*PLAIN, GPT_NEOX_SERIAL)


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    inputs = inputs or {"input_ids": tokens_for(model, 2, 17)}
    with torch.no_grad():
        return model(**inputs).logits


def same(actual: Tensor, expected: Tensor) -> bool:
    return largest_error(actual, expected) < 1e-4


def exercise(model: PreTrainedModel) -> None:
    """What users do with a model: a forward with everything captured, a backward, a generate."""
    ids = tokens_for(model, 2, 9)
    output = model(input_ids=ids, labels=ids, output_hidden_states=True)
    output.loss.backward()
    model.zero_grad(set_to_none=True)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)


# What runs


class Recorder(TorchDispatchMode):
    """Keeps every op call below autograd: its name and its arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [a.name for a in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        self.calls.append((func._schema.name, given))
        return func(*args, **(kwargs or {}))

    def named(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]


def residual_adds(recorder: Recorder, shape: tuple[int, ...]) -> int:
    """Adds to a [batch, seq_len, hidden_size] float tensor that ran on their own."""
    adds = recorder.named("aten::add") + recorder.named("aten::add_")
    sides = [(a["self"], a["other"]) for a in adds]
    return sum(
        any(isinstance(t, Tensor) and t.shape == shape and t.is_floating_point() for t in pair)
        for pair in sides
    )


# For L layers: how many add_norm calls have so many deltas and so many norms.
SEQUENTIAL = {(0, 1): lambda layers: 1, (1, 1): lambda layers: 2 * layers}
PARALLEL = {(0, 2): lambda layers: 1, (2, 2): lambda layers: layers - 1, (2, 1): lambda layers: 1}
MIDDLE = {"llama": "gated_act", "gpt_neox": "bias_act", "gpt2": "bias_act"}


@pytest.mark.parametrize("mode", ["no_grad", "inference", "eval", "train"])
@pytest.mark.parametrize("num_layers", [1, 4])
@cases(EVERY)
def test_every_add_and_norm_is_fused(case: Case, num_layers: int, mode: str, device: str) -> None:
    model = case.build(device=device, num_hidden_layers=num_layers).train(mode == "train")
    ids = tokens_for(model, 2, 11)
    shape = (2, 11, model.config.hidden_size)
    parallel = getattr(layers_of(model)[0], "use_parallel_residual", False)
    in_embedding = 1 if case.model_type == "gpt2" else 0  # tokens + positions
    grad = mode in ("eval", "train")

    def run() -> tuple[Recorder, Tensor]:
        with (
            Recorder() as recorder,
            torch.set_grad_enabled(grad),
            torch.inference_mode(mode == "inference"),
        ):
            output = model(input_ids=ids, use_cache=False).logits
        return recorder, output

    unpatched, _ = run()
    assert residual_adds(unpatched, shape) == 2 * num_layers + in_embedding

    hf_fuse.patch(model)
    patched, output = run()
    calls = patched.named("hf_fuse::add_norm")
    counts = Counter((deltas_of(c), norm_count_of(c)) for c in calls)
    wanted = {k: n(num_layers) for k, n in (PARALLEL if parallel else SEQUENTIAL).items()}
    assert counts == Counter({k: n for k, n in wanted.items() if n})
    assert residual_adds(patched, shape) == in_embedding
    assert not patched.named("aten::native_layer_norm")
    assert not patched.named("aten::rsqrt")
    assert len(patched.named(f"hf_fuse::{MIDDLE[case.model_type]}")) == num_layers
    rotary = num_layers if "rotary" in architecture_of(model).ops else 0
    assert len(patched.named("hf_fuse::rotary")) == rotary

    # Each norm once, in the order in which transformers calls them, with its own weight and bias.
    weights = [c[name] for c in calls for name in ("weight1", "weight2") if c[name] is not None]
    biases = [c[name] for c in calls for name in ("bias1", "bias2") if c[name] is not None]
    norms = norms_of(model)
    assert pointers(weights) == pointers(n.weight for n in norms)
    assert pointers(biases) == pointers(n.bias for n in norms if hasattr(n, "bias"))
    if grad:
        with count_ops() as backward:
            output.sum().backward()
        assert backward["hf_fuse::add_norm_backward"] == len(calls)
        assert backward["hf_fuse::rotary"] == rotary
        assert backward[f"hf_fuse::{MIDDLE[case.model_type]}_backward"] == num_layers


def deltas_of(call: dict[str, Any]) -> int:
    return sum(call[name] is not None for name in ("delta1", "delta2"))


def norm_count_of(call: dict[str, Any]) -> int:
    return sum(call[name] is not None for name in ("weight1", "weight2"))


def pointers(tensors: Any) -> list[int]:
    return [t.data_ptr() for t in tensors]


@cases(EVERY)
def test_every_decoding_step_is_fused(case: Case, device: str) -> None:
    model = hf_fuse.patch(heads_of_16(case).build(device=device))
    ids, new = tokens_for(model, 2, 9), 5
    with count_ops() as calls:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
    layers = len(layers_of(model))
    parallel = getattr(layers_of(model)[0], "use_parallel_residual", False)
    # A GPU runs the prompt and a step once, captures both once and replays the step; on a CPU the
    # step's ops are called twice, to see which can be recorded and to record them, then run as one.
    prompts, steps, runs = (1, 2, new - 1) if device == "cpu" else (2, 2, 0)
    assert calls["hf_fuse::run_recording"] == runs
    # the prompt's last norm goes with the head
    assert calls["hf_fuse::add_norm"] == prompts * (1 if parallel else 2) * layers
    assert calls[f"hf_fuse::{MIDDLE[case.model_type]}"] == prompts * layers
    # QKV and the MLP's first projection in one kernel, both output projections in another
    assert calls["hf_fuse::decode_linear_two"] == (steps * layers if parallel else 0)
    assert calls["hf_fuse::decode_linear_sum"] == (steps * layers if parallel else 0)
    assert calls["hf_fuse::decode_linear"] == steps * (1 if parallel else 4 * layers + 1) + prompts
    assert calls["hf_fuse::decode_attention"] == steps * layers
    assert calls["hf_fuse::decode_select"] == (new if device == "cpu" else steps + 1)


@pytest.mark.parametrize("op", fused_ops.NAMES)
@cases(PLAIN)
def test_only_the_ops_asked_for_are_fused(case: Case, op: str, device: str) -> None:
    model = case.build(device=device)
    if op not in architecture_of(model).ops:
        with pytest.raises(ValueError, match=rf"{case.model_type}.*{op}.*add_norm"):
            hf_fuse.patch(model, ops={op})
        assert not hf_fuse.is_patched(model)
        return
    before = logits(model)
    hf_fuse.patch(model, ops={op})
    with count_ops() as calls:
        assert same(logits(model), before)
    in_forward = set() if op == "decode" else {f"hf_fuse::{op}"}
    assert {name for name in calls if name.startswith("hf_fuse::")} == in_forward
    report = hf_fuse.report(model)
    assert report.ops == (op,)
    assert {m.op for m in report.modules} == {op}
    others = set(architecture_of(model).ops) - {op}
    assert {r.split(":")[0] for r in report.skipped.values()} == others
    assert all("was not asked for" in reason for reason in report.skipped.values())


@cases(PLAIN)
def test_the_reference_backend_runs_no_kernel(case: Case, device: str) -> None:
    model = case.build(device=device)
    before = logits(model)
    hf_fuse.patch(model, backend="reference")
    with count_ops() as calls:
        assert same(logits(model), before)
    assert not [name for name in calls if name.startswith("hf_fuse::")]
    assert {m.backend for m in hf_fuse.report(model).modules} == {f"the reference ({device})"}


@cases(PLAIN)
def test_the_backend_of_the_device_can_be_asked_for(case: Case, device: str) -> None:
    model = case.build(device=device)
    before = logits(model)
    hf_fuse.patch(model, backend=device)
    with count_ops() as calls:
        assert same(logits(model), before)
    assert calls["hf_fuse::add_norm"] > 0
    assert {m.backend for m in hf_fuse.report(model).modules} == {f"{device} kernels"}


# What changes, and what does not


def frozen(value: Any) -> Any:
    """`value` with its dicts and lists copied, all the way down, and everything else itself."""
    if isinstance(value, dict):
        return {k: frozen(v) for k, v in value.items()}
    if isinstance(value, list):
        return [frozen(v) for v in value]
    return value


def identical(a: Any, b: Any) -> bool:
    """The very same objects under the same keys in the same order."""
    if type(a) is dict and type(b) is dict:
        return list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    if type(a) is list and type(b) is list:
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, MethodType):  # made anew at each look
        return a == b
    return a is b


class Before:
    """Everything of a model that a patch could have changed, to compare with afterwards."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        exercise(model)  # transformers sets some attributes at the first use
        self.logits = logits(model)
        self.config = model.config.to_dict()
        self.modules = self._modules()
        self.state = {n: (t, t.detach().clone()) for n, t in self._state().items()}
        self.addresses = pointers(self._state().values())
        # The engine has a Conv1D's rows laid out anew, and unpatch lays them back: at a new place.
        self.moving = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)}

    def _modules(self) -> dict[str, tuple[type, Any]]:
        return {n: (type(m), frozen(m.__dict__)) for n, m in self.model.named_modules()}

    def _state(self) -> dict[str, Tensor]:
        return self.model.state_dict(keep_vars=True)

    def assert_unchanged(self) -> None:
        for name, (kind, attributes) in self._modules().items():
            assert kind is self.modules[name][0], name
            assert identical(attributes, self.modules[name][1]), name
        assert list(self._modules()) == list(self.modules)
        assert list(self._state()) == list(self.state)
        for name, tensor in self._state().items():
            assert tensor is self.state[name][0], name
            assert torch.equal(tensor, self.state[name][1]), name
        for (name, tensor), address in zip(self._state().items(), self.addresses, strict=True):
            assert name in self.moving or tensor.data_ptr() == address, name
            assert tensor.stride() == self.state[name][1].stride(), name
        assert self.model.config.to_dict() == self.config
        assert not hf_fuse.is_patched(self.model)
        assert torch.equal(logits(self.model), self.logits)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"ops": ["add_norm"]}, {"backend": "reference"}, {"verify": False}],
    ids=["default", "one_op", "reference", "unverified"],
)
@cases(EVERY, FAMILY)
def test_unpatch_restores_everything(case: Case, arguments: dict, device: str) -> None:
    model = case.build(device=device)
    before = Before(model)
    assert hf_fuse.patch(model, **arguments) is model
    assert hf_fuse.is_patched(model)
    assert list(model.state_dict()) == list(before.state)
    exercise(model)
    assert hf_fuse.unpatch(model) is model
    before.assert_unchanged()
    hf_fuse.unpatch(model)  # nothing to do
    before.assert_unchanged()


class Failure(Exception):
    """What the tests raise in the middle of a patch."""


def _raise_at(function: Callable, count: int, error: BaseException) -> Callable:
    """`function`, until its call number `count`, which raises."""
    seen = iter(range(count))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(seen, None) is None:
            raise error
        return function(*args, **kwargs)

    return wrapper


def _wrong_norm(change: Callable[[Tensor], Tensor]) -> Callable:
    right = fused_ops.add_norm

    def wrong(*args: Any, **kwargs: Any) -> Any:
        residual, row, row2 = right(*args, **kwargs)
        return residual, change(row), row2

    return wrong


FAILURES: dict[str, tuple[Any, str, Callable[[], Callable], type[BaseException], str]] = {
    # where, what, what it becomes, the error, its message
    "swap": (
        patching,
        "_swap",
        lambda: _raise_at(patching._swap, 11, Failure("half-way")),
        Failure,
        "half-way",
    ),
    "interrupt": (
        patching,
        "_swap",
        lambda: _raise_at(patching._swap, 11, KeyboardInterrupt()),
        KeyboardInterrupt,
        "",
    ),
    "link": (
        patching,
        "_link_norms",
        lambda: _raise_at(patching._link_norms, 0, Failure("no link")),
        Failure,
        "no link",
    ),
    "verify": (
        patching,
        "compare",
        lambda: _raise_at(patching.compare, 0, hf_fuse.VerificationError("differs")),
        hf_fuse.VerificationError,
        "differs",
    ),
    "raising_kernel": (
        fused_ops,
        "add_norm",
        lambda: _raise_at(fused_ops.add_norm, 3, Failure("launch failed")),
        Failure,
        "launch failed",
    ),
    "wrong_kernel": (
        fused_ops,
        "add_norm",
        lambda: _wrong_norm(lambda row: row * 1.01),
        hf_fuse.VerificationError,
        "differs from the unpatched one's by .* more than 1e-03",
    ),
    "nan_kernel": (
        fused_ops,
        "add_norm",
        lambda: _wrong_norm(lambda row: row / 0),
        hf_fuse.VerificationError,
        "NaN or Inf",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
@cases(EVERY, FAMILY)
def test_a_patch_that_fails_half_way_leaves_no_trace(
    case: Case, failure: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.build(device=device)
    before = Before(model)
    where, name, replacement, error, message = FAILURES[failure]
    with monkeypatch.context() as patched:
        patched.setattr(where, name, replacement())
        with pytest.raises(error, match=message):
            hf_fuse.patch(model)
    before.assert_unchanged()
    assert same(logits(hf_fuse.patch(model)), before.logits)


@cases((LLAMA, GPT_NEOX))
def test_a_patch_that_loses_the_cache_is_refused(
    case: Case, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one would that knows the cache by a name of another release of transformers."""
    model = case.build(device=device)
    before = Before(model)
    attention = decoder if case is LLAMA else gpt_neox
    right = attention.rotate_and_cache

    def without_cache(attention: Any, q: Tensor, k: Tensor, v: Tensor, at: Any, *_: Any) -> Any:
        return right(attention, q, k, v, at, None)

    monkeypatch.setattr(attention, "rotate_and_cache", without_cache)
    with pytest.raises(hf_fuse.VerificationError, match="differs from the unpatched one's"):
        hf_fuse.patch(model)
    before.assert_unchanged()


def test_a_second_patch_that_fails_leaves_the_first(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hf_fuse.patch(LLAMA.build(device=device), ops=["rotary"])
    before, report = logits(model), hf_fuse.report(model)
    with monkeypatch.context() as patched:
        patched.setattr(fused_ops, "add_norm", _wrong_norm(lambda row: row * 1.01))
        with pytest.raises(hf_fuse.VerificationError):
            hf_fuse.patch(model)
    assert torch.equal(logits(model), before)
    assert hf_fuse.report(model) == report
    wrong = "cuda" if device == "cpu" else "cpu"
    with pytest.raises(ValueError, match=wrong):
        hf_fuse.patch(model, backend=wrong)
    assert hf_fuse.report(model) == report


def transformers_state() -> Iterator[tuple[str, dict]]:
    """The globals of the modules a patch could reach, and the attributes of their classes."""
    names = [a.backbone.__module__ for a in ARCHITECTURES]
    names += [f"transformers.{m}" for m in ("modeling_layers", "modeling_utils", "activations")]
    names += ["transformers.cache_utils", "transformers.pytorch_utils", "torch.nn.functional"]
    names += ["torch.nn.modules.normalization", "torch.nn.modules.module"]
    for name in names:
        module = importlib.import_module(name)
        yield name, dict(vars(module))
        for class_name, kind in inspect.getmembers(module, inspect.isclass):
            yield f"{name}.{class_name}", dict(vars(kind))


@cases(EVERY, FAMILY)
def test_other_models_and_transformers_are_untouched(case: Case, device: str) -> None:
    model, other = case.build(device=device), case.build(device=device)
    exercise(model)
    bystander, library = Before(other), dict(transformers_state())
    hf_fuse.patch(model)
    exercise(model)
    for name, attributes in transformers_state():
        assert attributes.keys() == library[name].keys(), name
        changed = [k for k, v in attributes.items() if v is not library[name][k]]
        assert not changed, name
    bystander.assert_unchanged()
    assert not hf_fuse.is_patched(case.build(device=device))


def test_patch_disturbs_neither_random_state_nor_modes_nor_gradients(device: str) -> None:
    model = GPT2.build(device=device, resid_pdrop=0.5).train()
    model.transformer.h[1].eval()
    ids = tokens_for(model, 2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    modes = {name: m.training for name, m in model.named_modules()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: g.clone() for name, g in grads.items()}
    state = torch.random.get_rng_state()
    hf_fuse.patch(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name: m.training for name, m in model.named_modules()} == modes
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
        assert torch.equal(parameter.grad, copies[name])


def test_patching_again_does_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_fuse.patch(LLAMA.build(device=device))
    states = [m.__dict__.get(STATE) for m in model.modules()]
    monkeypatch.setattr(patching, "snapshot", _raise_at(patching.snapshot, 0, Failure()))
    hf_fuse.patch(model)
    hf_fuse.patch(model, ops=fused_ops.NAMES, backend="auto")
    assert [m.__dict__.get(STATE) for m in model.modules()] == states


@cases(PLAIN)
def test_patching_with_other_arguments_patches_anew(case: Case, device: str) -> None:
    model = case.build(device=device)
    before = Before(model)
    hf_fuse.patch(model, ops=["add_norm"])
    hf_fuse.patch(model)
    assert set(hf_fuse.report(model).ops) == set(architecture_of(model).ops)
    hf_fuse.patch(model, ops=["add_norm"], backend="reference")
    report = hf_fuse.report(model)
    assert report.ops == ("add_norm",)
    assert {m.backend for m in report.modules} == {f"the reference ({device})"}
    hf_fuse.unpatch(model)
    before.assert_unchanged()


@cases(PLAIN)
def test_patched_is_for_the_block(case: Case, device: str) -> None:
    model = case.build(device=device)
    before = Before(model)
    with hf_fuse.patched(model, ops=["add_norm"]) as inside:
        assert inside is model
        assert hf_fuse.report(model).ops == ("add_norm",)
        with hf_fuse.patched(model):
            assert set(hf_fuse.report(model).ops) == set(architecture_of(model).ops)
        assert hf_fuse.report(model).ops == ("add_norm",)
        with hf_fuse.patched(model, ops=["add_norm"]):  # as it is
            assert hf_fuse.is_patched(model)
        assert hf_fuse.is_patched(model)
    before.assert_unchanged()


def test_patched_ends_with_an_exception_too(device: str) -> None:
    model = LLAMA.build(device=device)
    before = Before(model)
    with pytest.raises(Failure), hf_fuse.patched(model):
        raise Failure
    before.assert_unchanged()


def test_nothing_of_a_forward_outlives_it(device: str) -> None:
    """The row on a residual tensor and the tensor's graph must not keep each other alive."""
    model = hf_fuse.patch(LLAMA.build(device=device))
    kept = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda m, a, output: kept.append(weakref.ref(output)))
    gc.disable()
    try:
        model(input_ids=tokens_for(model, 2, 9)).logits.sum().backward()
        alive = [ref for ref in kept if ref() is not None]
    finally:
        gc.enable()
    assert len(kept) == len(layers_of(model))
    assert not alive


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ops": "add_norm"}, TypeError, "collection of names.*got the string 'add_norm'"),
        ({"ops": ["add_norm", "soft_max"]}, ValueError, "add_norm, rotary.*got .*soft_max"),
        ({"ops": []}, ValueError, "got none"),
        ({"backend": "tpu"}, ValueError, "auto, cuda, cpu, reference, got 'tpu'"),
    ],
    ids=["string", "unknown_op", "no_op", "unknown_backend"],
)
def test_wrong_arguments(arguments: dict, error: type, message: str, device: str) -> None:
    model = LLAMA.build(device=device)
    before = Before(model)
    with pytest.raises(error, match=message):
        hf_fuse.patch(model, **arguments)
    before.assert_unchanged()


@cases(PLAIN)
def test_a_backend_that_does_not_fit_the_device(case: Case, device: str) -> None:
    model = case.build(device=device)
    before = Before(model)
    other = "cuda" if device == "cpu" else "cpu"
    with pytest.raises(ValueError, match=f"'{other}' was asked for, but the model is on {device}"):
        hf_fuse.patch(model, backend=other)
    before.assert_unchanged()


@pytest.mark.parametrize("thing", [None, "gpt2", LLAMA, nn.Linear], ids=repr)
def test_what_is_no_module_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got"):
        hf_fuse.patch(thing)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=9, hidden_size=8, **sizes)).eval()
    ids = torch.arange(8)[None]
    before = model(input_ids=ids).last_hidden_state
    with pytest.raises(hf_fuse.UnsupportedModelError, match="BertModel") as error:
        hf_fuse.patch(model)
    assert all(name in str(error.value) for name in hf_fuse.supported())
    assert hf_fuse.patch(model, strict=False) is model
    assert not hf_fuse.is_patched(model)
    assert "not patched" in str(hf_fuse.report(model))
    assert torch.equal(model(input_ids=ids).last_hidden_state, before)


def test_cross_attention_is_refused_with_a_reason(device: str) -> None:
    model = GPT2.build(device=device, add_cross_attention=True)
    before = Before(model)
    with pytest.raises(hf_fuse.UnsupportedModelError, match=r"GPT2Model.*add_cross_attention"):
        hf_fuse.patch(model)
    before.assert_unchanged()
    hf_fuse.patch(model, strict=False)
    before.assert_unchanged()
    assert "add_cross_attention" in str(hf_fuse.report(model))


def test_the_parts_that_can_be_patched_are(device: str) -> None:
    parts = {
        "a": LLAMA.build(device=device),
        "b": GPT2.build(device=device, add_cross_attention=True),
        "c": GPT_NEOX.build(device=device),
    }
    model, before = nn.ModuleDict(parts), {n: logits(m) for n, m in parts.items()}
    with pytest.raises(hf_fuse.UnsupportedModelError, match=r"b\.transformer"):
        hf_fuse.patch(model)
    assert not hf_fuse.is_patched(model)
    hf_fuse.patch(model, strict=False)
    assert {n: hf_fuse.is_patched(m) for n, m in parts.items()} == {
        "a": True,
        "b": False,
        "c": True,
    }
    assert all(same(logits(m), before[n]) for n, m in parts.items())
    assert "add_cross_attention" in hf_fuse.report(model).skipped["b.transformer"]
    hf_fuse.unpatch(model)
    assert all(torch.equal(logits(m), before[n]) for n, m in parts.items())


@cases(PLAIN)
def test_an_unknown_activation_is_left_alone_and_reported(case: Case, device: str) -> None:
    name = "activation_function" if case.model_type == "gpt2" else "hidden_act"
    model = case.build(device=device, **{name: "mish"})
    before = logits(model)
    hf_fuse.patch(model)
    with count_ops() as calls:
        assert same(logits(model), before)
    assert calls["hf_fuse::add_norm"] > 0
    assert calls[f"hf_fuse::{MIDDLE[case.model_type]}"] == 0
    report = hf_fuse.report(model)
    assert len(report.skipped) == len(layers_of(model))
    assert all("activation" in r and "gelu_tanh" in r for r in report.skipped.values())
    assert "left alone" in str(report)


class Wrapper:
    """What FSDP2 mixes into the classes of the layers it wraps."""


def wrap_layers(model: nn.Module) -> None:
    for layer in layers_of(model):
        kind = type(layer)
        layer.__class__ = type(f"Wrapped{kind.__name__}", (Wrapper, kind), {})


@cases(PLAIN)
def test_layers_wrapped_by_others_are_not_lost(case: Case, device: str) -> None:
    model = case.build(device=device)
    before = logits(model)
    wrap_layers(model)
    with pytest.raises(hf_fuse.UnsupportedModelError, match="patch before wrapping"):
        hf_fuse.patch(model)
    assert all(isinstance(layer, Wrapper) for layer in layers_of(model))

    model = hf_fuse.patch(case.build(device=device))
    wrap_layers(model)
    with count_ops() as calls:
        assert same(logits(model), before)
    assert calls["hf_fuse::add_norm"] > 0
    with pytest.raises(RuntimeError, match="undo that first"):
        hf_fuse.unpatch(model)
    assert all(isinstance(layer, Wrapper) for layer in layers_of(model))
    assert hf_fuse.is_patched(model)
    assert all(STATE in norm.__dict__ for norm in norms_of(model))


# What is told


@cases(PLAIN)
def test_the_report_names_what_was_done(case: Case, device: str) -> None:
    model = case.build(device=device)
    assert str(hf_fuse.report(model)) == f"{type(model).__name__}: not patched by hf_fuse"
    names = {id(m): (n, type(m).__name__) for n, m in model.named_modules()}
    hf_fuse.patch(model)
    logits(model)
    report = hf_fuse.report(model)
    facts = json.loads(json.dumps(report.to_dict()))
    assert (facts["model"], facts["model_type"]) == (type(model).__name__, case.model_type)
    assert facts["patched"] is True
    assert set(facts["ops"]) == set(architecture_of(model).ops)
    assert "relative difference" in facts["verified"]
    modules = {m["name"]: m for m in facts["modules"]}
    for module in (*layers_of(model), *norms_of(model)):
        name, original = names[id(module)]
        told = modules[name]
        assert (told["original"], told["op"]) == (original, "add_norm")
        assert told["fused"] == type(module).__qualname__ != original
        assert told["backend"] == f"{device} kernels"
        assert original in str(report)
        assert told["fused"] in str(report)
    assert facts["skipped"] == {}
    assert facts["versions"]["torch"] == torch.__version__
    assert f"{device} kernels" in str(report)
    assert all(op in str(report) for op in facts["ops"])


def test_the_report_tells_of_calls_left_to_transformers(device: str) -> None:
    model = hf_fuse.patch(GPT2.build(device=device).train())
    checkpoint(model, reentrant=False)
    ids = tokens_for(model, 2, 9)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    report = hf_fuse.report(model)
    reason = next(r for r in report.left_to_transformers if "gradient checkpointing" in r)
    assert report.left_to_transformers[reason] >= len(layers_of(model))
    assert reason in str(report)


def test_supported_lists_architectures_and_ops() -> None:
    listed = hf_fuse.supported()
    assert set(listed) == {case.model_type for case in (*PLAIN, *FAMILY)}
    for case in PLAIN:
        model = hf_fuse.patch(case.build())
        assert set(hf_fuse.report(model).ops) == set(listed[case.model_type])


# Where the model comes from


@cases(PLAIN)
def test_a_compiled_model_is_unwrapped(case: Case, device: str) -> None:
    torch._dynamo.reset()
    model = case.build(device=device, num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled)
    assert hf_fuse.patch(compiled) is compiled
    assert hf_fuse.is_patched(model)
    assert same(logits(compiled), before)
    with count_ops() as calls:
        assert same(logits(model), before)
    assert calls["hf_fuse::add_norm"] > 0
    hf_fuse.unpatch(compiled)
    assert not hf_fuse.is_patched(model)
    assert torch.equal(logits(compiled), before)
    torch._dynamo.reset()


@cases(PLAIN)
def test_a_model_without_data_is_patched_unverified(case: Case, device: str) -> None:
    real = case.build(device=device)
    with torch.device("meta"):
        model = type(real)(real.config).eval()
    hf_fuse.patch(model)
    assert "not run" in hf_fuse.report(model).verified
    model.load_state_dict(real.state_dict(), assign=True)
    for name, buffer in real.named_buffers():  # the rotary table is not in the state dict
        model.get_submodule(name.rpartition(".")[0]).register_buffer(
            name.rpartition(".")[2], buffer, persistent=False
        )
    model.tie_weights()
    with count_ops() as calls:
        assert same(logits(model), logits(real))
    assert calls["hf_fuse::add_norm"] > 0


@cases(PLAIN)
def test_only_the_backbone_can_be_patched(case: Case, device: str) -> None:
    model = case.build(device=device)
    before = logits(model)
    hf_fuse.patch(backbone_of(model))
    assert hf_fuse.is_patched(model)
    assert same(logits(model), before)
    hf_fuse.unpatch(model)
    assert torch.equal(logits(model), before)


SCRIPT = """
import json, sys, warnings
sys.path.insert(0, sys.argv[1])
import torch, hf_fuse
from models import PLAIN, tokens_for

results = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for case in PLAIN:
        model = case.build()
        ids = tokens_for(model, 2, 9)
        with torch.no_grad():
            before = model(input_ids=ids).logits
            patched = hf_fuse.patch(model)(input_ids=ids).logits
            report = hf_fuse.report(model)
            restored = hf_fuse.unpatch(model)(input_ids=ids).logits
        results.append({
            "error": ((patched - before).abs().max() / before.abs().max()).item(),
            "restored": torch.equal(before, restored),
            "report": report.to_dict(),
            "text": str(report),
        })
    try:
        hf_fuse.patch(model, backend="cpu")
        refused = ""
    except RuntimeError as error:
        refused = str(error)
told = [str(w.message) for w in caught if "hf_fuse" in str(w.message)]
patched = hf_fuse.is_patched(model)
print(json.dumps({"results": results, "told": told, "refused": refused, "patched": patched}))
"""


@pytest.mark.parametrize(
    ("environment", "warnings"),
    [({"CXX": "/nonexistent/g++"}, 1), ({"CXX": "false"}, 1), ({"HF_FUSE_DISABLE": "cpu"}, 0)],
    ids=["no_compiler", "failing_compiler", "disabled"],
)
def test_without_kernels_the_reference_runs(
    environment: dict[str, str], warnings: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)],
        env=os.environ | {"HF_FUSE_CACHE": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["told"]) == warnings
    for result in told["results"]:
        assert result["error"] < 1e-4
        assert result["restored"]
        assert {m["backend"] for m in result["report"]["modules"]} == {"the reference (cpu)"}
        assert result["report"]["failures"]["cpu"] in result["text"]
    # Asked for by name, the missing kernels are an error, and the model is as it was.
    assert "could not be built" in told["refused"]
    assert not told["patched"]
