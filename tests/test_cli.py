"""The command line: what it prints, what it saves, and one line for what the user can mend."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import BertConfig, GPT2Config

import hf_fuse
from hf_fuse import cli, jit
from hf_fuse.eval import shapes
from hf_fuse.ops import _library

FAST = ["--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def error_of(capsys, *argv: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    try:
        code = cli.main([*argv])
    except SystemExit as exit_:  # argparse's own way
        code = exit_.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("hf-fuse")
    return lines[0]


@pytest.fixture
def no_package(monkeypatch):
    """Makes a package look absent."""

    def remove(name: str) -> None:
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)

    return remove


def test_ppl_prints_and_saves_the_same_numbers(tmp_path, capsys):
    saved, picture = tmp_path / "ppl.json", tmp_path / "ppl.png"

    options = ["--dtype", "float32", "--context", "64", "--stride", "48", "--max-tokens", "300"]
    outputs = ["--ops", "add_norm", "--json", str(saved), "--png", str(picture)]

    code = cli.main(["ppl", "tiny-llama", *options, *outputs, *FAST])

    printed = capsys.readouterr().out
    facts = json.loads(saved.read_text())
    result = facts["result"]
    assert code == 0
    assert f"{result['perplexity_unpatched']:.4f}" in printed
    assert (result["context"], result["stride"], result["num_scored"]) == (64, 48, 299)
    assert abs(result["change_percent"]) < 1e-3
    assert {m["op"] for m in result["report"]["modules"]} == {"add_norm"}
    assert (facts["model"], facts["dtype"]) == ("tiny-llama", "float32")
    assert str(tmp_path) not in saved.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_ppl_reads_a_text_file_and_a_model_folder(tmp_path, capsys):
    from hf_fuse.eval.loading import tiny_models

    source = tmp_path / "own.txt"
    source.write_text("The yield statement is only used when defining a generator function. " * 9)
    folder = str(tiny_models()["tiny-gpt2"])

    assert cli.main(["ppl", folder, "--text", str(source), "--context", "32", *FAST]) == 0

    printed = capsys.readouterr().out
    assert "own.txt" in printed
    assert "fp32 reference" in printed  # the checkpoint is bf16


def test_tpot_says_whether_tokens_are_identical_before_any_speed(tmp_path, capsys):
    saved = tmp_path / "tpot.json"

    rows = ["--prompt-length", "40", "--new-tokens", "6", "--batch-size", "2", "--repeats", "1"]
    options = ["--dtype", "float32", "--json", str(saved), "--sample"]

    code = cli.main(["tpot", "tiny-gpt_neox", *rows, *options, *FAST])

    printed = capsys.readouterr().out
    result = json.loads(saved.read_text())["result"]
    assert code == 0
    assert printed.index("greedy tokens identical: yes") < printed.index("TPOT")
    assert (result["identical"], result["batch_size"], result["prompt_length"]) == (True, 2, 40)
    assert len(result["patched"]["tpot_samples_ms"]) == 5
    assert len(result["sampled"]["tpot_samples_ms"]) == 5
    assert "patched, sampling" in printed
    assert f"{result['speedup']:.2f}×" in printed


def test_tpot_sweeps_batches_and_prompts(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "small", (GPT2Config, {"n_embd": 32, "n_head": 2}))
    saved, drawn = tmp_path / "tpot.json", tmp_path / "tpot.png"
    rows = ["--prompt-length", "9,5", "--new-tokens", "3", "--batch-size", "1,2", "--repeats", "1"]

    code = cli.main(
        ["tpot", "shape:small", *rows, "--json", str(saved), "--png", str(drawn), *FAST]
    )

    printed = capsys.readouterr().out
    results = json.loads(saved.read_text())["results"]
    assert code == 0
    assert drawn.stat().st_size > 1000
    found = [(r["prompt_length"], r["batch_size"]) for r in results]
    assert found == [(9, 1), (9, 2), (5, 1), (5, 2)]
    for result in results:
        tpot = (result[name]["tpot_ms"]["p50"] for name in ("unpatched", "patched"))
        assert all(f"{ms:.3f}" in printed for ms in tpot)


def test_step_times_each_kernel(device, tmp_path, capsys):
    path = tmp_path / "step.json"
    arguments = ["--batch-size", "2", "--device", device, "--json", str(path)]
    assert cli.main(["step", "tiny-llama", *arguments]) == 0
    printed, saved = capsys.readouterr().out, json.loads(path.read_text())
    counts = {row["name"]: row["count"] for row in saved["kernels"]}
    layers = counts["norm, QKV"]
    assert layers > 1
    once = {"embed": 1, "norm, head": 1, "select": 1}
    each = ["norm, QKV", "rotary, cache, attention", "attention out, add"]
    each += ["norm, MLP in, activation", "MLP out, add"]
    assert counts == {**once, **dict.fromkeys(each, layers)}
    assert all(row["us"] > 0 and row["bytes"] > 0 for row in saved["kernels"])
    assert saved["step"]["bytes"] == sum(r["bytes"] * r["count"] for r in saved["kernels"])
    assert saved["step"]["us"] > max(row["us"] for row in saved["kernels"])
    assert all(name in printed for name in counts)
    assert saved["read_bytes_per_s"] is None or "% of read" in printed


def test_step_times_torch_where_there_are_no_kernels(tmp_path, monkeypatch):
    path = tmp_path / "step.json"
    arguments = ["step", "tiny-llama", *FAST, "--json", str(path)]
    assert cli.main([*arguments, "--backend", "reference"]) == 0
    monkeypatch.setitem(_library._ready, "cpu", False)
    path.unlink()
    assert cli.main(arguments) == 0
    saved = json.loads(path.read_text())
    assert saved["step"]["us"] > max(row["us"] for row in saved["kernels"])


def test_supported_lists_the_architectures(capsys):
    assert cli.main(["supported"]) == 0
    assert capsys.readouterr().out.split() == sorted(hf_fuse.supported())


@pytest.mark.parametrize(("usable", "code"), [(True, 0), (False, 1)])
def test_doctor_prints_checks_and_fixes(monkeypatch, capsys, usable, code):
    checks = [
        jit.Check("torch", True, "2.13"),
        jit.Check("nvcc", False, "nvcc was not found.", "Install the CUDA toolkit."),
        jit.Check("cpu kernels", usable, "detail", "" if usable else "Install g++."),
    ]
    monkeypatch.setattr(jit, "doctor", lambda: checks)

    assert cli.main(["doctor"]) == code

    printed = capsys.readouterr().out
    assert "Install the CUDA toolkit." in printed
    assert ("Install g++." in printed) is not usable


def test_demo_fails_where_answers_differ(monkeypatch):
    from types import SimpleNamespace

    from hf_fuse.eval import demo

    for answers, code in (([True, True], 0), ([True, False], 1)):
        rows = [SimpleNamespace(same_answers=same) for same in answers]
        monkeypatch.setattr(demo, "run_demo", lambda rows=rows, **_: rows)
        assert cli.main(["demo"]) == code


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ppl", "./no-such-folder"], "no model folder ./no-such-folder"),
        (["ppl", "tiny-bloom"], "no tiny model tiny-bloom; there are tiny-gpt2, tiny-gpt_neox"),
        (["ppl", "tiny-llama", "--text", "no-such.txt"], "no-such.txt: No such file"),
        (["ppl", "tiny-llama", "--context", "257"], "model's 256"),
        (["ppl", "tiny-llama", "--context", "16", "--stride", "17"], "--stride must be at most"),
        (["ppl", "tiny-llama", "--ops", "add_norms"], "add_norms"),
        (["ppl", "tiny-llama", "--device", "cuda:99"], "cuda:99"),
        (["ppl", "tiny-llama", "--device", "tpu"], "'tpu'"),
        (["ppl", "tiny-llama", "--batch-size", "0"], "'0' is not a whole number from 1 up"),
        (["ppl", "tiny-llama", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["ppl", "tiny-llama", "--streaming", "4,256"], "'4,256' is not sinks=N,window=N"),
        (["ppl", "tiny-llama", "--streaming", "sinks=4"], "'sinks=4' is not sinks=N,window=N"),
        (["ppl", "tiny-llama", "--streaming", "sinks=-1,window=9"], "'-1' is not a whole number"),
        (["ppl", "tiny-llama", "--streaming", "sinks=4,window=0"], "'0' is not a whole number"),
        (
            ["ppl", "tiny-llama", "--streaming", "sinks=4,window=64", "--stride", "9"],
            "--stride does not go with it",
        ),
        (
            ["ppl", "tiny-llama", "--streaming", "sinks=4,window=64", "--max-tokens", "136"],
            "streaming needs more than 136 tokens to evict some, got 136",
        ),
        (
            ["ppl", "tiny-gpt2", "--streaming", "sinks=4,window=28", "--max-tokens", "90"],
            "streaming needs rotary positions",
        ),
        (["tpot", "tiny-llama", "--prompt-length", "200"], "328, over the model's 256 positions"),
        (["tpot", "tiny-llama", "--new-tokens", "1"], "from 2 up"),
        (["tpot", "tiny-llama", "--batch-size", "1,none"], "'none' is not a whole number"),
        (["tpot", "shape:bloom"], "no shape bloom; there are llama-3.2-1b, llama-3.1-8b"),
        (["ppl", "tiny-gpt2", "--ops", "add_norm", "--through", "decode"], "decode was left out"),
        (["ppl", "shape:gpt2"], "shape:gpt2 has random weights and no tokenizer"),
        (["demo", "--device", "cuda:99"], "cuda:99"),
        (["demo", "--backend", "cuda", "--device", "cpu"], "backend 'cuda' was asked for"),
        (["ppl", "x" * 5000], "cannot load the model xxx"),
        (["ppl", "tiny-llama", "--json", "y" * 300], "File name too long"),
        (["ppl", "tiny-llama", "--json", ""], "--json: it is empty"),
        (["ppl", "tiny-llama", "--text", ""], "--text: it is empty"),
        (["tpot", "tiny-llama", "--device", " "], "--device: it is empty"),
        (["tpot", ""], "MODEL: it is empty"),
        (["tpot", "tiny-llama", "--json", "/"], "cannot write /"),
        (["step", "tiny-llama", "--backend", "cuda", *FAST], "backend 'cuda' was asked for"),
        (["step", "tiny-gpt2", "--context", "193"], "--context must be at most 192, 64 below"),
        (["step", "tiny-llama", "--batch-size", "-1"], "'-1' is not a whole number from 1 up"),
        (["step", "no such/model!"], "cannot load the model no such/model!"),
        (["demo", "--json", "/dev/null/demo.json"], "cannot write /dev/null/demo.json"),
        (["doctor", "twice"], "unrecognized arguments: twice"),
        (["paint"], "invalid choice: 'paint'"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_user_can_mend_is_one_line(capsys, argv, message):
    assert message in error_of(capsys, *argv)


def test_unsupported_architecture_is_one_line(tmp_path, capsys):
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    line = error_of(capsys, "ppl", str(tmp_path))
    assert "bert" in line
    assert all(name in line for name in hf_fuse.supported())


def test_name_that_the_hub_does_not_know_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = error_of(capsys, "ppl", "no-such/model-of-the-hub")
    assert "cannot load the model no-such/model-of-the-hub" in line


BROKEN = {
    "no config": ({"config.json": None}, "Should have a `model_type` key"),
    "no type": ({"config.json": b"{}"}, "Should have a `model_type` key"),
    "unknown type": ({"config.json": b'{"model_type": "unheard_of"}'}, "model type `unheard_of`"),
    "config that is no JSON": ({"config.json": b"{no"}, "not a valid JSON file"),
    "binary config": ({"config.json": bytes(range(256))}, "not a valid JSON file"),
    "no weights": ({"model.safetensors": None}, "model.safetensors"),
    "empty weights": ({"model.safetensors": b""}, "header too small"),
    "corrupt weights": ({"model.safetensors": b"garbage" * 99}, "deserializing header"),
    "no tokenizer": ({"tokenizer.json": None, "tokenizer_config.json": None}, "(1) a `tokenizers`"),
    "strange tokenizer": ({"tokenizer.json": b"{}"}, "KeyError 'added_tokens'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_folder_is_one_line(what, tmp_path, capsys):
    from hf_fuse.eval.loading import tiny_models

    changes, message = BROKEN[what]
    for file in tiny_models()["tiny-llama"].iterdir():
        content = changes.get(file.name, file.read_bytes())
        if content is not None:
            (tmp_path / file.name).write_bytes(content)
    for command in ("ppl", "tpot", "step"):
        line = error_of(capsys, command, str(tmp_path))
        assert "cannot load the model" in line
        assert message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\x00\x80", "not UTF-8"), (b" \n ", "holds no text"), (b"a", "fewer than 2 tokens")],
    ids=["binary", "blank", "short"],
)
def test_a_text_that_is_none_is_one_line(content, message, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(content)
    options = ["--text", str(tmp_path / "a.txt"), *FAST]
    for command in ("ppl", "tpot"):
        assert message in error_of(capsys, command, "tiny-llama", *options)
    assert "Is a directory" in error_of(capsys, "ppl", "tiny-llama", "--text", str(tmp_path))


def test_no_kernel_of_that_name_is_one_line(monkeypatch, capsys):
    from hf_fuse.eval import kernels

    monkeypatch.setattr(kernels, "measure_on_cpu", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no case has 'softmax' in its name" in error_of(capsys, "kernels", "--only", "softmax")


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_supported", lambda _: torch.empty(10**15))
    assert "not enough memory" in error_of(capsys, "supported")


def test_unwritable_result_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = ["ppl", "tiny-llama", "--max-tokens", "40", "--context", "16"]
    line = error_of(capsys, *argv, "--json", str(tmp_path / "file" / "x.json"), *FAST)
    assert "cannot write" in line


@pytest.mark.parametrize(
    ("package", "argv"),
    [("datasets", ["--dataset", "some/data"]), ("matplotlib", ["--png", "picture.png"])],
)
def test_missing_package_names_its_extra(capsys, no_package, package, argv):
    no_package(package)
    line = error_of(capsys, "ppl", "tiny-llama", *argv)
    assert f'the {package} package: pip install "hf_fuse[eval]"' in line


def test_a_bug_is_not_dressed_as_a_user_error(monkeypatch):
    def broken(_):
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "_supported", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["supported"])


def test_the_installed_command_runs():
    done = subprocess.run(
        [sys.executable, "-m", "hf_fuse.cli", "supported"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.split() == sorted(hf_fuse.supported())
