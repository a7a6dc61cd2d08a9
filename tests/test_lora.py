"""PEFT adapters on a patched model: it trains, merges and generates as an unpatched one does, and
the report says what they keep off the decode engine.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from answers import (
    assert_same,
    check,
    gradients,
    left_to_transformers,
    logits,
    norm_calls,
    steps_taken,
)
from helpers import count_ops
from models import PLAIN, Case, architecture_of, cases, heads_of_16, layers_of, tokens_for
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_fuse
from hf_fuse.modules import CACHE

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}
STEPS = 4
# After STEPS steps of AdamW in float32, relative to a tensor's norm and to its largest element.
# Where a gradient is near zero a step is made of its rounding.
ADAPTERS_ALIKE, MERGED_ALIKE = 5e-4, 2e-5
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": "attention"},
    "all_linear": {},
    "dropout": {"lora_dropout": 0.2},
    "norm_saved": {"modules_to_save": "norm"},
    "embedding": {"target_modules": "embedding"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
ORDERS = ("wrap_then_patch", "patch_then_wrap")
each_order = pytest.mark.parametrize("order", ORDERS)
BOTH_ORDERS = ("attention", "all_linear", "norm_saved")
TRAINED = [(v, o) for v in VARIANTS for o in (ORDERS if v in BOTH_ORDERS else ORDERS[:1])]


def config_for(model: nn.Module, variant: str = "all_linear") -> Any:
    """Adapters that are not zero from the start."""
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    options |= VARIANTS[variant]
    linears = [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
    embedding = model.get_input_embeddings()
    targets = {
        "attention": [n for n in linears if re.search("attn|attention", n)],
        "embedding": [n for n, m in model.named_modules() if m is embedding],
    }
    options["target_modules"] = targets.get(options["target_modules"], options["target_modules"])
    if "modules_to_save" in options:
        norm = architecture_of(model).opening_norms(layers_of(model)[1])[0]
        options["modules_to_save"] = [
            n for n, m in layers_of(model)[1].named_modules() if m is norm
        ]
    conv1d = any(type(m) is Conv1D for m in model.modules())
    return peft.LoraConfig(**options, fan_in_fan_out=conv1d and variant != "embedding")


def wrapped(case: Case, device: str, variant: str = "all_linear", order: str = "") -> Any:
    """The case with adapters; patched first, last, or not."""
    model = heads_of_16(case).build(device=device)
    if order == "patch_then_wrap":
        hf_fuse.patch(model)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config_for(model, variant)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data.mul_(0.1)
    return hf_fuse.patch(model) if order == "wrap_then_patch" else model


def trained(model: Any) -> dict[str, Tensor]:
    """What STEPS steps of AdamW make of the parameters that train."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, eps=1e-5)
    model.train()
    for step in range(STEPS):
        ids = tokens_for(model, 2, 17, seed=step)
        torch.manual_seed(step)  # of the adapters' dropout
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return parameters


def adapted(model: nn.Module) -> list[str]:
    """The names of the modules that PEFT has put in the model's own modules' places."""
    layers = (peft.tuners.lora.LoraLayer, peft.utils.ModulesToSaveWrapper)
    return [name for name, module in model.named_modules() if isinstance(module, layers)]


@pytest.mark.parametrize(("variant", "order"), TRAINED)
@cases(PLAIN)
def test_trains_and_merges_to_the_same_weights(
    case: Case, variant: str, order: str, device: str
) -> None:
    plain, model = wrapped(case, device, variant), wrapped(case, device, variant, order)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with count_ops() as calls:
        found = trained(model)
    norms = norm_calls(case.build())
    assert calls["hf_fuse::add_norm"] >= STEPS * norms  # a copied norm runs by itself
    # The first norm may read nothing that trains.
    assert calls["hf_fuse::add_norm_backward"] >= STEPS * (norms - 1)
    assert found.keys() == start.keys()
    assert all(not torch.equal(found[name], start[name]) for name in start)
    assert_same(found, trained(plain), ADAPTERS_ALIKE)
    ids = tokens_for(plain, 2, 17)
    assert_same(logits(model, input_ids=ids), logits(plain, input_ids=ids))

    merged, plain_merged = model.merge_and_unload(), plain.merge_and_unload()
    assert hf_fuse.is_patched(merged)
    assert_same(merged.state_dict(), plain_merged.state_dict(), MERGED_ALIKE)
    assert_same(logits(merged, input_ids=ids), logits(plain_merged, input_ids=ids))
    hf_fuse.unpatch(merged)
    plain_classes = {name: type(m) for name, m in plain_merged.named_modules()}
    assert {name: type(m) for name, m in merged.named_modules()} == plain_classes


@each_order
@pytest.mark.parametrize("variant", ["all_linear", "norm_saved", "embedding"])
@cases(PLAIN)
def test_generates_by_transformers_until_it_is_merged(
    case: Case, variant: str, order: str, device: str
) -> None:
    plain, model = wrapped(case, device, variant), wrapped(case, device, variant, order)
    inputs = {"input_ids": tokens_for(plain, 2, 9), **GREEDY}
    expected = plain.generate(**inputs).tolist()
    with plain.disable_adapter():
        unadapted = plain.generate(**inputs).tolist()
    assert unadapted != expected
    assert model.generate(**inputs).tolist() == expected
    with model.disable_adapter():
        assert model.generate(**inputs).tolist() == unadapted
    base = model.get_base_model()
    (reason,) = left_to_transformers(base)
    assert "peft" in reason
    assert steps_taken(base) == 0

    merged = model.merge_and_unload()
    assert merged is base
    assert (
        merged.generate(**inputs).tolist() == plain.merge_and_unload().generate(**inputs).tolist()
    )
    assert left_to_transformers(merged) == [reason]
    assert steps_taken(merged) == GREEDY["max_new_tokens"]


@cases(PLAIN)
def test_two_adapters_in_turns(case: Case, device: str) -> None:
    plain, model = wrapped(case, device), wrapped(case, device, order="wrap_then_patch")
    for one in (plain, model):
        torch.manual_seed(1)
        one.add_adapter("other", config_for(heads_of_16(case).build(), "attention"))
    inputs = {"input_ids": tokens_for(plain, 2, 9), **GREEDY}
    tokens = []
    for name in ("default", "other", "default"):
        for one in (plain, model):
            one.set_adapter(name)
            tokens.append(one.generate(**inputs).tolist())
    assert tokens[0] == tokens[1] == tokens[4] == tokens[5]
    assert tokens[2] == tokens[3] != tokens[0]
    merged, plain_merged = (one.merge_and_unload(adapter_names=["other"]) for one in (model, plain))
    assert merged.generate(**inputs).tolist() == plain_merged.generate(**inputs).tolist()
    assert steps_taken(merged) == GREEDY["max_new_tokens"]


@each_order
@cases(PLAIN)
def test_unpatched_it_is_what_it_was(case: Case, order: str, device: str) -> None:
    plain, model = wrapped(case, device), wrapped(case, device, order=order)
    inputs = {"input_ids": tokens_for(plain, 2, 9)}
    model.generate(**inputs, **GREEDY)
    hf_fuse.unpatch(model)
    for (name, module), (_, other) in zip(
        model.named_modules(), plain.named_modules(), strict=True
    ):
        assert type(module) is type(other), name
        own = {key for key in module.__dict__ if "hf_fuse" in key}
        assert not own, name
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert parameter.stride() == other.stride()
    assert torch.equal(logits(model, **inputs), logits(plain, **inputs))


@each_variant
@cases(PLAIN)
def test_the_report_names_what_adapters_keep_off_the_engine(
    case: Case, variant: str, device: str
) -> None:
    model = wrapped(case, device, variant, "wrap_then_patch")
    strides = [p.stride() for p in model.parameters()]
    report = hf_fuse.report(model)
    names = adapted(model)
    assert len(names) > (variant != "embedding")
    assert sorted(report.off_engine) == sorted(names) == sorted(report.to_dict()["off_engine"])
    for name, reason in report.off_engine.items():
        assert reason.startswith(f"peft.{type(model.get_submodule(name)).__module__[5:]}.")
        assert "merge_and_unload()" in reason
    (line, *_) = [t for t in str(report).splitlines() if "off the decode engine" in t]
    assert names[0] in line
    assert [p.stride() for p in model.parameters()] == strides
    assert left_to_transformers(model.get_base_model()) == []

    merged = hf_fuse.report(model.merge_and_unload())
    assert merged.off_engine == {}
    assert "off the decode engine" not in str(merged)


@cases(PLAIN)
def test_gradients_of_an_adapter_and_of_a_copy_of_a_norm(case: Case, device: str) -> None:
    model = wrapped(case, device, "norm_saved")
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data.mul_(1.5)  # what was trained
    ids = tokens_for(model, 2, 17)
    check(model, lambda m: logits(m, input_ids=ids))
    check(model, lambda m: gradients(m, input_ids=ids))


TOKENS_OF_THEIR_OWN = {
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", TOKENS_OF_THEIR_OWN)
@cases(PLAIN)
def test_tuned_prompts_and_prefixes_are_generated_from(case: Case, kind: str, device: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        heads_of_16(case).build(device=device), TOKENS_OF_THEIR_OWN[kind]()
    ).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    inputs = {"input_ids": tokens_for(model, 2, 9), **GREEDY}
    expected = model.generate(**inputs).tolist()
    # PEFT 0.21 hands its prefixes on by a name that transformers 5.24 drops.
    lost_by_peft = expected == model.get_base_model().generate(**inputs).tolist()
    assert not lost_by_peft or (kind == "prefix" and CACHE == "cache")
    base = hf_fuse.patch(model).get_base_model()
    untuned = base.generate(**inputs).tolist()
    assert steps_taken(base) == GREEDY["max_new_tokens"]
    assert model.generate(**inputs).tolist() == expected
    assert (expected == untuned) == lost_by_peft
    assert left_to_transformers(base) == ["a prepare_inputs_for_generation of its own"]
    assert base.generate(**inputs).tolist() == untuned
    assert len(left_to_transformers(base)) == 1
