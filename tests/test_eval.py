"""The evaluation: perplexity against a hand computation, decoding, the tiny models, the demo."""

from __future__ import annotations

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from models import PLAIN
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM

import hf_fuse
from hf_fuse.eval import (
    decode,
    demo,
    environment,
    loading,
    pages,
    perplexity,
    report,
    text,
    train_tiny,
)

TINY = sorted(loading.tiny_models())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # spread the logits, so that a wrong target shows
        parameter.data.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(97, (83,), generator=torch.Generator().manual_seed(1))


def hugging_face_nll(model, ids, context, stride):
    """The loop of transformers' own page on perplexity, one token's NLL at a time."""
    values, previous_end = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        with torch.no_grad():
            logits = model(ids[None, begin:end]).logits[0]
        for position in range(max(previous_end, begin + 1), end):
            row = logits[position - begin - 1].double()
            values.append(float(row.logsumexp(0) - row[ids[position]]))
        previous_end = end
        if end == len(ids):
            break
    return values


@pytest.mark.parametrize(("context", "stride"), [(17, 5), (16, 7), (11, 11), (64, 64), (83, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_sliding_window_nll_equals_the_hand_computation(
    random_model, ids, context, stride, batch_size
):
    if context > 64:
        ids = ids[:40]
    expected = hugging_face_nll(random_model, ids, context, stride)

    got = perplexity.score(random_model, ids, context=context, stride=stride, batch_size=batch_size)

    assert got.nll.tolist() == pytest.approx(expected, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)


@pytest.mark.parametrize("num_tokens", [2, 16, 17, 83])
@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 15), (16, 5), (16, 1)])
def test_windows_score_each_token_once(num_tokens, context, stride):
    windows = perplexity.sliding_windows(num_tokens, context, stride)

    scored = [token for w in windows for token in range(w.first_scored, w.end)]
    unscored = range(0, num_tokens, stride) if stride == context else [0]
    assert scored == [token for token in range(num_tokens) if token not in unscored]
    assert all(w.begin < w.first_scored < w.end <= w.begin + context for w in windows)


@pytest.mark.parametrize(
    ("num_tokens", "context", "stride", "message"),
    [
        (1, 8, 4, "at least 2 tokens"),
        (9, 1, 1, "context"),
        (9, 8, 0, "stride"),
        (9, 8, 9, "stride"),
    ],
)
def test_senseless_windows_are_refused(num_tokens, context, stride, message):
    with pytest.raises(ValueError, match=message):
        perplexity.sliding_windows(num_tokens, context, stride)


def test_a_model_against_itself_differs_by_nothing(random_model, ids):
    with torch.no_grad():
        logits = random_model(ids[None, :30]).logits[0]
    totals = perplexity._Totals(report=hf_fuse.report(random_model))
    totals.add(logits, logits, logits, ids[1:31])

    result = totals.result(31, 31, 31, "")

    assert result.kl_unpatched_patched == 0.0
    assert result.kl_reference_patched == 0.0
    assert result.change_percent == 0.0
    assert (result.nll_difference.mean, result.nll_difference.standard_error) == (0.0, 0.0)


def test_kl_and_paired_difference_have_their_definitions(random_model, ids, monkeypatch):
    monkeypatch.setattr(
        perplexity, "_CHUNK_BYTES", 97 * 8 * 7
    )  # 7 rows a chunk: the seams count too
    generator = torch.Generator().manual_seed(2)
    unpatched, patched, truth = (torch.randn(30, 97, generator=generator) for _ in range(3))
    targets = ids[:30]
    totals = perplexity._Totals(report=hf_fuse.report(random_model))
    totals.add(unpatched, patched, truth, targets)

    result = totals.result(31, 31, 31, "")

    log_u, log_p, log_r = (x.double().log_softmax(-1) for x in (unpatched, patched, truth))
    kl = torch.nn.functional.kl_div
    pairs = [(log_u, log_p), (log_r, log_u), (log_r, log_p)]
    expected = [kl(q, p, log_target=True, reduction="batchmean").item() for p, q in pairs]
    got = [result.kl_unpatched_patched, result.kl_reference_unpatched, result.kl_reference_patched]
    assert got == pytest.approx(expected, rel=1e-9)
    rows = torch.arange(30)
    difference = log_u[rows, targets] - log_p[rows, targets]
    assert result.nll_difference.mean == pytest.approx(difference.mean().item(), rel=1e-9)
    error = difference.std().item() / math.sqrt(30)
    assert result.nll_difference.standard_error == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_patched_perplexity_is_that_of_the_model(name):
    model, tokenizer = loading.load_model(name, dtype="float32", device="cpu")
    tokens = loading.encode(tokenizer, text.pydoc_text("held-out"), 700)
    plain = perplexity.score(model, tokens, context=128, stride=96)

    result = perplexity.evaluate_perplexity(
        model, tokens, context=128, stride=96, batch_size=3, progress=False
    )

    assert not hf_fuse.is_patched(model)
    assert result.report.patched
    assert result.reference is None
    assert "fp32" in result.note
    torch.testing.assert_close(result.unpatched.nll, plain.nll, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.patched.nll, plain.nll, rtol=0, atol=1e-4)
    assert abs(result.change_percent) < 1e-3
    assert 0.0 <= result.kl_unpatched_patched + 1e-12 < 1e-8


def test_bf16_model_is_measured_against_its_fp32_copy():
    model, tokenizer = loading.load_model("tiny-gpt_neox", dtype="bfloat16", device="cpu")
    tokens = loading.encode(tokenizer, text.pydoc_text("held-out"), 400)
    upcast, _ = loading.load_model("tiny-gpt_neox", dtype="float32", device="cpu")
    truth = perplexity.score(upcast, tokens, context=128, stride=64)

    result = perplexity.evaluate_perplexity(model, tokens, context=128, stride=64, progress=False)

    torch.testing.assert_close(result.reference.nll, truth.nll, rtol=0, atol=1e-5)
    assert 1e-9 < result.kl_reference_unpatched < 1e-2
    assert result.kl_reference_patched < 2 * result.kl_reference_unpatched
    assert model.dtype == torch.bfloat16


def test_evaluation_leaves_the_model_as_it_was(random_model, ids):
    random_model.train()
    before = {name: value.clone() for name, value in random_model.state_dict().items()}

    perplexity.evaluate_perplexity(random_model, ids, context=32, stride=16, progress=False)
    decode.evaluate_decode(random_model, ids[None, :9], new_tokens=3, repeats=1, progress=False)

    assert all(module.training for module in random_model.modules())
    assert not hf_fuse.is_patched(random_model)
    assert all(torch.equal(v, before[n]) for n, v in random_model.state_dict().items())
    random_model(input_ids=ids[None], labels=ids[None]).loss.backward()  # still fit for training
    random_model.zero_grad()
    random_model.eval()


def test_a_patched_model_is_refused(random_model, ids):
    with hf_fuse.patched(random_model):
        with pytest.raises(ValueError, match="unpatch"):
            perplexity.evaluate_perplexity(random_model, ids, context=32, stride=16)
        with pytest.raises(ValueError, match="unpatch"):
            decode.evaluate_decode(random_model, ids[None, :9], new_tokens=3)


def test_decode_compares_tokens_and_times_each(random_model, ids):
    prompt = torch.stack([ids[:9], ids[20:29]])

    result = decode.evaluate_decode(random_model, prompt, new_tokens=7, repeats=2, progress=False)

    assert result.identical
    assert result.first_mismatch is None
    for timing in (result.unpatched, result.patched):
        assert len(timing.tpot_samples_ms) == 2 * 6  # the first token of a turn is TTFT
        assert 0 < timing.tpot_ms.p10 <= timing.tpot_ms.p50 <= timing.tpot_ms.p90
        # A turn takes its first token and the six steps after it, for two rows of tokens.
        turn = timing.ttft_ms.p50 + 6 * timing.tpot_ms.p90
        assert timing.tokens_per_s > 0.3 * 14 / (1e-3 * turn)
    ratio = result.unpatched.tpot_ms.p50 / result.patched.tpot_ms.p50
    assert result.speedup == pytest.approx(ratio)


def test_decode_times_sampling_beside_greedy(random_model, ids, monkeypatch):
    seen = []
    original = type(random_model).generate

    def generate(model, **arguments):
        seen.append((hf_fuse.is_patched(model), arguments["do_sample"], arguments.get("top_k")))
        return original(model, **arguments)

    monkeypatch.setattr(type(random_model), "generate", generate)

    result = decode.evaluate_decode(
        random_model, ids[None, :9], new_tokens=7, repeats=2, progress=False, sample=True
    )

    turn = [(False, False, None), (True, False, None), (True, True, 50)]
    assert seen == 2 * [call for call in turn for _ in range(2)]  # after a warm-up each
    assert result.identical
    assert result.sampled is not None
    assert len(result.sampled.tpot_samples_ms) == 2 * 6
    assert result.to_dict()["sampled"]["tpot_ms"]["p50"] == result.sampled.tpot_ms.p50
    assert "patched, sampling" in report.decode_table(result)
    assert "sampled" in report.sweep_table([result, result])


def test_decode_reports_where_tokens_part(random_model, ids, monkeypatch):
    turns = iter([0, 0, 1, 1])  # unpatched warm-up and turn, then patched
    original = decode._generate

    def generate(*arguments):
        tokens = original(*arguments)
        if next(turns):
            tokens[1, 4] += 1
        return tokens

    monkeypatch.setattr(decode, "_generate", generate)
    prompt = torch.stack([ids[:9], ids[20:29]])

    result = decode.evaluate_decode(random_model, prompt, new_tokens=6, repeats=1, progress=False)

    assert not result.identical
    assert result.first_mismatch == (1, 4)
    assert "no: row 1 from new token 4" in report.decode_table(result)


def test_a_cpu_has_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode.read_bandwidth(torch.device("cpu")) is None
    monkeypatch.setattr(decode, "kernels", lambda _: False)  # a GPU without a compiler
    assert decode.read_bandwidth(torch.device("cuda")) is None


def test_the_bytes_of_a_step() -> None:
    shape = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=131, hidden_size=72, intermediate_size=100, tie_word_embeddings=False, **shape
    )
    model = LlamaForCausalLM(config)
    layer = 2 * 72 * 72 + 2 * 72 * 24 + 3 * 72 * 100 + 2 * 72  # q, o; k, v; MLP; norms
    weights = 3 * layer + 131 * 72 + 72  # the head and its norm; of the table only a row is read
    cache = 2 * (9 + 4) * 2 * 3 * 2 * 12  # sequences, mean length, k and v, layers, heads, head_dim
    assert decode.step_bytes(model, (2, 9), 8) == 4 * (weights + cache)
    tied = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": True}))
    assert decode.step_bytes(tied, (2, 9), 8) == 4 * (weights + cache)


def test_first_mismatch_is_the_earliest_position():
    expected = torch.zeros(3, 5, dtype=torch.int64)
    got = expected.clone()
    got[0, 4] = got[2, 1] = 1
    assert decode.first_mismatch(expected, got) == (2, 1)


def test_end_of_text_does_not_shorten_a_decode(random_model, ids, monkeypatch):
    prompt = ids[None, :9]
    free = random_model.generate(prompt, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    monkeypatch.setattr(random_model.generation_config, "eos_token_id", int(free[0, 9]))

    result = decode.evaluate_decode(random_model, prompt, new_tokens=4, repeats=1, progress=False)

    assert len(result.unpatched.tpot_samples_ms) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_tokens": 1}, "new_tokens"),
        ({"repeats": 0}, "repeats"),
        ({"new_tokens": 60}, "64 positions"),
    ],
)
def test_senseless_decodes_are_refused(random_model, ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        decode.evaluate_decode(random_model, ids[None, :9], progress=False, **arguments)


def test_percentiles_interpolate():
    assert decode.Percentiles.of([4.0, 1.0, 2.0, 3.0, 5.0]) == decode.Percentiles(1.4, 3.0, 4.6)


# ---- the tiny models


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_scores_what_its_training_record_says(name):
    folder = loading.tiny_models()[name]
    facts = json.loads((folder / "training.json").read_text())
    held_out = text.pydoc_text("held-out")
    model, tokenizer = loading.load_model(name, dtype="float32", device="cpu")

    got = perplexity.score(
        model,
        loading.encode(tokenizer, held_out),
        context=facts["context"],
        stride=facts["stride"],
    ).perplexity

    same_text = held_out.digest == facts["held_out_digest"]  # other Pythons word it differently
    assert got == pytest.approx(facts["held_out_perplexity"], rel=0.02 if same_text else 0.25)
    assert got < 0.1 * facts["held_out_perplexity_untrained"]
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_is_small_and_names_no_folder(name):
    folder = loading.tiny_models()[name]
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    for path in folder.glob("*.json"):
        assert not re.search(r"[\"= ]/\w+/", path.read_text()), "an absolute path"


def test_there_is_a_tiny_model_of_every_kind_of_layer():
    """LLaMA's stands for its family."""
    assert {name.removeprefix("tiny-") for name in TINY} == {c.model_type for c in PLAIN}


@pytest.mark.parametrize("name", TINY)
def test_tokenizer_round_trips_any_text(name):
    _, tokenizer = loading.load_model(name, device="cpu")
    sample = "naïve ☃ 你好\n\tdef f(x):  return  x\x00"
    assert tokenizer.decode(tokenizer(sample).input_ids) == sample


def test_training_learns_and_repeats_itself(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    texts = text.file_text(source, "train"), text.file_text(source, "held-out")
    recipe = train_tiny.Recipe(steps=6, batch_size=2, learning_rate=3e-3, warmup_steps=2)

    first = train_tiny.build("llama", tmp_path / "a", texts, recipe, "command")
    second = train_tiny.build("llama", tmp_path / "b", texts, recipe, "command")

    assert first["held_out_perplexity"] < 0.5 * first["held_out_perplexity_untrained"]
    assert first["held_out_perplexity"] == second["held_out_perplexity"]


# ---- text


def test_held_out_topics_are_not_trained_on():
    train, held_out = text.pydoc_text("train").text, text.pydoc_text("held-out").text
    paragraphs = {" ".join(p.split()) for p in held_out.split("\n\n")} - {""}
    assert len(held_out) > 20_000
    assert not paragraphs & {" ".join(p.split()) for p in train.split("\n\n")}


def test_file_split_covers_the_file_once(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("".join(f"{i:04d}\n" for i in range(200)))
    train, held_out = text.file_text(source, "train").text, text.file_text(source, "held-out").text
    assert train + held_out == source.read_text()
    assert len(held_out) == 100
    assert text.file_text(source).text == source.read_text()


def test_unreadable_texts_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (("gone", "No such file"), ("empty", "no text"), ("binary", "not UTF-8")):
        with pytest.raises(text.TextError, match=f"{name}.txt.*{message}"):
            text.file_text(tmp_path / f"{name}.txt")


class Rows(list):
    """A dataset of the hub, as `datasets` shows it."""

    column_names = ("text",)
    split = "test"


def test_dataset_text_joins_rows_until_there_are_enough(monkeypatch):
    rows = Rows({"text": row} for row in ("one", "", " = two =", "three"))
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return {"train": Rows([{"text": "not this"}]), "test": rows}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    assert text.dataset_text("owner/data:config").text == "one\n\n = two =\n\nthree"
    assert text.dataset_text("owner/data", max_characters=4).text == "one\n\n = two ="
    assert asked == [("owner/data", "config"), ("owner/data", None)]
    rows.column_names = ("label",)
    with pytest.raises(text.TextError, match="owner/data has no split with a column named text"):
        text.dataset_text("owner/data")


def test_short_prompt_text_repeats():
    def tokenizer(text, **_):
        return SimpleNamespace(input_ids=[ord(c) for c in text])

    found = loading.prompts(tokenizer, text.Text("short", "abc"), batch_size=2, prompt_length=4)
    assert found.tolist() == [[ord(c) for c in row] for row in ("abca", "bcab")]


# ---- reports and demo


def test_results_carry_no_folders():
    facts = environment.provenance("cpu", ["ppl", "/home/someone/model", "--json=/tmp/x.json"])
    assert facts["command"] == "hf-fuse ppl model --json=x.json"
    given = ["--model_args", "pretrained=/home/someone/model,dtype=float32,peft=/home/someone/a"]
    command = environment.provenance("cpu", ["lm-eval", *given])["command"]
    assert command == "hf-fuse lm-eval --model_args pretrained=model,dtype=float32,peft=a"


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "new" / "result.json"
    facts = {"a": [math.nan, 1.5], "b": {"c": -math.inf}}
    report.write_result("test", facts, device="cpu", json_path=path)
    saved = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (saved["a"], saved["b"], saved["kind"]) == ([None, 1.5], {"c": None}, "test")
    assert saved["versions"]["torch"] == torch.__version__


def test_table_lines_up():
    drawn = report.table(["name", "ms"], [["a", "1.00"], ["longer", "10.00"]])
    assert drawn.splitlines() == [
        "name       ms",
        "------  -----",
        "a        1.00",
        "longer  10.00",
    ]


def test_unsupported_architecture_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    GPTNeoXConfig().save_pretrained(tmp_path)
    monkeypatch.setattr(hf_fuse, "supported", lambda: {"llama": ()})
    with pytest.raises(environment.UsageError, match="gpt_neox model, which hf_fuse does not know"):
        loading.load_model(str(tmp_path))


def test_demo_prints_one_table_over_all_tiny_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEW_TOKENS", 8)
    monkeypatch.setattr(demo, "REPEATS", 1)
    monkeypatch.setattr(demo, "STRIDE", 256)
    monkeypatch.chdir(tmp_path)

    rows = demo.run_demo(device="cpu", html_path="demo.html")

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny-")]
    assert [line.split()[0] for line in lines] == TINY == [row.model for row in rows]
    assert all(row.same_answers for row in rows)
    for line, row in zip(lines, rows, strict=True):
        assert f"{row.perplexity.patched.perplexity:.3f}" in line.split()
        assert "yes" in line.split()
    saved = json.loads((tmp_path / "results" / "demo.json").read_text())
    assert [row["model"] for row in saved["rows"]] == TINY
    assert (tmp_path / "results" / "demo.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert page == pages.render([saved])
    assert all(page.count(name) > 1 for name in TINY)
