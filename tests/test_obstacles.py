"""What the decode engine cannot run: the report names it, and transformers' loop runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from answers import left_to_transformers, logits, steps_taken
from models import GPT2, LLAMA, PLAIN, Case, architecture_of, cases, heads_of_16, layers_of
from models import tokens_for as tokens
from torch import nn

import hf_fuse
from hf_fuse.decode.obstacles import spec_of
from hf_fuse.decode.spec import Unsuited

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}


class Twice(nn.Module):
    """A module of the user's own around one of the model's, with the attributes of that."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *arguments: Any, **kwargs: Any) -> Any:
        return 2 * self.inner(*arguments, **kwargs)


class Scaled(torch.Tensor):
    """What a quantised weight is: a tensor of another class."""


def mlp_name(model: nn.Module) -> str:
    (name,) = (n for n, m in model.named_modules() if m is layers_of(model)[1].mlp)
    return name


def own_mlp(model: Any) -> tuple[str, str]:
    layers_of(model)[1].mlp = Twice(layers_of(model)[1].mlp)
    return mlp_name(model), "test_obstacles.Twice"


def own_embedding(model: Any) -> tuple[str, str]:
    (name,) = (n for n, m in model.named_modules() if m is model.get_input_embeddings())
    model.set_input_embeddings(Twice(model.get_input_embeddings()))
    return name, "test_obstacles.Twice"


def own_forward(model: Any) -> tuple[str, str]:
    mlp = layers_of(model)[1].mlp
    theirs = mlp.forward
    mlp.forward = lambda x: 2 * theirs(x)
    return mlp_name(model), "a forward of its own"


def hook(model: Any) -> tuple[str, str]:
    layers_of(model)[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    return mlp_name(model), "forward hooks"


def weight_of_another_class(model: Any) -> tuple[str, str]:
    mlp = layers_of(model)[1].mlp
    name, linear = next((n, m) for n, m in mlp.named_modules() if hasattr(m, "weight"))
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Scaled), requires_grad=False)
    return f"{mlp_name(model)}.{name}", "a weight is a Scaled"


def no_mlp(model: Any) -> tuple[str, str]:
    layers_of(model)[1].mlp = nn.Identity()
    return "the model", "'Identity' object has no attribute"


OBSTACLES = (own_mlp, own_embedding, own_forward, hook, weight_of_another_class, no_mlp)


@pytest.mark.parametrize("change", OBSTACLES, ids=lambda change: change.__name__)
@cases(PLAIN)
def test_the_report_names_it_and_transformers_generates(
    case: Case, change: Callable[[Any], tuple[str, str]], device: str
) -> None:
    model = heads_of_16(case).build(device=device)
    inputs = {"input_ids": tokens(model, 2, 7), **GREEDY}
    unchanged = model.generate(**inputs).tolist()
    name, reason = change(model)
    expected = model.generate(**inputs).tolist()
    strides = [p.stride() for p in model.parameters()]
    hf_fuse.patch(model)
    found = hf_fuse.report(model).off_engine
    assert list(found) == [name]
    assert reason in found[name]
    assert f"{found[name]}: {name}" in str(hf_fuse.report(model))
    assert [p.stride() for p in model.parameters()] == strides
    assert model.generate(**inputs).tolist() == expected
    if change is not weight_of_another_class:
        assert expected != unchanged
    assert steps_taken(model) == 0
    (told,) = left_to_transformers(model)
    assert reason in told
    assert [p.stride() for p in model.parameters()] == strides


@cases((LLAMA,))
def test_quantised_linears(case: Case) -> None:
    """By torch's own dynamic quantisation, on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(case.build(), {nn.Linear})
    inputs = {"input_ids": tokens(model, 2, 7), **GREEDY}
    expected = model.generate(**inputs).tolist()
    found = hf_fuse.report(hf_fuse.patch(model)).off_engine
    linears = [n for n, m in model.named_modules() if "quantized" in type(m).__module__]
    linears = [n for n in linears if not n.endswith("_packed_params")]
    assert list(found) == linears
    assert set(found.values()) == {"torch.ao.nn.quantized.dynamic.modules.linear.Linear"}
    assert model.generate(**inputs).tolist() == expected
    assert steps_taken(model) == 0


MODEL_WIDE: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic_rope": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        "rope_type 'dynamic'",
    ),
    "activation": ({"hidden_act": "sigmoid"}, "activation Sigmoid"),
}


@pytest.mark.parametrize("what", MODEL_WIDE)
def test_what_concerns_the_whole_model(what: str, device: str) -> None:
    changes, reason = MODEL_WIDE[what]
    model = hf_fuse.patch(heads_of_16(LLAMA).build(device=device, **changes), strict=False)
    assert reason in hf_fuse.report(model).off_engine["the model"]
    model.generate(input_ids=tokens(model, 1, 7), **GREEDY)
    assert reason in left_to_transformers(model)[0]


def test_mixed_dtypes_and_global_hooks(device: str) -> None:
    model = hf_fuse.patch(heads_of_16(LLAMA).build(device=device))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert hf_fuse.report(model).off_engine == {"the model": "global module hooks"}
    finally:
        handle.remove()
    assert hf_fuse.report(model).off_engine == {}
    model.lm_head.double()
    assert hf_fuse.report(model).off_engine == {"the model": "the parameters differ in dtype"}


@cases(PLAIN)
def test_nothing_in_the_way(case: Case, device: str) -> None:
    """Hooks on the model itself are run, and the report's names are those within what it is asked
    about.
    """
    model = heads_of_16(case).build(device=device)
    ids = tokens(model, 1, 7)
    strides = [p.stride() for p in model.parameters()]
    assert hf_fuse.report(model).off_engine == {}
    hf_fuse.patch(model).register_forward_hook(lambda *_: None)
    before = logits(model, input_ids=ids)
    assert hf_fuse.report(model).off_engine == {}
    assert "off the decode engine" not in str(hf_fuse.report(model))
    assert [p.stride() for p in model.parameters()] == strides
    assert torch.equal(logits(model, input_ids=ids), before)
    hook(model)
    assert list(hf_fuse.report(nn.ModuleList([model])).off_engine) == [f"0.{mlp_name(model)}"]
    layers = set(architecture_of(model).ops) - {"decode"}
    assert hf_fuse.report(hf_fuse.patch(model, ops=layers)).off_engine == {}


def test_the_engines_layout_comes_with_the_spec(device: str) -> None:
    model = hf_fuse.patch(heads_of_16(GPT2).build(device=device))
    weights = spec_of(model).layers[0].qkv.weights
    assert weights[0].stride(1) == 1
    assert weights[0].data_ptr() == model.transformer.h[0].attn.c_attn.weight.data_ptr()
    other = hf_fuse.patch(heads_of_16(GPT2).build(device=device))
    name, _ = hook(other)
    with pytest.raises(Unsuited, match=f"{name}: forward hooks"):
        spec_of(other)
    assert other.transformer.h[0].attn.c_attn.weight.stride(0) != 1


@cases(PLAIN)
def test_hidden_states_asked_for_once_are_no_obstacle(case: Case, device: str) -> None:
    """transformers leaves the hooks that caught them on its layers."""
    model = heads_of_16(case).build(device=device)
    ids = tokens(model, 1, 9)
    with torch.no_grad():
        model(ids, output_hidden_states=True)
    hf_fuse.patch(model)
    assert hf_fuse.report(model).off_engine == {}
    model.generate(ids, **GREEDY)
    assert steps_taken(model) == GREEDY["max_new_tokens"]
    asked = {"output_hidden_states": True, "return_dict_in_generate": True}
    output = model.generate(ids, **GREEDY, **asked)
    assert len(output.hidden_states) == GREEDY["max_new_tokens"]
