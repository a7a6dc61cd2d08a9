"""Hooks see and change what they always did, and layers may move: a carried row is never stale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from answers import assert_same, both, check, generate, gradients, logits
from models import (
    GPT_NEOX_SERIAL,
    LLAMA,
    PLAIN,
    Case,
    architecture_of,
    backbone_of,
    cases,
    layers_of,
    norms_of,
    tokens_for,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_fuse

pytestmark = pytest.mark.usefixtures("one_thread")


def _ramp(x: Tensor) -> Tensor:
    """A factor a norm does not cancel."""
    return torch.linspace(0.5, 1.5, x.shape[-1], device=x.device)


def _scale(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output * _ramp(output)


def _scale_in_place(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    output.mul_(_ramp(output))


def _replace(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output)


def _scale_input(module: nn.Module, inputs: tuple) -> tuple:
    return (inputs[0] * _ramp(inputs[0]), *inputs[1:])


def _scale_input_in_place(module: nn.Module, inputs: tuple) -> None:
    inputs[0].mul_(_ramp(inputs[0]))


Attach = Callable[[nn.Module, list[Tensor]], Any]


def _on_layer(hook: Callable, pre: bool = False) -> Attach:
    def attach(model: nn.Module, captured: list[Tensor]) -> Any:
        layer = layers_of(model)[1]
        return (layer.register_forward_pre_hook if pre else layer.register_forward_hook)(hook)

    return attach


def _on_second_norm(hook: Callable, pre: bool = False) -> Attach:
    def attach(model: nn.Module, captured: list[Tensor]) -> Any:
        norm = norms_of(model)[2]  # opens the second layer
        return (norm.register_forward_pre_hook if pre else norm.register_forward_hook)(hook)

    return attach


def _capture(modules_of: Callable[[nn.Module], list[nn.Module]]) -> Attach:
    def attach(model: nn.Module, captured: list[Tensor]) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            captured.extend(t for t in (*inputs, output) if isinstance(t, Tensor))

        handles = [m.register_forward_hook(hook) for m in modules_of(model)]
        return handles

    return attach


def _projections(model: nn.Module) -> list[nn.Module]:
    return [
        next(m for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D)))
        for layer in layers_of(model)
    ]


HOOKS: dict[str, Attach] = {
    "layer-scales": _on_layer(_scale),
    "layer-in_place": _on_layer(_scale_in_place),
    "layer-replaces": _on_layer(_replace),
    "layer-pre": _on_layer(_scale_input, pre=True),
    "layer-pre-in_place": _on_layer(_scale_input_in_place, pre=True),
    "norm-scales": _on_second_norm(_scale),
    "norm-in_place": _on_second_norm(_scale_in_place),
    "norm-pre": _on_second_norm(_scale_input, pre=True),
    "norm-pre-in_place": _on_second_norm(_scale_input_in_place, pre=True),
    "capture-layers": _capture(lambda m: list(layers_of(m))),
    "capture-norms": _capture(norms_of),
    "capture-projections": _capture(_projections),
}
MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": nullcontext,
}


@contextmanager
def attached(model: nn.Module, attach: Attach) -> Iterator[list[Tensor]]:
    """The hook in place for the block; gives the list of what it captures."""
    captured: list[Tensor] = []
    handles = attach(model, captured)
    try:
        yield captured
    finally:
        for handle in handles if isinstance(handles, list) else [handles]:
            handle.remove()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hook", HOOKS)
@cases(PLAIN, (GPT_NEOX_SERIAL,))
def test_hooks(case: Case, hook: str, mode: str, device: str) -> None:
    model = case.build(device=device)
    ids = tokens_for(model, 2, 17)

    def run(model: nn.Module) -> Any:
        with attached(model, HOOKS[hook]) as captured, MODES[mode]():
            output = model(input_ids=ids).logits
            return output.clone(), [t.clone() for t in captured]

    actual, expected = both(model, run)
    assert_same(actual, expected)
    assert bool(actual[1]) == hook.startswith("capture")


@pytest.mark.parametrize("hook", [h for h in HOOKS if "in_place" not in h])
@cases(PLAIN)
def test_gradients_with_hooks(case: Case, hook: str, device: str) -> None:
    model = case.build(device=device)
    ids = tokens_for(model, 2, 17)

    def run(model: nn.Module) -> Any:
        with attached(model, HOOKS[hook]):
            return gradients(model, input_ids=ids)

    check(model, run)


@pytest.mark.parametrize("hook", [h for h in HOOKS if "in_place" in h])
@cases(PLAIN)
def test_gradients_with_hooks_in_place_are_never_silently_wrong(
    case: Case, hook: str, device: str
) -> None:
    """The fused op saves the sum it returns, so autograd may refuse a write into it."""
    model = case.build(device=device)
    ids = tokens_for(model, 2, 17)

    def run(model: nn.Module) -> Any:
        with attached(model, HOOKS[hook]):
            return gradients(model, input_ids=ids)

    expected = run(model)
    hf_fuse.patch(model)
    try:
        assert_same(run(model), expected)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017


@cases(PLAIN, (GPT_NEOX_SERIAL,))
def test_a_hook_may_ask_for_the_gradient_of_a_hidden_state(case: Case, device: str) -> None:
    """As saliency does: nothing requires grad until a hook says so, after the row was computed."""
    model = case.build(device=device).requires_grad_(False)
    ids = tokens_for(model, 2, 17)

    def run(model: nn.Module) -> Any:
        kept: list[Tensor] = []
        handle = layers_of(model)[0].register_forward_hook(
            lambda module, inputs, output: kept.append(output.requires_grad_())
        )
        model(input_ids=ids).logits.square().mean().backward()
        handle.remove()
        return kept[0].grad

    check(model, run)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@cases(PLAIN)
def test_what_hooks_kept_of_a_generate_is_not_written_over(
    case: Case, cache: str, device: str
) -> None:
    model = case.build(device=device)
    ids = tokens_for(model, 2, 9)

    def run(model: nn.Module) -> Any:
        with attached(model, HOOKS["capture-projections"]) as captured:
            return generate(model, ids, 4, cache_implementation=cache), captured

    check(model, run)


ORDERS = {"first_two": (0, 1), "without_first": (1, 2), "reversed": (2, 1, 0), "twice": (0, 0, 1)}


@pytest.mark.parametrize("order", ORDERS)
@cases(PLAIN, (GPT_NEOX_SERIAL,))
def test_layers_cut_or_reordered_after_the_patch(case: Case, order: str, device: str) -> None:
    def answers(on: bool) -> Any:
        model = case.build(device=device)
        if on:
            hf_fuse.patch(model)
        chosen = nn.ModuleList(layers_of(model)[i] for i in ORDERS[order])
        setattr(backbone_of(model), architecture_of(model).layers, chosen)
        ids = tokens_for(model, 2, 17)
        return logits(model, input_ids=ids, use_cache=False), gradients(model, input_ids=ids)

    assert_same(answers(True), answers(False))


@cases(PLAIN)
def test_dtype_changed_after_the_patch(case: Case, device: str) -> None:
    model = hf_fuse.patch(case.build(device=device)).to(torch.float64)
    ids = tokens_for(model, 2, 17)
    actual = logits(model, input_ids=ids)
    assert_same(actual, logits(hf_fuse.unpatch(model), input_ids=ids), 1e-6)


def test_kept_hidden_states_do_not_keep_the_normed_rows(device: str) -> None:
    model = hf_fuse.patch(LLAMA.build(device=device))
    ids = tokens_for(model, 2, 17)
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    assert not any(getattr(h, "_hf_fuse_carried", None) for h in output.hidden_states)
