"""generate on the decode engine: transformers' tokens; transformers' loop where it stands back."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from answers import left_to_transformers, steps_taken
from helpers import count_ops
from models import (
    FAMILY,
    GPT2,
    LLAMA,
    PLAIN,
    TRAINED,
    VARIANTS,
    Case,
    cases,
    each_real_shape,
    heads_of_16,
    padded,
    tokens_for,
)
from torch import Tensor, nn
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import hf_fuse
from hf_fuse.decode.loop import engine_of
from hf_fuse.decode.sampling import selection_of
from hf_fuse.eval.loading import load_model
from hf_fuse.modules import CACHE, state_of

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
NAN = float("nan")


def compare(model: PreTrainedModel, new: int = 24, **inputs: Any) -> Any:
    """Greedy tokens of the engine and of the unpatched model are the same; returns the former."""
    arguments = {"max_new_tokens": new, **GREEDY, **inputs}
    expected = model.generate(**copy.deepcopy(arguments))
    hf_fuse.patch(model, verify=False)
    actual = model.generate(**arguments)
    sequences = [x if isinstance(x, Tensor) else x.sequences for x in (actual, expected)]
    assert sequences[0].tolist() == sequences[1].tolist()
    assert left_to_transformers(model) == []
    assert steps_taken(model) >= sequences[0].shape[1] - inputs["input_ids"].shape[1]
    return actual, expected


def compare_greedy(model: PreTrainedModel, batch: int, new: int) -> None:
    """`compare` for one sequence, or for several with padding at their left."""
    ids = tokens_for(model, batch, 19)
    compare(model, new, **(padded(ids, "left") if batch > 1 else {"input_ids": ids}))


@cases(VARIANTS, FAMILY)
@pytest.mark.parametrize("batch", [1, 5])
def test_greedy_tokens_are_the_unpatched_models(case: Case, batch: int, device: str) -> None:
    compare_greedy(heads_of_16(case).build(device=device), batch, 128)


@cases(TRAINED)
@pytest.mark.parametrize("batch", [1, 5])
def test_256_greedy_tokens_of_trained_models(case: Case, batch: int, device: str) -> None:
    """GPT-2 has positions for 237 after the prompt."""
    compare_greedy(case.build(device=device), batch, 237 if case.model_type == "gpt2" else 256)


@each_real_shape
@pytest.mark.parametrize("batch", [1, 5])
def test_256_greedy_tokens_at_real_shapes(case: Case, batch: int, device: str) -> None:
    compare_greedy(case.build(device=device), batch, 256)


@cases(PLAIN)
def test_more_sequences_than_the_kernels_are_for(case: Case, device: str) -> None:
    model = heads_of_16(case).build(device=device)
    inputs = padded(tokens_for(model, 12, 40), "left")
    with count_ops() as calls:
        compare(model, 24, **inputs)
    assert (calls["hf_fuse::decode_linear"] == 0) == (device == "cuda")
    assert calls["hf_fuse::decode_attention"]


@cases(PLAIN)
def test_projections_by_matrix_products_alone(
    case: Case, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_fuse.decode.projection.by_matmul", lambda x, projection, backend: True)
    model = heads_of_16(case).build(device=device)
    with count_ops() as calls:
        compare(model, 24, **padded(tokens_for(model, 3, 13), "left"))
    assert calls["hf_fuse::decode_linear"] == calls["hf_fuse::decode_linear_two"] == 0
    assert calls["hf_fuse::decode_attention"]


@cases(PLAIN)
@pytest.mark.parametrize("batch", [1, 2])
def test_prompts_run_again_give_the_same_bits(case: Case, batch: int, device: str) -> None:
    model = heads_of_16(case).build(device=device)
    prompts = [tokens_for(model, batch, length) for length in (9, 16, 17, 100)]
    arguments = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}

    def run(ids: Tensor) -> Any:
        out = model.generate(input_ids=ids, **arguments, **GREEDY)
        keys = [layer.keys for layer in out[CACHE].layers]
        return out.sequences, out.logits, keys

    expected = [run(ids)[0].tolist() for ids in prompts]
    hf_fuse.patch(model, verify=False)
    first = [run(ids) for ids in prompts]
    assert [sequences.tolist() for sequences, *_ in first] == expected
    for _ in range(2):  # on a GPU these are a graph's replays
        for ids, (sequences, logits, keys) in zip(reversed(prompts), reversed(first), strict=True):
            again = run(ids)
            assert torch.equal(again[0], sequences)
            assert all(map(torch.equal, again[1], logits))
            assert all(map(torch.equal, again[2], keys))
    assert left_to_transformers(model) == []


@cases(PLAIN)
def test_one_new_token_and_one_token_of_prompt(case: Case, device: str) -> None:
    model = heads_of_16(case).build(device=device)
    compare(model, 1, input_ids=tokens_for(model, 2, 1))
    hf_fuse.unpatch(model)
    compare(model, 5, input_ids=tokens_for(model, 2, 1))


@cases(PLAIN)
def test_sequences_end_at_any_of_several_eos(case: Case, device: str) -> None:
    model = heads_of_16(case).build(device=device)
    inputs = padded(tokens_for(model, 4, 13), "left")
    free = model.generate(**inputs, max_new_tokens=20, **GREEDY)[:, 13:]
    eos = [int(free[0, 4]), int(free[1, 7]), int(free[2, 0]), int(free[3, 11])]
    actual, _ = compare(model, 20, eos_token_id=eos, **inputs)
    assert actual.shape[1] < 13 + 20
    assert model.generate(**inputs, max_new_tokens=20, **GREEDY)[:, 13:].tolist() == free.tolist()


@cases(PLAIN)
@pytest.mark.parametrize("least", [{"min_new_tokens": 9}, {"min_length": 13 + 9}])
def test_sequences_do_not_end_before_a_least_length(
    case: Case, least: dict[str, int], device: str
) -> None:
    model = heads_of_16(case).build(device=device)
    inputs = padded(tokens_for(model, 3, 13), "left")
    free = model.generate(**inputs, max_new_tokens=20, **GREEDY)[:, 13:]
    eos = [int(free[0, 2]), int(free[1, 4]), int(free[2, 12])]
    actual, _ = compare(model, 20, eos_token_id=eos, **least, **inputs)
    assert not torch.isin(actual[:, 13 : 13 + 9].cpu(), torch.tensor(eos)).any()


def test_eos_as_the_first_token(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    ids = tokens_for(model, 1, 9)
    first = int(model.generate(input_ids=ids, max_new_tokens=1, **GREEDY)[0, -1])
    actual, _ = compare(model, 9, input_ids=ids, eos_token_id=first)
    assert actual.shape[1] == 10


@cases(PLAIN)
def test_scores_logits_and_cache_are_returned(case: Case, device: str) -> None:
    model = heads_of_16(case).build(device=device)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    actual, expected = compare(model, 12, input_ids=tokens_for(model, 2, 7), **wanted)
    for name in ("scores", "logits"):
        ours, theirs = torch.stack(getattr(actual, name)), torch.stack(getattr(expected, name))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours, theirs = actual[CACHE], expected[CACHE]
    assert type(ours) is type(theirs)
    assert ours.get_seq_length() == theirs.get_seq_length() == 7 + 11
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.values, other.values, rtol=1e-4, atol=1e-4)


@cases(PLAIN)
@pytest.mark.parametrize("cache_type", [DynamicCache, StaticCache])
def test_a_cache_passed_in_is_continued(case: Case, cache_type: Any, device: str) -> None:
    model = heads_of_16(case).build(device=device)
    size = {"max_cache_len": 60} if cache_type is StaticCache else {}
    ids = tokens_for(model, 2, 9)
    arguments = {"max_new_tokens": 10, **GREEDY}

    def two_calls() -> tuple[Tensor, int]:
        cache = cache_type(config=model.config, **size)

        def call(ids: Tensor) -> Tensor:
            mask = torch.ones_like(ids)
            return model.generate(input_ids=ids, attention_mask=mask, **{CACHE: cache}, **arguments)

        second = call(torch.cat([call(ids), ids[:, :3]], -1))
        return second, int(cache.get_seq_length())

    expected, expected_length = two_calls()
    hf_fuse.patch(model)
    actual, length = two_calls()
    assert actual.tolist() == expected.tolist()
    assert length == expected_length
    assert left_to_transformers(model) == []


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


def test_streamer_hears_what_it_heard(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    ids, heard = tokens_for(model, 1, 6), []
    for patch in (False, True):
        if patch:
            hf_fuse.patch(model)
        listener = Listener()
        model.generate(input_ids=ids, max_new_tokens=7, streamer=listener, **GREEDY)
        heard.append(listener.heard)
    assert heard[0] == heard[1]
    assert steps_taken(model) == 7


def test_max_time_stops(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    hf_fuse.patch(model)
    out = model.generate(
        input_ids=tokens_for(model, 1, 6), max_new_tokens=140, max_time=0.0, **GREEDY
    )
    assert out.shape[1] == 7
    assert left_to_transformers(model) == []


class Shift(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.roll(1, -1)


class AfterFour:
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 10, device=input_ids.device)


# What a GPU selects on the device; a CPU leaves it to transformers' processors.
DEVICE_SELECTED: dict[str, dict[str, Any]] = {
    "no filter": {"do_sample": True, "top_k": 0},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 7},
    "top_p": {"do_sample": True, "top_p": 0.8},
    "min_p": {"do_sample": True, "min_p": 0.05},
    "all": {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "a penalty and all": {
        "do_sample": True,
        "repetition_penalty": 1.3,
        "min_new_tokens": 5,
        "temperature": 0.9,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.02,
    },
    "several": {"do_sample": True, "num_return_sequences": 3},
}
HOST_SELECTED: dict[str, dict[str, Any]] = {
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "sampling and no_repeat_ngram": {"do_sample": True, "no_repeat_ngram_size": 2},
    "a logits processor": {"logits_processor": LogitsProcessorList([Shift()])},
    "a stopping criterion": {"stopping_criteria": StoppingCriteriaList([AfterFour()])},
    "scores": {
        "do_sample": True,
        "top_k": 9,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    },
}


def with_a_seed(model: PreTrainedModel, *calls: dict[str, Any]) -> tuple[Any, Counter[str]]:
    """What the calls return one after another, patched and unpatched: the same tokens, and the
    generator left in the same state. Returns them and the ops of the patched calls.
    """
    found, drawn = [], []
    for patch in (False, True):
        if patch:
            hf_fuse.patch(model, verify=False)
        torch.manual_seed(5)
        with count_ops() as ops:
            found.append([model.generate(**{**GREEDY, **call}) for call in calls])
        drawn.append(torch.rand(3, device=model.device).tolist())
    tokens = [[x if isinstance(x, Tensor) else x.sequences for x in each] for each in found]
    assert [t.tolist() for t in tokens[1]] == [t.tolist() for t in tokens[0]]
    assert drawn[1] == drawn[0]
    assert left_to_transformers(model) == []
    return found, ops


def assert_selected(ops: Counter[str], on_device: bool, sampled: bool = True) -> None:
    assert (ops["hf_fuse::decode_sample"] > 0) == on_device
    assert (ops["aten::multinomial"] > 0) == (sampled and not on_device)


@cases(PLAIN)
@pytest.mark.parametrize("what", [*DEVICE_SELECTED, *HOST_SELECTED])
def test_sampling_and_processors_give_transformers_tokens(
    case: Case, what: str, device: str
) -> None:
    model = heads_of_16(case).build(device=device)
    inputs = padded(tokens_for(model, 2, 6), "left")
    options = {**DEVICE_SELECTED, **HOST_SELECTED}[what]
    found, ops = with_a_seed(model, {"max_new_tokens": 20, **inputs, **options})
    on_device = device == "cuda" and what in DEVICE_SELECTED
    assert_selected(ops, on_device, options.get("do_sample", False))
    sequences = found[1][0] if isinstance(found[1][0], Tensor) else found[1][0].sequences
    new = sequences.shape[1] - 6
    assert steps_taken(model) == (new if on_device else new - 1)  # the last token is not put
    if what == "scores":
        for name in ("scores", "logits"):
            pair = [torch.stack(getattr(x, name)) for (x,) in found]
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


@cases(PLAIN)
@pytest.mark.parametrize("batch", [1, 3, 12])
def test_sampled_sequences_end_and_the_next_call_draws_on(
    case: Case, batch: int, device: str
) -> None:
    model = heads_of_16(case).build(device=device)
    inputs = padded(tokens_for(model, batch, 40), "left")
    call = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.9, **inputs}
    torch.manual_seed(5)
    free = model.generate(**{**GREEDY, **call})[:, 40:]
    eos = free[torch.arange(batch), torch.arange(batch) % 5 + 2].unique().tolist()
    call["eos_token_id"] = eos
    other = {**call, "temperature": 1.4, "top_k": 20, "repetition_penalty": 1.1}
    (_, actual), ops = with_a_seed(model, call, other, call)
    assert_selected(ops, device == "cuda")
    assert actual[0].shape[1] < 40 + 30


@pytest.mark.parametrize("what", DEVICE_SELECTED)
def test_the_path_of_the_device_in_plain_torch(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no kernel for it, but the loop, the engine and the op's reference run there."""

    def as_on_a_gpu(*arguments: Any) -> Any:
        return selection_of(*arguments[:-1], torch.device("cuda"))

    monkeypatch.setattr("hf_fuse.decode.loop.selection_of", as_on_a_gpu)
    model = heads_of_16(LLAMA).build(device="cpu")
    inputs = padded(tokens_for(model, 2, 6), "left")
    call = {"max_new_tokens": 20, **inputs, **DEVICE_SELECTED[what]}
    found, ops = with_a_seed(model, call, call)
    assert steps_taken(model) == found[1][1].shape[1] - 6
    assert ops["aten::multinomial"] == 0
    assert (ops["aten::exponential_"] > 0) == DEVICE_SELECTED[what].get("do_sample", False)


@pytest.mark.cuda
def test_other_filters_need_no_other_graph() -> None:
    model = heads_of_16(LLAMA).build(device="cuda")
    call = {"input_ids": tokens_for(model, 1, 8), "max_new_tokens": 12, "do_sample": True}
    others = {"repetition_penalty", "num_return_sequences"}  # which need other buffers
    calls = [{**call, **options} for options in DEVICE_SELECTED.values() if not others & {*options}]
    _, ops = with_a_seed(model, *calls)
    # Each call's first selection; a graph's trial run and its capture.
    assert ops["hf_fuse::decode_sample"] == len(calls) + 2


@pytest.mark.cuda
def test_greedy_and_sampled_calls_in_turns() -> None:
    model = heads_of_16(LLAMA).build(device="cuda")
    greedy = {"input_ids": tokens_for(model, 2, 8), "max_new_tokens": 12}
    sampled = {**greedy, "do_sample": True}
    found, _ = with_a_seed(model, greedy, sampled, {**greedy, "no_repeat_ngram_size": 2}, sampled)
    _, actual = found
    assert actual[1].tolist() != actual[3].tolist()
    assert actual[0].tolist() == model.generate(**{**GREEDY, **greedy}).tolist()


@pytest.mark.cuda
def test_sampling_from_nan_raises_as_multinomial_does() -> None:
    model = heads_of_16(LLAMA).build(device="cuda")
    hf_fuse.patch(model, verify=False)
    arguments = {"input_ids": tokens_for(model, 1, 8), "max_new_tokens": 6, "pad_token_id": 0}
    expected = model.generate(**arguments, do_sample=False).tolist()
    weight = model.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(NAN)
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        model.generate(**arguments, do_sample=True)
    with torch.no_grad():
        weight.copy_(kept)
    assert model.generate(**arguments, do_sample=False).tolist() == expected


ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "hidden states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states",
    ),
    "no cache": ({"use_cache": False}, "cache"),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_what_the_engine_leaves_to_transformers(what: str, device: str) -> None:
    options, reason = ELSEWHERE[what]
    model = heads_of_16(LLAMA).build(device=device)
    ids = tokens_for(model, 2, 6)
    expected = model.generate(input_ids=ids, max_new_tokens=9, **GREEDY, **options)
    hf_fuse.patch(model)
    actual = model.generate(input_ids=ids, max_new_tokens=9, **GREEDY, **options)
    pair = [x if isinstance(x, Tensor) else x.sequences for x in (actual, expected)]
    assert pair[0].tolist() == pair[1].tolist()
    assert reason in left_to_transformers(model)[0]
    assert reason in str(hf_fuse.report(model))
    assert steps_taken(model) == 0


def test_right_padding_hooks_training_and_own_positions_go_elsewhere(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    hf_fuse.patch(model)
    ids = tokens_for(model, 2, 6)
    calls: dict[str, Any] = {"left padding": padded(ids, "right"), "forward hooks": {}}
    for reason, inputs in calls.items():
        handle = None
        if not inputs:
            handle = model.model.layers[0].mlp.register_forward_hook(lambda *a: None)
        model.generate(**{"input_ids": ids, **inputs}, max_new_tokens=2, **GREEDY)
        assert reason in left_to_transformers(model)[-1]
        if handle:
            handle.remove()
    model.train().generate(input_ids=ids, max_new_tokens=2, **GREEDY)
    assert "training mode" in left_to_transformers(model)
    own = torch.arange(3, 9, device=device).expand(2, 6)
    model.eval().generate(input_ids=ids, position_ids=own, max_new_tokens=2, **GREEDY)
    assert "position_ids of the caller's own" in left_to_transformers(model)


@cases(PLAIN)
def test_weights_that_change_between_calls_are_seen(case: Case, device: str) -> None:
    model, other = (
        heads_of_16(case).build(device=device),
        heads_of_16(case).build(device=device, seed=1),
    )
    ids = tokens_for(model, 1, 8)
    hf_fuse.patch(model)
    arguments = {"input_ids": ids, "max_new_tokens": 12, **GREEDY}
    before = model.generate(**arguments)
    expected = other.generate(**arguments)
    for (name, parameter), new in zip(
        list(model.named_parameters()), other.parameters(), strict=True
    ):
        if name.endswith("norm.weight"):  # in place
            parameter.data.copy_(new)
        else:  # another parameter
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(new.detach().clone()))
    model.tie_weights()
    assert model.generate(**arguments).tolist() == expected.tolist() != before.tolist()


def test_inference_mode_and_then_without(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    arguments = {**GREEDY, "input_ids": tokens_for(model, 2, 6), "max_new_tokens": 9}
    hf_fuse.patch(model, verify=False)
    for options in ({}, {"do_sample": True}, {"repetition_penalty": 1.2}):
        found = []
        for inference in (True, False):
            torch.manual_seed(5)
            with torch.inference_mode(inference):
                found.append(model.generate(**{**arguments, **options}).tolist())
        assert found[0] == found[1]
    assert left_to_transformers(model) == []


def test_longer_calls_and_other_batches_make_the_engine_anew(device: str) -> None:
    case = heads_of_16(LLAMA)
    model, unpatched = (case.build(device=device, max_position_embeddings=1024) for _ in range(2))
    hf_fuse.patch(model)
    engines = []
    for batch, new in ((1, 10), (1, 12), (1, 300), (3, 10), (1, 12)):
        arguments = {"input_ids": tokens_for(model, batch, 5), "max_new_tokens": new, **GREEDY}
        assert model.generate(**arguments).tolist() == unpatched.generate(**arguments).tolist()
        with engine_of(model) as engine:
            engines.append(engine)
    anew = [a is not b for a, b in pairwise(engines)]
    assert anew == [False, True, True, True]
    assert left_to_transformers(model) == []


def test_dtype_changes_and_half_precision(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    ids = tokens_for(model, 1, 8)
    hf_fuse.patch(model)
    model.generate(input_ids=ids, max_new_tokens=4, **GREEDY)
    model.to(torch.bfloat16)
    assert model.generate(input_ids=ids, max_new_tokens=4, **GREEDY).shape == (1, 12)
    with engine_of(model) as engine:
        assert engine is not None
        assert engine.dtype == torch.bfloat16
    model.generate(input_ids=ids, max_new_tokens=4, **GREEDY)
    with engine_of(model) as again:
        assert again is engine
    assert left_to_transformers(model) == []


@cases(PLAIN)
def test_unpatch_gives_the_weights_back_as_they_lay(case: Case, device: str) -> None:
    model = heads_of_16(case).build(device=device)
    strides = {n: p.stride() for n, p in model.named_parameters()}
    ids = tokens_for(model, 1, 8)
    before = model(ids).logits
    keys = {name: set(m.__dict__) for name, m in model.named_modules()}
    hf_fuse.patch(model)
    model.generate(input_ids=ids, max_new_tokens=4, **GREEDY)
    hf_fuse.unpatch(model)
    assert {n: p.stride() for n, p in model.named_parameters()} == strides
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == keys
    assert torch.equal(model(ids).logits, before)
    assert type(model).__mro__[0].__module__.startswith("transformers")


@cases(PLAIN, FAMILY)
def test_copies_pickles_and_checkpoints_after_generating(
    case: Case, device: str, tmp_path: Any
) -> None:
    model = heads_of_16(case).build(device=device)
    ids = tokens_for(model, 1, 8)
    hf_fuse.patch(model)
    arguments = {"input_ids": ids, "max_new_tokens": 6, **GREEDY}
    expected = model.generate(**arguments).tolist()
    model.save_pretrained(tmp_path)
    loaded = state_of(model).original.from_pretrained(tmp_path).to(device).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert other.generate(**arguments).tolist() == expected


def test_an_interrupted_call_leaves_the_engine_usable(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    ids = tokens_for(model, 1, 8)
    hf_fuse.patch(model)
    arguments = {"input_ids": ids, "max_new_tokens": 6, **GREEDY}
    expected = model.generate(**arguments).tolist()

    class Interrupting(Listener):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.heard) == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(streamer=Interrupting(), **arguments)
    assert model.generate(**arguments).tolist() == expected
    assert left_to_transformers(model) == []


def test_two_threads_get_their_own_answers(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    ids = [tokens_for(model, 1, 8, seed) for seed in range(4)]
    arguments = {"max_new_tokens": 40, **GREEDY}
    expected = [model.generate(input_ids=i, **arguments).tolist() for i in ids]
    hf_fuse.patch(model)
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(
            target=lambda n=n: found.update({n: model.generate(input_ids=ids[n], **arguments)})
        )
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n].tolist() for n in range(4)] == expected


def test_heads_the_kernels_cannot_take_go_to_transformers(device: str) -> None:
    model = LLAMA.build(device=device)
    hf_fuse.patch(model)
    model.generate(input_ids=tokens_for(model, 1, 8), max_new_tokens=5, **GREEDY)
    expected = ["head_dim 12 is not a multiple of 8 up to 256"] if device == "cuda" else []
    assert left_to_transformers(model) == expected


def test_without_decode_the_class_stays(device: str) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    original = type(model)
    hf_fuse.patch(model, ops={"add_norm", "rotary"})
    assert type(model) is original
    hf_fuse.patch(model, ops={"decode"})
    assert type(model) is not original
    assert type(model).__name__ == original.__name__
    model.generate(input_ids=tokens_for(model, 1, 8), max_new_tokens=5, **GREEDY)
    assert steps_taken(model) == 5


def test_a_static_cache_too_short_goes_to_transformers() -> None:
    model = heads_of_16(LLAMA).build(
        device="cpu"
    )  # on a GPU transformers' own error takes the context with it
    hf_fuse.patch(model)
    cache = StaticCache(config=model.config, max_cache_len=10)
    ids = tokens_for(model, 1, 8)
    with pytest.raises((IndexError, RuntimeError)):  # transformers' own
        model.generate(input_ids=ids, max_new_tokens=9, **{CACHE: cache}, **GREEDY)
    assert "the static cache is too short" in left_to_transformers(model)


@cases((LLAMA, GPT2))  # transformers 5.24 has it for no GPT-NeoX
def test_continuous_batching(case: Case) -> None:
    model = case.build(device="cpu", attention="sdpa")
    rows = tokens_for(model, 2, 9).tolist()
    config = GenerationConfig(max_new_tokens=6, eos_token_id=-1, **GREEDY)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    answers = []
    for patch in (False, True):
        if patch:
            hf_fuse.patch(model)
        outputs = model.generate_batch(
            inputs=[rows[0], rows[1][:5]], generation_config=config, progress_bar=False,
            continuous_batching_config=small,
        )  # fmt: skip
        answers.append([output.generated_tokens for output in outputs.values()])
    assert [len(tokens) for tokens in answers[0]] == [6, 6]
    assert answers[0] == answers[1]


@pytest.fixture
def trained(device: str) -> tuple[Any, Any]:
    """A tiny trained model with its tokenizer."""
    return load_model("tiny-llama", dtype="float32", device=device, progress=False)


def test_the_text_generation_pipeline(trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    texts = []
    for patch in (False, True):
        if patch:
            hf_fuse.patch(model, verify=False)
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        prompts = ["The class statement", "A function"]
        texts.append(generator(prompts, max_new_tokens=20, do_sample=False))
    assert texts[0] == texts[1]
    assert steps_taken(model) == 20
    assert left_to_transformers(model) == []


def test_a_text_iterator_in_another_thread(trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    arguments = {
        **tokenizer("The class statement", return_tensors="pt").to(model.device),
        "max_new_tokens": 20,
        "do_sample": False,
    }
    texts = []
    for patch in (False, True):
        if patch:
            hf_fuse.patch(model, verify=False)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=model.generate, kwargs={**arguments, "streamer": streamer})
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20
    assert left_to_transformers(model) == []


def test_an_empty_prompt_is_what_it_was(trained: tuple[Any, Any], device: str) -> None:
    model, _ = trained
    empty = torch.zeros(1, 0, dtype=torch.int64, device=device)
    found = []
    for patch in (False, True):
        if patch:
            hf_fuse.patch(model, verify=False)
        found.append(model.generate(max_new_tokens=5, **GREEDY).tolist())  # from the first token on
        with pytest.raises(RuntimeError, match="0 elements"):  # transformers' own
            model.generate(empty, max_new_tokens=5, **GREEDY)
    assert found[0] == found[1]
    found.append(model.generate(max_new_tokens=5, **GREEDY).tolist())  # the model is usable
    assert found[1] == found[2]


@pytest.mark.parametrize("taken_by", ["__init__", "prepare"])
def test_without_memory_for_the_engine_transformers_generates(
    taken_by: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = heads_of_16(LLAMA).build(device=device)
    arguments = {"input_ids": tokens_for(model, 1, 6), "max_new_tokens": 9, **GREEDY}
    expected = model.generate(**arguments).tolist()
    hf_fuse.patch(model, verify=False)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(f"hf_fuse.decode.loop.DecodeEngine.{taken_by}", full)
        assert model.generate(**arguments).tolist() == expected
    assert left_to_transformers(model) == ["no memory for the engine"]
    assert model.generate(**arguments).tolist() == expected  # and then on the engine
    assert len(left_to_transformers(model)) == 1
