"""hf-fuse lm-eval and the model name hf-fuse, on the tiny trained models."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from helpers import count_ops
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from models import FAMILY, PLAIN, TRAINED, Case, cases
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

import hf_fuse
from hf_fuse.cli import main
from hf_fuse.decode.loop import engine_of
from hf_fuse.eval import pages
from hf_fuse.eval.harness import TASKS, FusedLM
from hf_fuse.eval.loading import MODELS
from hf_fuse.eval.text import pydoc_text

pytestmark = pytest.mark.usefixtures("one_thread")
CONTINUE = """
task: continue
custom_dataset: !function continue.dataset
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "nothing"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
PROMPTS = """
from datasets import Dataset

def dataset(**metadata):
    prompts = ["The class statement", "A function", "An expression"]
    return {"test": Dataset.from_list([{"prompt": p} for p in prompts])}
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without lm-eval's own tasks, whose many files take seconds to read, and without its
    account of the machine, for which it calls dozens of programs.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


def compared(capsys: pytest.CaptureFixture, *options: str) -> tuple[int, str]:
    code = main(["lm-eval", "--tasks", "hf_fuse_text", "--compare", *options])
    return code, capsys.readouterr().out


def folder_of(case: Case, folder: Path) -> Path:
    """A model folder of the case: the trained model, or random weights with its tokenizer."""
    if case.trained:
        return MODELS / case.model_type
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "llama")
    replace(case, scale=0.05).build(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@cases(TRAINED, PLAIN, FAMILY)
def test_the_same_perplexity_on_both_sides(
    case: Case, dtype: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """Of the trained models in batches of a size that lm-eval finds itself."""
    file, page, text = (tmp_path / name for name in ("numbers.json", "page.html", "text.txt"))
    text.write_text(
        "\n\n".join(pydoc_text("held-out").text.split("\n\n")[: 40 if case.trained else 6])
    )
    folder = folder_of(case, tmp_path / "model")
    model = f"pretrained={folder},dtype={dtype}"
    sizes = ("--batch_size", "auto" if case.trained else "8", "--max_batch_size", "8")
    options = ("--text", str(text), "--json", str(file), "--html", str(page))
    with count_ops() as calls:
        code, out = compared(capsys, "--model_args", model, *sizes, *options)
    assert code == 0, out
    assert calls["hf_fuse::add_norm"] > 0
    numbers = json.loads(file.read_text())
    metrics = {metric["name"]: metric for metric in numbers["metrics"]}
    assert set(metrics) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert numbers["tolerance"] == (1e-5 if dtype == "float32" else 5e-4)
    for metric in metrics.values():
        assert metric["unpatched"] > 1
        assert metric["patched"] == pytest.approx(metric["unpatched"], rel=numbers["tolerance"])
    assert "no metric differs by more than" in out
    assert (numbers["model"], numbers["dtype"]) == (folder.name, dtype)
    assert numbers["report"]["patched"]
    assert page.read_text(encoding="utf-8") == pages.render([numbers])


def test_a_model_that_answers_otherwise_is_found(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what --compare calls patched is changed: it did compare the two."""

    def patch(self: FusedLM) -> None:
        with torch.no_grad():
            self.model.lm_head.weight.mul_(1.001)

    monkeypatch.setattr(FusedLM, "patch", patch)
    options = ("--model_args", "pretrained=tiny-llama,dtype=float32", "--limit", "1")
    code, out = compared(capsys, *options)
    assert code == 1
    assert "3 of 3 metrics differ by more than 1e-05" in out
    assert compared(capsys, *options, "--tolerance", "0.5")[0] == 0


def test_by_its_name_in_lm_eval(tmp_path: Path) -> None:
    """Rolling perplexity of the user's file, and generate_until, by simple_evaluate."""
    (tmp_path / "continue.yaml").write_text(CONTINUE)
    (tmp_path / "continue.py").write_text(PROMPTS)
    text = tmp_path / "text.txt"
    text.write_text("A statement is run.\n\n" * 40)
    manager = TaskManager(
        include_path=[str(TASKS), str(tmp_path)],
        metadata={"text": str(text)},
        include_defaults=False,
    )
    found: list[Any] = []
    sizes = {"batch_size": "auto", "max_batch_size": 4, "device": "cpu"}
    folder = str(MODELS / "llama")
    model = FusedLM(folder, dtype="float32", **sizes)
    assert hf_fuse.is_patched(model.model)
    for name, given in (("hf", {"pretrained": folder, "dtype": "float32"}), (model, None)):
        tasks = ["hf_fuse_text", "continue"]
        found.append(
            lm_eval.simple_evaluate(name, given, tasks=tasks, task_manager=manager, **sizes)
        )
    assert get_model("hf-fuse") is FusedLM
    plain, fused = (f["results"]["hf_fuse_text"]["bits_per_byte,none"] for f in found)
    assert fused == pytest.approx(plain, rel=1e-5)
    answers = [[sample["resps"][0][0] for sample in f["samples"]["continue"]] for f in found]
    assert answers[0] == answers[1]
    assert any(answers[1])
    assert engine_of(model.model) is not None


def test_lm_evals_own_run(capsys: pytest.CaptureFixture) -> None:
    arguments = ["--model_args", "pretrained=tiny-gpt2", "--tasks", "hf_fuse_text", "--limit", "2"]
    assert main(["lm-eval", *arguments]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "hf_fuse_txt"], "Tasks not found: hf_fuse_txt"),
        (["--tasks", "hf_fuse_text", "--text", "/nowhere.txt"], "cannot read the text file"),
        (["--model_args", "pretrained=/nowhere"], "there is no model folder /nowhere"),
        (["--model_args", "pretrained=tiny-bert"], "there is no tiny model tiny-bert"),
        (["--model", "hf"], "the model is hf-fuse, got --model hf"),
        (["--model_args", "pretrained=tiny-gpt2,fuse_backend=gpu"], "backend must be one of"),
        (["--device", "cuda:99"], "torch sees no device cuda:99"),
        (["--device", "tpu"], "'tpu'"),
        (["--batch_size", "0"], "--batch_size must be a number from 1 up or auto[:N], got 0"),
        (["--batch_size", "many"], "got many"),
        (["--model_args", "pretrained=tiny-gpt2,dtype=int3"], "int3"),
        (["--gen_kwargs", "{no"], "Invalid JSON"),
        (["--config", "/nowhere.yaml"], "Config file not found"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("compare", [[], ["--compare"]], ids=["run", "compare"])
def test_errors_are_one_line_and_code_2(
    options: list[str], message: str, compare: list[str], capsys: pytest.CaptureFixture
) -> None:
    given = ["--tasks", "hf_fuse_text", "--model_args", "pretrained=tiny-gpt2", *options]
    assert main(["lm-eval", *given, *compare]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("hf-fuse: ")
    assert message in last


@pytest.mark.parametrize(
    "options", [["--bogus"], ["--tolerance", "-1"], ["--tolerance", "nan"], ["--text", ""]]
)
def test_options_that_cannot_be(options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["lm-eval", *options])
    (line,) = capsys.readouterr().err.splitlines()
    assert options[0] in line


def test_a_model_of_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(is_decoder=True, **config)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODELS / "llama" / name).read_bytes())
    assert (
        main(["lm-eval", "--tasks", "hf_fuse_text", "--model_args", f"pretrained={tmp_path}"]) == 2
    )
    assert "BertLMHeadModel holds no backbone" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_only_a_comparison_can_be_saved(
    option: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    given = ["--tasks", "hf_fuse_text", "--model_args", "pretrained=tiny-gpt2", "--limit", "1"]
    path = tmp_path / "numbers"
    assert main(["lm-eval", *given, option, str(path)]) == 2
    assert capsys.readouterr().err.startswith("hf-fuse: --json and --html need --compare")
    assert main(["lm-eval", *given, "--compare", option, "/dev/null/all"]) == 2
    assert "cannot write /dev/null/all" in capsys.readouterr().err
