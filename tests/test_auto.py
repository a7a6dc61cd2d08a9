"""register: transformers' Auto classes give patched models, and give up what they gave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import FAMILY, PLAIN, Case, cases, tokens_for
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

import hf_fuse
from hf_fuse.auto import _mappings
from hf_fuse.eval.loading import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")
each_case = cases(PLAIN, FAMILY)
HEADS = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    before = entries()
    yield
    hf_fuse.unregister()
    assert entries() == before


def entries() -> list[Any]:
    """Each mapping object, what was put into it, and the class it gives for each config."""
    configs = {type(case.config()) for case in (*PLAIN, *FAMILY)}
    return [(m, dict(m._extra_content), {c: m.get(c, None) for c in configs}) for m in _mappings()]


def saved(case: Case, folder: Path, head: str = "ForCausalLM", **options: Any) -> PreTrainedModel:
    model = case.build(head)
    model.save_pretrained(folder, **options)
    return model


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def greedy(model: PreTrainedModel) -> Tensor:
    return model.generate(
        tokens_for(model, 2, 7), max_new_tokens=20, do_sample=False, pad_token_id=0
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@each_case
def test_there_and_back(case: Case, shard: str, tied: bool, tmp_path: Path) -> None:
    """Registered, loaded, generated, saved, loaded without hf_fuse: the same to the last bit."""
    first, second = tmp_path / "first", tmp_path / "second"
    model = case.build(tie_word_embeddings=tied)
    model.save_pretrained(first, max_shard_size=shard)
    assert (len(list(first.glob("*.safetensors"))) > 1) == (shard == "20KB")
    hf_fuse.register()
    fused = AutoModelForCausalLM.from_pretrained(first)
    assert hf_fuse.is_patched(fused)
    assert isinstance(fused, type(model))
    assert fused._tp_plan == model._tp_plan
    assert torch.equal(greedy(fused), greedy(model))
    fused.save_pretrained(second, max_shard_size=shard)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0]["architectures"] == configs[1]["architectures"] == [type(model).__name__]
    assert tensors_in(first).keys() == tensors_in(second).keys()
    hf_fuse.unregister()
    again = AutoModelForCausalLM.from_pretrained(second)
    assert type(again) is type(model)
    assert not hf_fuse.is_patched(again)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    embeddings = (again.get_input_embeddings().weight, again.get_output_embeddings().weight)
    assert (embeddings[0] is embeddings[1]) == tied
    ids = tokens_for(model, 2, 7)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(greedy(again), greedy(model))


@pytest.mark.parametrize("head", HEADS)
@each_case
def test_every_head(case: Case, head: str, tmp_path: Path) -> None:
    if type(case.config()) not in HEADS[head]._model_mapping:
        pytest.skip(f"transformers has no {HEADS[head].__name__} of {case.model_type}")
    model = saved(case, tmp_path, head)
    with hf_fuse.registered():
        fused = HEADS[head].from_pretrained(tmp_path)
    assert hf_fuse.is_patched(fused)
    assert isinstance(fused, type(model))
    ids = tokens_for(model, 2, 7)
    with torch.no_grad():
        torch.testing.assert_close(fused(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-4)


@each_case
def test_as_patch_would(case: Case, tmp_path: Path) -> None:
    model = saved(case, tmp_path)
    hf_fuse.register(ops={"add_norm"}, backend="reference")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    other = hf_fuse.patch(model, ops={"add_norm"}, backend="reference")
    assert str(hf_fuse.report(loaded)) == str(hf_fuse.report(other))
    hf_fuse.register()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    other = hf_fuse.patch(model)
    assert str(hf_fuse.report(loaded)) == str(hf_fuse.report(other))


def test_options_of_from_pretrained(tmp_path: Path) -> None:
    saved(PLAIN[0], tmp_path)
    hf_fuse.register()
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager"
    )
    assert hf_fuse.is_patched(loaded)
    assert not info["missing_keys"]
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    config = AutoConfig.from_pretrained(tmp_path)
    assert hf_fuse.is_patched(AutoModelForCausalLM.from_config(config))
    assert hf_fuse.is_patched(AutoModelForCausalLM._model_mapping[type(config)](config))


def test_a_pipeline_that_loads_the_model() -> None:
    options = {"max_new_tokens": 9, "do_sample": False}
    texts = []
    for fused in (False, True):
        with hf_fuse.registered() if fused else nullcontext():
            generator = pipeline("text-generation", model=str(MODELS / "llama"))
        assert hf_fuse.is_patched(generator.model) == fused
        texts.append(generator("The class statement", **options))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_map(device_map: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = saved(PLAIN[0], tmp_path)
    hf_fuse.register()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert hf_fuse.is_patched(loaded)
    assert torch.equal(greedy(loaded).cpu(), greedy(model))


def test_registered_nests_and_ends_with_an_error() -> None:
    before = entries()
    hf_fuse.register(backend="reference")
    outer = AutoModelForCausalLM._model_mapping[LlamaConfig]
    assert outer is not LlamaForCausalLM
    with pytest.raises(KeyError), hf_fuse.registered():
        raise KeyError
    model = AutoModelForCausalLM.from_config(PLAIN[0].config())
    (backend,) = {module.backend for module in hf_fuse.report(model).modules}
    assert backend.startswith("the reference")
    hf_fuse.unregister()
    hf_fuse.unregister()
    assert entries() == before
    assert AutoModelForCausalLM._model_mapping[LlamaConfig] is LlamaForCausalLM


def test_what_the_user_registered_stays() -> None:
    class Own(LlamaForCausalLM):
        pass

    mapping = AutoModelForCausalLM._model_mapping
    mapping._extra_content[LlamaConfig] = Own
    try:
        with hf_fuse.registered():
            assert mapping[LlamaConfig] is Own
            assert AutoModel._model_mapping[LlamaConfig] is not transformers.LlamaModel
        assert mapping[LlamaConfig] is Own
    finally:
        del mapping._extra_content[LlamaConfig]
    with hf_fuse.registered():
        mapping._extra_content[LlamaConfig] = Own
    assert mapping[LlamaConfig] is Own
    del mapping._extra_content[LlamaConfig]


def test_what_cannot_be_patched_is_loaded_as_it_is(tmp_path: Path) -> None:
    case = next(c for c in PLAIN if c.model_type == "gpt2")
    case.build(add_cross_attention=True).save_pretrained(tmp_path)
    with hf_fuse.registered():
        assert not hf_fuse.is_patched(AutoModelForCausalLM.from_pretrained(tmp_path))
    with (
        hf_fuse.registered(strict=True),
        pytest.raises(hf_fuse.UnsupportedModelError, match="cross"),
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernels": 1}, TypeError, "hf_fuse.register: .*unexpected keyword argument 'kernels'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*got 'gpu'"),
        ({"ops": {"adds"}}, ValueError, "ops must be among .*adds"),
    ],
)
def test_errors_leave_all_as_it_was(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = entries()
    with pytest.raises(error, match=message):
        hf_fuse.register(**arguments)
    assert entries() == before


@pytest.mark.parametrize("value", ["1", "0"])
def test_at_import(value: str) -> None:
    program = (
        "import hf_fuse\n"
        "from transformers import AutoModel, LlamaConfig, LlamaModel\n"
        "print(AutoModel._model_mapping[LlamaConfig] is not LlamaModel)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_FUSE_AUTO": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == [str(value == "1")]
