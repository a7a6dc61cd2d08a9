"""LLaMA's relatives: which ops run for what their layers have, and what only they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from answers import check, checkpoint, gradients, left_to_transformers, logits, steps_taken
from helpers import count_ops
from models import (
    FAMILY,
    Case,
    cases,
    layers_of,
    norms_of,
    tokens_for,
)
from test_generate import GREEDY, compare
from test_patch import Recorder, deltas_of, residual_adds
from torch import nn
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
)

import hf_fuse
from hf_fuse.patches.decoder import Norms

pytestmark = pytest.mark.usefixtures("one_thread")
BY_ID = {case.id: case for case in FAMILY}


def norms_declared(model: nn.Module) -> Norms:
    return type(layers_of(model)[0]).norms


@cases(FAMILY)
def test_every_norm_is_one_call_and_takes_the_add_before_it(case: Case, device: str) -> None:
    model = hf_fuse.patch(case.build(device=device))
    ids = tokens_for(model, 2, 11)
    with Recorder() as recorder, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    calls, layers = recorder.named("hf_fuse::add_norm"), len(layers_of(model))
    assert len(calls) == len(norms_of(model))
    # An add runs with the norm that reads its sum: of each MLP, each next layer, and the final one.
    norms = norms_declared(model)
    with_add = layers * (norms.before_mlp is not None) + 1
    with_add += (layers - 1) * (norms.before_attention is not None)
    assert sum(deltas_of(call) == 1 for call in calls) == with_add
    shape = (2, 11, model.config.hidden_size)
    assert residual_adds(recorder, shape) == 2 * layers - with_add
    assert len(recorder.named("hf_fuse::gated_act")) == layers
    assert not recorder.named("aten::rsqrt")


@cases(FAMILY)
def test_a_step_of_the_engine_is_fused(case: Case, device: str) -> None:
    model = hf_fuse.patch(case.build(device=device))
    ids, new, layers = tokens_for(model, 2, 9), 5, len(layers_of(model))
    with count_ops() as calls:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **GREEDY)
    prompts, steps, runs = (1, 2, new - 1) if device == "cpu" else (2, 2, 0)
    assert calls["hf_fuse::run_recording"] == runs
    norms = norms_declared(model)
    chained = norms.after_attention is not None or norms.kind == "rms_offset"
    heads = hasattr(layers_of(model)[0].self_attn, "q_norm")
    assert calls["hf_fuse::decode_linear"] == steps * (4 * layers + 1) + prompts
    assert calls["hf_fuse::decode_attention"] == steps * layers
    assert calls["hf_fuse::decode_head_norm"] == steps * layers * heads
    assert calls["hf_fuse::decode_add_norm"] == (steps * (2 * layers + 1) + prompts) * chained
    assert calls["aten::rsqrt"] == 0


@cases(FAMILY)
def test_gradient_checkpointing(case: Case, device: str) -> None:
    model = case.build(device=device).train()
    checkpoint(model, reentrant=False)
    ids = tokens_for(model, 2, 29)
    check(model, lambda m: gradients(m, input_ids=ids, use_cache=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@cases(FAMILY)
def test_perplexity_moves_by_no_more_than_0_05_percent(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    """Of a model of random weights, at a scale where its loss is near that of knowing nothing."""
    model = Case(case.id, case.model_type, attention=case.attention, scale=0.05).build(
        dtype=dtype, device=device
    )
    ids = tokens_for(model, 16, 128)

    def loss() -> float:
        output = logits(model, input_ids=ids).float()
        return nn.functional.cross_entropy(
            output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).item()

    before = loss()
    hf_fuse.patch(model)
    assert abs(loss() - before) <= 5e-4  # of the perplexity's logarithm


# A half-precision step keeps more than the layers do: it is nearer the fp32 model, not further.


@cases(FAMILY)
def test_bf16_steps_are_as_near_float64_as_the_unpatched_model(case: Case, device: str) -> None:
    model = case.build(dtype=torch.bfloat16, device=device)
    ids = tokens_for(model, 8, 40)
    wide = case.build(device=device).double()
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "min_new_tokens": 2,
        "output_logits": True, "return_dict_in_generate": True, **GREEDY,
    }  # fmt: skip

    def run(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = model.generate(ids, **options)
        return output.logits[1].double(), output.sequences[:, : ids.shape[1] + 1]

    before, _ = run(model, ids)
    hf_fuse.patch(model)
    after, continued = run(model, ids)
    assert left_to_transformers(model) == []
    truth = logits(wide, input_ids=continued)[:, -1]

    def error(x: torch.Tensor) -> float:
        return ((x - truth).norm(dim=-1) / truth.norm(dim=-1)).mean().item()

    assert error(after) <= 1.1 * error(before)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "smollm3"])
def test_a_prompt_longer_than_the_window(name: str, kind: str, device: str) -> None:
    model = BY_ID[name].build(device=device)
    ids = tokens_for(model, 2, 40)
    mask = torch.ones_like(ids)
    options = {"input_ids": ids, "attention_mask": mask, "cache_implementation": kind}
    compare(model, 30, disable_compile=True, **options)


def test_scores_and_logits_of_capped_and_scaled_models(device: str) -> None:
    """What is sampled from, not the largest alone, which scales and caps leave the largest."""
    for name in ("granite", "gemma2", "gemma3_text"):
        model = BY_ID[name].build(device=device)
        ids = tokens_for(model, 2, 9)
        options = {"return_dict_in_generate": True, "output_logits": True}
        actual, expected = compare(
            model, 6, input_ids=ids, attention_mask=torch.ones_like(ids), **options
        )
        for a, b in zip(actual.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_the_engine_leaves_alone_names_the_reason(device: str) -> None:
    long = {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 80, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    }  # fmt: skip
    case = BY_ID["phi3"]
    model = case.build(device=device, rope_parameters=long, original_max_position_embeddings=80)
    ids = tokens_for(model, 1, 9)
    expected = model.generate(ids, max_new_tokens=6, **GREEDY)
    hf_fuse.patch(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, **GREEDY), expected)
    assert left_to_transformers(model) == [
        "rope_type 'longrope' changes its frequencies with the length"
    ]
    assert steps_taken(model) == 0


def test_an_encoder_is_refused_by_name() -> None:
    config = BY_ID["gemma3_text"].config(use_bidirectional_attention=True)
    assert isinstance(config, Gemma3TextConfig)
    with pytest.raises(hf_fuse.UnsupportedModelError, match="use_bidirectional_attention=True"):
        hf_fuse.patch(Gemma3TextModel(config))


def test_a_residual_multiplier_of_zero_is_left_to_transformers(device: str) -> None:
    model = BY_ID["granite"].build(device=device, residual_multiplier=0.0)
    ids = tokens_for(model, 1, 9)
    expected = model.generate(ids, max_new_tokens=4, **GREEDY)
    hf_fuse.patch(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, **GREEDY), expected)
    assert "a residual multiplier of 0.0" in left_to_transformers(model)[0]
