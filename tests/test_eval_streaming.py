"""hf-fuse ppl --streaming: the cache's own numbers, flat over a long text, saved and shown."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_fuse import StreamingCache, cli
from hf_fuse.decode.engine import DecodeEngine
from hf_fuse.eval import pages
from hf_fuse.eval import streaming as evaluation
from hf_fuse.eval.loading import encode, load_model
from hf_fuse.eval.streaming import StreamingResult, evaluate_streaming
from hf_fuse.eval.text import pydoc_text
from hf_fuse.modules import CACHE

MODELS = ("tiny-llama", "tiny-gpt_neox")
QUIET = {"progress": False}
pytestmark = pytest.mark.usefixtures("one_thread", "few_turns")


@pytest.fixture
def few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BLOCKS", 2)


def model_and_text(name: str, device: str, length: int) -> tuple[Any, Tensor]:
    model, tokenizer = load_model(name, dtype="float32", device=device, progress=False)
    return model, encode(tokenizer, pydoc_text("train"), length)


def nll_over_the_cache(model: PreTrainedModel, ids: Tensor, cache: StreamingCache) -> Tensor:
    """Token by token through the modules."""
    found = []
    with torch.no_grad():
        for token, target in pairwise(ids):
            new = token.view(1, 1).to(model.device)
            logits = model(input_ids=new, **{CACHE: cache}).logits[0, -1]
            found.append(-float(logits.double().log_softmax(-1)[target]))
    return torch.tensor(found)


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_scores_what_the_cache_answers(name: str, device: str) -> None:
    model, ids = model_and_text(name, device, 300)
    result = evaluate_streaming(model, ids, sinks=4, window=28, **QUIET)
    for reading in (result.streaming, result.plain):
        nll = nll_over_the_cache(model, ids, StreamingCache(model, reading.sinks, reading.window))
        expected = [math.exp(float(part.mean())) for part in nll.tensor_split(4)]
        assert reading.quarters == pytest.approx(expected, rel=1e-4)
    assert result.full.window == 300
    assert "decode" in {module.op for module in result.report.modules}


def check_flat(result: StreamingResult) -> None:
    """As the text is when nothing is evicted; a cache of everything is not."""
    for streamed, afresh in zip(result.streaming.quarters, result.afresh.quarters, strict=True):
        assert streamed == pytest.approx(afresh, rel=0.05)
    assert result.full.quarters[-1] > 1.1 * result.streaming.quarters[-1]


@pytest.mark.parametrize(
    "name", [MODELS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in MODELS[1:])]
)
def test_perplexity_stays_where_it_was(name: str, device: str) -> None:
    model, ids = model_and_text(name, device, 2000)
    check_flat(evaluate_streaming(model, ids, sinks=4, window=252, **QUIET))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_perplexity_stays_where_it_was_for_20000_tokens(name: str, device: str) -> None:
    model, ids = model_and_text(name, device, 20000)
    check_flat(evaluate_streaming(model, ids, sinks=4, window=256, **QUIET))


def test_a_step_takes_the_same_slots_at_any_length(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """What a step reads is bounded, and each is the same kernels."""
    model, ids = model_and_text("tiny-llama", device, 800)
    lengths, before = [], DecodeEngine.advance

    def advance(engine: DecodeEngine, select: bool = True) -> None:
        before(engine, select)
        if engine.rolling:
            lengths.append((engine.rolling.held, engine.capacity))

    monkeypatch.setattr(DecodeEngine, "advance", advance)
    evaluate_streaming(model, ids, sinks=4, window=60, **QUIET)
    assert {capacity for _, capacity in lengths} == {256}
    assert max(held for held, _ in lengths) == 256


def test_ppl_streaming_prints_saves_and_shows(tmp_path: Any, capsys: Any) -> None:
    saved, picture, page = (tmp_path / f"streaming.{kind}" for kind in ("json", "png", "html"))
    options = ["--streaming", "sinks=2,window=62", "--max-tokens", "400", "--device", "cpu"]
    outputs = ["--json", str(saved), "--png", str(picture), "--html", str(page)]
    assert cli.main(["ppl", "tiny-gpt_neox", "--dtype", "float32", *options, *outputs]) == 0
    printed, document = capsys.readouterr().out, json.loads(saved.read_text())
    streamed, plain, full, afresh = document["result"]["readings"]
    assert document["kind"] == "streaming"
    assert (streamed["sinks"], streamed["window"], plain["window"]) == (2, 62, 64)
    for reading in (streamed, plain, full, afresh):
        for perplexity in reading["quarters"]:
            assert f"{perplexity:.3f}" in printed
            assert f"{perplexity:.3f}" in page.read_text()
    assert document["result"]["early"]["token"] == 200
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert page.read_text() == pages.render([pages.load(saved)])


def test_ppl_streaming_of_a_shape_times_random_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from hf_fuse.eval import shapes

    model, _ = load_model("tiny-llama", dtype="float32", device="cpu", progress=False)
    monkeypatch.setattr(shapes, "build_shape", lambda *_: model)
    monkeypatch.setattr("hf_fuse.eval.loading.build_shape", lambda *_: model)
    model.resize_token_embeddings(30000)
    arguments = ["--streaming", "sinks=4,window=28", "--max-tokens", "200", "--device", "cpu"]
    assert cli.main(["ppl", "shape:llama-160m", *arguments]) == 0
    assert "TPOT from token 100" in capsys.readouterr().out
