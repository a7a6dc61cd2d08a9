"""A patched model answers as the unpatched one, in inference, decoding and training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from answers import (
    GREEDY,
    assert_same,
    both,
    check,
    check_forward,
    check_greedy,
    checkpoint,
    flatten,
    gradients,
    logits,
)
from models import (
    DROPOUT,
    FAMILY,
    GPT2,
    GPT_NEOX_SERIAL,
    LLAMA,
    PLAIN,
    TRAINED,
    VARIANTS,
    Case,
    backbone_of,
    cases,
    layers_of,
    norms_of,
    padded,
    tokens_for,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, StaticCache

import hf_fuse
from hf_fuse.eval.loading import MODELS, encode
from hf_fuse.eval.perplexity import PerplexityResult, evaluate_perplexity
from hf_fuse.eval.text import pydoc_text
from hf_fuse.modules import CACHE

pytestmark = pytest.mark.usefixtures("one_thread")


@cases(VARIANTS, FAMILY, TRAINED)
def test_logits_and_every_hidden_state_in_fp32(case: Case, device: str) -> None:
    check_forward(case.build(device=device))


@cases(VARIANTS, FAMILY, TRAINED)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_64_greedy_tokens(case: Case, cache: str, device: str) -> None:
    check_greedy(case.build(device=device), cache)


@cases(VARIANTS, FAMILY, TRAINED)
@pytest.mark.parametrize("mode", ["eval", "train", "train-dropout"])
def test_gradients_of_every_parameter(case: Case, mode: str, device: str) -> None:
    dropout = DROPOUT[case.model_type] if mode == "train-dropout" else {}
    none = dict.fromkeys(DROPOUT[case.model_type], 0.0)
    model = case.build(device=device, **{**none, **dropout}).train(mode != "eval")
    ids = tokens_for(model, 2, 29)
    actual, expected = both(model, lambda m: gradients(m, input_ids=ids))
    assert all(g is not None for g in expected.values())
    assert_same(actual, expected)
    if dropout:  # it did drop, and both the same
        without = gradients(model.eval(), input_ids=ids)
        assert not any(torch.equal(g, without[name]) for name, g in expected.items())


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@HALVES
@cases(PLAIN, (GPT_NEOX_SERIAL,), FAMILY, TRAINED)
def test_half_precision_is_as_close_to_float64_as_unpatched(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    model = case.build(dtype=dtype, device=device)
    ids = tokens_for(model, 16, 64)
    truth = logits(copy.deepcopy(model).double(), input_ids=ids)
    actual, expected = both(model, lambda m: logits(m, input_ids=ids))
    assert actual.dtype == dtype

    def error(x: Tensor) -> float:  # per token, then averaged, so that no token's scale decides
        return ((x - truth).norm(dim=-1) / truth.norm(dim=-1)).mean().item()

    assert error(actual) <= 1.1 * error(expected)


def perplexity_of(case: Case, dtype: torch.dtype, device: str, **options: Any) -> PerplexityResult:
    model = case.build(dtype=dtype, device=device)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / case.model_type)
    ids = encode(tokenizer, pydoc_text("held-out"), max_tokens=4097)
    return evaluate_perplexity(model, ids, context=256, stride=256, progress=False, **options)


@HALVES
@cases(TRAINED)
def test_perplexity_of_the_trained_models(case: Case, dtype: torch.dtype, device: str) -> None:
    result = perplexity_of(case, dtype, device, reference=False)
    assert result.report.patched
    assert result.unpatched.perplexity < 200  # of 2048 tokens: a model of this text, not noise
    assert abs(result.change_percent) <= 0.05


@HALVES
@cases(TRAINED)
def test_perplexity_token_by_token(case: Case, dtype: torch.dtype, device: str) -> None:
    """The decoding steps are as near the fp32 model as the unpatched forward is, and nearer."""
    result = perplexity_of(case, dtype, device, through="decode")
    assert abs(result.change_percent) <= 0.05
    assert result.kl_reference_patched <= 1.05 * result.kl_reference_unpatched
    truth = result.reference.nll
    patched, unpatched = ((s.nll - truth).abs().mean() for s in (result.patched, result.unpatched))
    assert patched <= 1.05 * unpatched


@cases(TRAINED)
def test_perplexity_token_by_token_in_float32(case: Case, device: str) -> None:
    result = perplexity_of(case, torch.float32, device, through="decode")
    assert abs(result.change_percent) <= 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
@cases(PLAIN, (GPT_NEOX_SERIAL,), FAMILY)
def test_padded_batches(case: Case, side: str, device: str) -> None:
    model = case.build(device=device)
    inputs = padded(tokens_for(model, 4, 23), side)
    check(model, lambda m: logits(m, **inputs))
    check(model, lambda m: gradients(m, **inputs))


def new_cache(kind: str, model: nn.Module) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=64)
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@cases(PLAIN, FAMILY)
def test_two_generate_calls_on_one_cache(case: Case, kind: str, device: str) -> None:
    model = case.build(device=device)
    ids, more = tokens_for(model, 2, 9), tokens_for(model, 2, 5, seed=2)

    def run(model: nn.Module) -> Any:
        cache = new_cache(kind, model)
        options = {CACHE: cache, "max_new_tokens": 12, **GREEDY}
        first = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        longer = torch.cat((first, more), dim=1)
        second = model.generate(longer, attention_mask=torch.ones_like(longer), **options)
        return second, cache

    check(model, run)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@cases(PLAIN, FAMILY)
def test_forward_then_generate_on_its_cache(case: Case, kind: str, device: str) -> None:
    model = case.build(device=device)
    ids = tokens_for(model, 2, 14)
    mask = torch.ones_like(ids)

    def run(model: nn.Module) -> Any:
        cache = new_cache(kind, model)
        first = logits(model, input_ids=ids[:, :9], use_cache=True, **{CACHE: cache})
        options = {CACHE: cache, "max_new_tokens": 12, **GREEDY}
        return first, model.generate(ids, attention_mask=mask, **options), cache

    check(model, run)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@cases(PLAIN, FAMILY)
def test_a_cache_crosses_over_to_the_patched_model_and_back(
    case: Case, kind: str, device: str
) -> None:
    model = case.build(device=device)
    ids = tokens_for(model, 2, 21)

    def steps(patched: tuple[bool, ...]) -> list[Tensor]:
        cache, outputs = new_cache(kind, model), []
        for i, on in enumerate(patched):
            with hf_fuse.patched(model) if on else nullcontext():
                part = ids[:, 7 * i : 7 * i + 7]
                outputs.append(logits(model, input_ids=part, use_cache=True, **{CACHE: cache}))
        return outputs

    expected = steps((False, False, False))
    assert_same(steps((False, True, False)), expected)
    assert_same(steps((True, False, True)), expected)


@cases(PLAIN)
def test_sampling_and_beams_draw_the_same_tokens(case: Case, device: str) -> None:
    model = case.build(device=device)
    ids = tokens_for(model, 2, 9)

    def run(model: nn.Module) -> Any:
        torch.manual_seed(0)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16}
        sampled = model.generate(ids, do_sample=True, top_k=20, **options)
        return sampled, model.generate(ids, num_beams=3, do_sample=False, **options)

    check(model, run)


@pytest.mark.parametrize("which", ["every", "every_second", "offloaded"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensors", "reentrant"])
@cases(PLAIN, (GPT_NEOX_SERIAL,))
def test_gradient_checkpointing(case: Case, reentrant: bool, which: str, device: str) -> None:
    model = case.build(device=device, num_hidden_layers=4, **DROPOUT[case.model_type]).train()
    if which == "offloaded" and device == "cpu":
        pytest.skip("transformers offloads from an accelerator only")
    options = {"every": {}, "every_second": {"every_n_layers": 2}, "offloaded": {"offload": True}}
    checkpoint(model, reentrant, **options[which])
    ids = tokens_for(model, 2, 29)
    check(model, lambda m: gradients(m, input_ids=ids, use_cache=False))


@cases(PLAIN, (GPT_NEOX_SERIAL,))
def test_autocast_training_step(case: Case, device: str) -> None:
    model = case.build(device=device).train()
    ids = tokens_for(model, 4, 48)
    truth = gradients(model, input_ids=ids)

    def run(model: nn.Module) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return gradients(model, input_ids=ids)

    actual, expected = both(model, run)

    def error(found: dict[str, Tensor | None]) -> float:
        pairs = [(found[n], t) for n, t in truth.items() if t is not None]
        return sum(((g - t).norm() / t.norm()).item() for g, t in pairs) / len(pairs)

    assert {g.dtype for g in actual.values()} == {g.dtype for g in expected.values()}
    assert error(actual) <= 1.1 * error(expected)


@pytest.mark.parametrize("which", ["norms", "backbone", "embeddings", "matrices"])
@cases(PLAIN)
def test_frozen_parameters(case: Case, which: str, device: str) -> None:
    model = case.build(device=device, **({"tie_word_embeddings": False})).train()
    frozen: dict[str, Callable[[], Any]] = {
        "norms": lambda: (p for norm in norms_of(model) for p in norm.parameters()),
        "backbone": lambda: backbone_of(model).parameters(),
        "embeddings": lambda: model.get_input_embeddings().parameters(),
        "matrices": lambda: (p for p in model.parameters() if p.dim() > 1),
    }
    for parameter in frozen[which]():
        parameter.requires_grad_(False)
    ids = tokens_for(model, 2, 29)
    actual, expected = both(model, lambda m: gradients(m, input_ids=ids))
    assert_same(actual, expected)
    assert any(g is None for g in actual.values())
    assert any(g is not None for g in actual.values())


@cases(PLAIN)
def test_an_optimizer_made_before_the_patch_trains_the_model(case: Case, device: str) -> None:
    def train(on: bool) -> dict[str, Tensor]:
        model = case.build(device=device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        if on:
            hf_fuse.patch(model)
        for step in range(4):
            ids = tokens_for(model, 2, 19, seed=step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach() for name, p in model.named_parameters()}

    trained = train(True)
    assert_same(trained, train(False))
    start = dict(case.build(device=device).named_parameters())
    assert all(not torch.equal(p, start[name]) for name, p in trained.items())


@cases(PLAIN, (GPT_NEOX_SERIAL,), FAMILY)
def test_attentions_and_hidden_states_together(case: Case, device: str) -> None:
    model = case.build(device=device, attention="eager")
    inputs = padded(tokens_for(model, 3, 17), "left")

    def run(model: nn.Module) -> Any:
        with torch.no_grad():
            return model(**inputs, output_attentions=True, output_hidden_states=True)

    actual, expected = both(model, run)
    assert_same(actual, expected)
    assert len(actual.attentions) == len(layers_of(model))


@cases(PLAIN, (GPT_NEOX_SERIAL,), FAMILY)
def test_inference_mode(case: Case, device: str) -> None:
    model = case.build(device=device)
    ids = tokens_for(model, 3, 17)

    @torch.inference_mode()
    def run(model: nn.Module) -> Any:
        output = model(input_ids=ids, output_hidden_states=True)
        return [t.clone() for t in (output.logits, *output.hidden_states)]

    check(model, run)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@cases(PLAIN, FAMILY, slow=tuple(c.id for c in FAMILY if c.id != "gemma2"))
def test_torch_compile_fullgraph(case: Case, backend: str, device: str) -> None:
    torch._dynamo.reset()
    model = case.build(device=device, num_hidden_layers=2)
    ids = tokens_for(model, 2, 17)

    def run(forward: Callable) -> Any:
        model.zero_grad(set_to_none=True)
        output = forward(input_ids=ids).logits  # the loss of GPT-2 is not traced, patched or not
        nn.functional.cross_entropy(output.flatten(0, 1), ids.flatten()).backward()
        return output.detach(), {name: p.grad for name, p in model.named_parameters()}

    expected = run(model)
    with hf_fuse.patched(model):
        assert_same(run(torch.compile(model, fullgraph=True, backend=backend)), expected)
    torch._dynamo.reset()


HEADS = ("", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head or "bare")
@cases(PLAIN)
def test_task_heads(case: Case, head: str, device: str) -> None:
    model = case.build(head, device=device)
    inputs = padded(tokens_for(model, 3, 17), "right")

    def run(model: nn.Module) -> Any:
        output = model(**inputs, use_cache=False)
        model.zero_grad(set_to_none=True)
        sum(t.float().square().mean() for _, t in flatten(output)).backward()
        return output, {name: p.grad for name, p in model.named_parameters()}

    check(model, run)


def embeddings_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids).detach()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@cases(PLAIN, (GPT_NEOX_SERIAL,))
def test_nan_and_inf_come_out_as_eager_brings_them_out(
    case: Case, value: float, device: str
) -> None:
    model = case.build(device=device)
    embeddings = embeddings_of(model, tokens_for(model, 2, 17))
    embeddings[0, 5, 3] = value
    actual, expected = both(model, lambda m: logits(m, inputs_embeds=embeddings))
    assert_same(actual, expected)
    assert expected[1].isfinite().all()
    assert expected[0].isnan().any()


def _hidden(model: nn.Module, size: int = 0) -> Tensor:
    size = model.config.hidden_size + size
    return torch.linspace(-9, 9, 10 * size, device=model.device).view(2, 5, size)


BAD_INPUTS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "no_rows": lambda m: {"input_ids": tokens_for(m, 0, 5)},
    "no_tokens": lambda m: {"input_ids": tokens_for(m, 2, 0)},
    "integer_embeddings": lambda m: {"inputs_embeds": _hidden(m).long()},
    "bf16_embeddings": lambda m: {"inputs_embeds": _hidden(m).bfloat16()},
    "wrong_hidden_size": lambda m: {"inputs_embeds": _hidden(m, 1)},
    "token_out_of_range": lambda m: {"input_ids": tokens_for(m, 2, 5) + m.config.vocab_size},
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
@cases(PLAIN, (GPT_NEOX_SERIAL,))
def test_bad_input_ends_as_in_eager(case: Case, bad: str, device: str) -> None:
    """transformers refuses some of these and promotes others: so does the patched model."""
    if bad == "token_out_of_range" and device == "cuda":
        pytest.skip("a device-side assert ends the process' CUDA context, patched or not")
    model = case.build(device=device)
    ids, inputs = tokens_for(model, 2, 17), BAD_INPUTS[bad](model)

    def outcome() -> Any:
        try:
            return logits(model, **inputs)
        except Exception as error:
            return type(error)

    expected, before = outcome(), logits(model, input_ids=ids)
    hf_fuse.patch(model)
    assert_same(outcome(), expected)
    assert_same(logits(model, input_ids=ids), before)


@pytest.mark.cuda
@cases(PLAIN)
def test_input_on_another_device_is_refused_by_name(case: Case) -> None:
    model = case.build(device="cuda")
    ids = tokens_for(model, 2, 17)
    before = logits(model, input_ids=ids)
    hf_fuse.patch(model)
    for inputs in (
        {"input_ids": ids.cpu()},
        {"inputs_embeds": embeddings_of(model, ids).cpu()},
    ):
        with pytest.raises(RuntimeError, match="cpu"):
            logits(model, **inputs)
    assert_same(logits(model, input_ids=ids), before)


@pytest.mark.cuda
@cases(PLAIN)
def test_a_patched_model_moves_between_devices(case: Case) -> None:
    model = case.build(device="cpu")
    ids = tokens_for(model, 2, 17)
    before = logits(model, input_ids=ids)
    hf_fuse.patch(model)
    assert_same(logits(model.cuda(), input_ids=ids.cuda()).cpu(), before)
    assert_same(logits(model.cpu(), input_ids=ids), before)


@cases((LLAMA, GPT2))
def test_a_layer_takes_the_cache_by_either_name(case: Case, device: str) -> None:
    model = hf_fuse.patch(case.build(device=device))
    hidden = torch.randn(2, 5, model.config.hidden_size, device=device)
    options = {}
    if case is LLAMA:
        positions = torch.arange(5, device=device)[None]
        options["position_embeddings"] = model.model.rotary_emb(hidden, positions)
    outputs = []
    for name in (CACHE, "past_key_values"):
        cache = DynamicCache(config=model.config)
        outputs.append(layers_of(model)[0](hidden, **{name: cache}, **options))
        assert cache.get_seq_length() == 5
    assert torch.equal(*outputs)
