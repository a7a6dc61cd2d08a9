"""Copies, files and accelerate: a patched model goes where any model goes."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from answers import assert_same, logits, norm_calls
from helpers import count_ops
from models import (
    PLAIN,
    Case,
    cases,
    layers_of,
    tokens_for,
)
from torch import nn
from transformers import AutoModelForCausalLM

import hf_fuse

pytestmark = pytest.mark.usefixtures("one_thread")


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch_save])
@cases(PLAIN)
def test_a_copy_is_patched_and_independent(case: Case, copy_of: Callable, device: str) -> None:
    model = case.build(device=device)
    ids = tokens_for(model, 2, 17)
    expected = logits(model, input_ids=ids)
    hf_fuse.patch(model)
    patched = logits(model, input_ids=ids)
    twin = copy_of(model)
    assert hf_fuse.is_patched(twin)
    with count_ops() as calls:
        assert_same(logits(twin, input_ids=ids), expected)
    # The twin's layers hand over to the twin's own norms: the one plain norm is the first.
    assert calls["hf_fuse::add_norm"] == norm_calls(model)
    hf_fuse.unpatch(twin)
    assert not hf_fuse.is_patched(twin)
    assert_same(logits(twin, input_ids=ids), expected, 1e-6)
    assert hf_fuse.is_patched(model)
    assert torch.equal(logits(model, input_ids=ids), patched)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert torch.equal(logits(model, input_ids=ids), patched)


@cases(PLAIN)
def test_save_pretrained_and_back(case: Case, tmp_path: Any, device: str) -> None:
    model = case.build(device=device)
    ids = tokens_for(model, 2, 17)
    expected, name = logits(model, input_ids=ids), type(model).__name__
    hf_fuse.patch(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(device).eval()
    assert type(loaded).__name__ == name
    assert not hf_fuse.is_patched(loaded)
    assert_same(logits(loaded, input_ids=ids), expected, 1e-6)
    patched = hf_fuse.patch(loaded).state_dict()
    assert_same(dict(patched), dict(model.state_dict()), 0.0)


@pytest.mark.parametrize("order", ["hooks_then_patch", "patch_then_hooks"])
@cases(PLAIN)
def test_accelerate_hooks(case: Case, order: str, device: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = case.build(device=device)
    ids = tokens_for(model, 2, 17)
    expected = logits(model, input_ids=ids)

    def dispatch() -> None:
        # One entry a layer, so that every layer gets a hook of its own.
        parts = {n: device for n, m in model.named_modules() if n and not list(m.children())}
        accelerate.dispatch_model(model, parts, main_device=device, force_hooks=True)

    def originals() -> list[Any]:
        return [m._old_forward for m in model.modules() if hasattr(m, "_old_forward")]

    if order == "hooks_then_patch":
        dispatch()
        hf_fuse.patch(model)
    else:
        hf_fuse.patch(model)
        dispatch()
    assert len(originals()) > len(layers_of(model))
    with count_ops() as calls:
        assert_same(logits(model, input_ids=ids), expected)
    assert calls["hf_fuse::add_norm"] == norm_calls(model)
    hf_fuse.unpatch(model)
    for module in model.modules():
        if hasattr(module, "_old_forward"):
            assert module._old_forward.__func__ is type(module).forward
    assert torch.equal(logits(model, input_ids=ids), expected)


@cases(PLAIN)
def test_accelerate_offload(case: Case, device: str) -> None:
    """The next layer's norm has no weights yet when a layer ends: it computes its own row."""
    accelerate = pytest.importorskip("accelerate")
    model = case.build(device=device)
    ids = tokens_for(model, 2, 17)
    expected = logits(model, input_ids=ids)
    accelerate.cpu_offload(model, execution_device=torch.device(device))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    hf_fuse.patch(model)
    with count_ops() as calls:
        assert_same(logits(model, input_ids=ids), expected)
    assert calls["hf_fuse::add_norm"] > 0
    report = hf_fuse.report(model)
    assert "relative difference" in report.verified
    assert {m.backend for m in report.modules} == {"the kernels of the device its weights come to"}
    hf_fuse.unpatch(model)
    assert torch.equal(logits(model, input_ids=ids), expected)
