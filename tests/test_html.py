"""The HTML reports: whole, escaped, with the numbers of the result, and quiet in a real browser."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_fuse import cli
from hf_fuse.eval import kernels, pages
from hf_fuse.eval.environment import UsageError
from hf_fuse.eval.readme import RESULTS

VOID = {"meta"}
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "</style></title><script>alert(1)</script><img src=//a.example/x onerror='a'>\"&amp;"


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def lm_eval() -> dict[str, Any]:
    """As `hf-fuse lm-eval --compare --json` saves it; one of two metrics is past the tolerance."""
    same = {"task": "hf_fuse_text", "name": "bits_per_byte", "unpatched": 2.5, "patched": 2.50001}
    other = {"task": "lambada", "name": "acc", "unpatched": 0.5, "patched": 0.51}
    shared = {key: result("demo-cpu")[key] for key in ("date", "device", "platform", "versions")}
    facts = {"kind": "lm-eval", "command": "hf-fuse lm-eval", "model": "tiny-gpt2"}
    facts |= {"dtype": "float32", "tolerance": 1e-3, "metrics": [same, other]}
    return {**shared, **facts, "report": result("demo-cpu")["rows"][0]["decode"]["report"]}


EACH_KIND: list[Callable[[], dict[str, Any]]] = [
    lambda: result("decode-gpt2-xl-h200"), lambda: result("batches-llama-3.2-1b-h200"),
    lambda: result("ppl-decode-tiny-gpt2-cpu"), lambda: result("demo-cpu"),
    lambda: result("step-llama-3.2-1b-h200"), lambda: result("kernels-h200"), lm_eval,
    lambda: result("streaming-tiny-llama-cpu"),
]  # fmt: skip
each_kind = pytest.mark.parametrize(
    "make",
    EACH_KIND,
    ids=["decode", "sweep", "perplexity", "demo", "step", "kernels", "lm-eval", "streaming"],
)


class Page(HTMLParser):
    """What a page consists of; a tag that is closed out of turn is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.marked: list[str] = []  # what is shown as a loss
        self.shown = ""
        self.style = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if ("class", "loss") in attrs:
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"closed and never opened: {tag}"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
            return
        self.shown += f"{data}\n"
        if self.open and self.open[-1] == "span":
            self.marked[-1] += data


def check(text: str) -> Page:
    """The page, which is whole and refers to nothing but itself."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    names = {value for key, value in page.attributes if key == "id"}
    for key, value in page.attributes:
        assert key not in ("src", "srcset", "style", "xlink:href", "action", "data")
        assert not key.startswith("on")
        if key == "href":
            assert value.removeprefix("#") in names
    assert not re.search(r"url\(|@import|https?:", page.style)
    return page


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_every_committed_result_makes_a_page(path: Path) -> None:
    document = pages.load(path)
    page = check(pages.render([document]))
    assert {"svg", "table", "title"} <= set(page.tags)
    assert document["device"] in page.shown
    assert document["command"] in page.shown
    assert document["versions"]["torch"] in page.shown
    assert not re.search(r"\b(None|nan|inf)\b", page.shown)


def test_decoding_shows_each_variant_the_floor_and_the_report() -> None:
    document = result("decode-gpt2-xl-h200")
    r, page = document["result"], check(pages.render([document]))
    for variant in ("unpatched", "static_compile", "patched", "sampled"):
        for what in ("tpot_ms", "ttft_ms"):
            assert f"{r[variant][what]['p50']:.3f} ms" in page.shown
        assert f"{r[variant]['tpot_ms']['p90']:.3f}" in page.shown
    assert f"floor {r['floor_ms']:.3f} ms" in page.shown
    assert f"{r['speedup']:.2f} ×" in page.shown
    row, position = r["first_mismatch"]
    assert f"no: row {row} from new token {position}" in page.shown
    assert "random weights" in page.shown
    assert "GPT2LMHeadModel (gpt2): patched with add_norm, bias_act, decode" in page.shown
    assert not page.marked


def test_a_sweep_shows_each_row() -> None:
    document = result("batches-llama-3.2-1b-h200")
    page = check(pages.render([document]))
    for r in document["results"]:
        for variant in ("unpatched", "static_compile", "patched"):
            tpot, ttft = (r[variant][what]["p50"] for what in ("tpot_ms", "ttft_ms"))
            assert {f"{tpot:.3f}", f"{ttft:.2f}"} <= set(page.shown.split("\n"))
            name = "static cache, compiled" if variant == "static_compile" else variant
            assert f"{name}, {r['batch_size']}: {tpot:.3f} ms" in page.shown


def test_perplexity_and_kl_stand_side_by_side() -> None:
    document = result("ppl-decode-tiny-gpt2-cpu")
    r, page = document["result"], check(pages.render([document]))
    for side in ("unpatched", "patched", "reference"):
        assert f"{r[f'perplexity_{side}']:.4f}" in page.shown
    for pair in ("reference_unpatched", "reference_patched", "unpatched_patched"):
        assert f"{r[f'kl_{pair}']:.2e} nats" in page.shown
    assert f"{r['change_percent']:+.4f} %" in page.shown


def test_the_demo_shows_both_of_each_model() -> None:
    document = result("demo-cpu")
    page = check(pages.render([document]))
    for row in document["rows"]:
        assert row["model"] in page.shown
        assert f"{row['perplexity']['perplexity_patched']:.4f}" in page.shown
        assert f"{row['decode']['patched']['tpot_ms']['p50']:.3f} ms" in page.shown


def test_bandwidth_of_kernels_and_ops() -> None:
    step, ops = result("step-llama-3.2-1b-h200"), result("kernels-h200")
    page = check(pages.render([step, ops]))
    for row in step["kernels"]:
        assert f"{row['bytes'] / row['us'] / 1e3:.0f} GB/s" in page.shown
        assert f"{1e8 * row['bytes'] / row['us'] / step['read_bytes_per_s']:.1f}" in page.shown
    losses = []
    for case in ops["cases"]:
        unit = "µs" if " [1, " in case["case"] else "GB/s"
        value = f"{case['us']['hf_fuse']:.2f}" if unit == "µs" else f"{case['gb_per_s']:.0f}"
        assert f"{value} {unit}" in page.shown
        losses += [f"{v:.2f}" for v in case["speedup"].values() if v < 1]
    assert losses
    assert sorted(page.marked) == sorted(losses)  # and nothing else is


def test_a_slower_patched_model_is_marked() -> None:
    document = result("decode-llama-160m-bfloat16-cpu")
    for what in ("tpot_ms", "ttft_ms"):
        patched = document["result"]["patched"][what]
        patched["p50"] = 2 * document["result"]["unpatched"][what]["p50"]
    assert check(pages.render([document])).marked == ["0.50 ×", "0.50 ×"]


def test_lm_eval_marks_what_is_past_the_tolerance() -> None:
    page = check(pages.render([lm_eval()]))
    assert "1 of 2 metrics differ by more than 0.001" in page.shown
    assert page.marked == ["2.0e-02"]


def test_several_results_are_one_page() -> None:
    documents = [make() for make in EACH_KIND]
    page = check(pages.render(documents))
    assert page.tags.count("section") == len(pages.SECTIONS) + 1  # and the environment
    assert page.shown.count("AMD EPYC, 2 threads\n") >= 1
    assert all(document["command"] in page.shown for document in documents)


@each_kind
def test_text_is_escaped(make: Callable[[], dict[str, Any]]) -> None:
    def poisoned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poisoned(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(v) for v in value]
        return f"{value}{HOSTILE}" if isinstance(value, str) and key != "kind" else value

    document = poisoned(make())
    page = check(pages.render([document]))
    assert page.shown.count(HOSTILE) > 3
    assert document["command"] in page.shown


def test_what_was_not_measured_is_a_dash() -> None:
    """NaN and infinity are null in a saved result: neither zero nor a bar."""
    perplexity, metrics, ops = result("ppl-decode-tiny-gpt2-cpu"), lm_eval(), result("kernels-cpu")
    before = check(pages.render([perplexity])).tags.count("rect")
    perplexity["result"] |= {"kl_reference_patched": None, "perplexity_patched": None}
    perplexity["result"] |= {"change_percent": None, "nll_difference_standard_error": None}
    metrics["metrics"][0]["patched"] = None
    page = check(pages.render([perplexity]))
    assert page.tags.count("rect") == before - 2
    assert page.shown.split("\n").count("–") == 4  # three of the table, and the change's tile
    assert "± –" in page.shown
    assert check(pages.render([metrics])).marked == ["–", "2.0e-02"]
    shares = check(pages.render([ops])).shown.split("\n").count("–")
    assert shares == len(ops["cases"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 10_000, "is not JSON"),
        (b"[1]", "no result of hf-fuse, whose kinds are decode, decode sweep, demo"),
        (b'{"kind": ["decode"]}', "no result of hf-fuse"),
        (b'{"kind": "training"}', "no result of hf-fuse"),
        (b'{"kind": "decode"}', "not a whole decode result (KeyError"),
        (b'{"kind": "decode sweep", "results": []}', "not a whole decode sweep result"),
    ],
    ids=["missing", "cut", "bytes", "deep", "list", "kind", "unknown", "empty", "no rows"],
)
def test_what_is_no_result_is_one_line(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, page = tmp_path / "result.json", tmp_path / "page.html"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["report", str(path), "--html", str(page)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not page.exists()


@each_kind
def test_a_result_of_which_anything_is_missing_is_no_traceback(
    make: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    whole, path = make(), tmp_path / "result.json"
    for key in whole:
        for value in (None, "text", {}, [1]):
            path.write_text(json.dumps({**whole, key: value}))
            with suppress(UsageError):
                pages.load(path)  # which renders it


def test_report_does_not_replace_a_result(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(lm_eval()))
    assert cli.main(["report", str(path), "--html", str(path)]) == 2
    assert "would replace a result" in capsys.readouterr().err
    assert json.loads(path.read_text()) == lm_eval()


SHORT = ["--max-tokens", "60", "--context", "16"]
FEW = ["--prompt-length", "4", "--new-tokens", "3", "--repeats", "1"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "command",
    [
        ["ppl", "tiny-llama", *SHORT, "--device", "cpu"],
        ["tpot", "tiny-gpt2", *FEW, "--device", "cpu"],
        ["tpot", "tiny-gpt2", *FEW, "--batch-size", "1,2", "--device", "cpu"],
        ["step", "tiny-gpt_neox", "--device", "cpu"],
        ["kernels"],
    ],
    ids=["ppl", "tpot", "sweep", "step", "kernels"],
)
def test_a_saved_result_gives_the_page_of_its_run(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(kernels, "measure_on_cpu", lambda: result("kernels-cpu")["cases"])
    saved, first, second = (tmp_path / name for name in ("a.json", "new/a.html", "b.html"))
    assert cli.main([*command, "--json", str(saved), "--html", str(first)]) == 0
    assert cli.main(["report", str(saved), "--html", str(second)]) == 0
    page = check(first.read_text(encoding="utf-8"))
    assert first.read_text(encoding="utf-8") == second.read_text(encoding="utf-8")
    assert "svg" in page.tags
    assert command[-1] in page.shown or command == ["kernels"]
    assert str(tmp_path) not in page.shown


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        ("ppl tiny-llama", "hf_fuse.eval.loading.load_model"),
        ("tpot tiny-llama", "hf_fuse.eval.loading.load_model"),
        ("step tiny-llama", "hf_fuse.eval.loading.load_model"),
        ("kernels", "hf_fuse.eval.kernels.measure_on_cpu"),
        ("demo", "hf_fuse.eval.demo.measure"),
        ("lm-eval --compare --tasks hf_fuse_text", "hf_fuse.eval.harness.compare"),
    ],
    ids=lambda value: value.split()[0],
)
def test_what_cannot_be_written_is_said_before_the_work(
    command: str,
    unused: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("the evaluation ran")

    if command.startswith("lm-eval"):
        pytest.importorskip("lm_eval")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(unused, work)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for given, message in (
        (["--html", "file/page.html"], "cannot write file/page.html"),
        (["--html", "same", "--json", "same"], "each output needs a file of its own"),
    ):
        assert cli.main([*command.split(), *given]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, playwright's own or the system's. Skips, with the reason, without one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    reasons = []
    with playwright.sync_playwright() as running:
        for path in (None, *filter(None, map(shutil.which, CHROMIUMS))):
            try:
                found = running.chromium.launch(executable_path=path)
            except playwright.Error as error:
                reasons.append(f"{path or 'of playwright'}: {str(error).splitlines()[0]}")
                continue
            yield found
            found.close()
            return
    pytest.skip(f"no Chromium that starts ({'; '.join(reasons)})")


def visit(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page, and all that it said or asked for beyond itself."""
    page, noise = browser.new_page(**options), []
    page.on("console", lambda message: noise.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: noise.append(f"error: {error}"))
    page.on("request", lambda r: noise.append(r.url) if r.url != path.as_uri() else None)
    page.goto(path.as_uri(), wait_until="load")
    return page, noise


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
COLORS = "getComputedStyle(document.body)"


def test_pages_are_quiet_and_fit_in_chromium(browser: Any, tmp_path: Path) -> None:
    documents = [make() for make in EACH_KIND]
    long = copy.deepcopy(documents[0])
    long["model"] = long["command"] = "shape:" + "x" * 300
    path = tmp_path / "page.html"
    path.write_text(pages.render([*documents, long]), encoding="utf-8")
    papers = {}
    for scheme in ("light", "dark"):
        for width in (390, 1200):
            viewport = {"width": width, "height": 900}
            page, noise = visit(browser, path, viewport=viewport, color_scheme=scheme)
            assert page.evaluate(OVERFLOW) == 0, f"{scheme}, {width} px"
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert page.evaluate(OVERFLOW) == 0, f"{scheme}, {width} px, all open"
            ink, paper = page.evaluate(f"[{COLORS}.color, {COLORS}.backgroundColor]")
            papers[scheme] = [sum(map(int, re.findall(r"\d+", c)[:3])) for c in (ink, paper)]
            assert noise == []
            page.close()
    assert papers["light"][0] < 200 < 700 < papers["light"][1]
    assert papers["dark"][1] < 200 < 600 < papers["dark"][0]


def test_bars_are_as_long_as_their_values(browser: Any, tmp_path: Path) -> None:
    document = result("decode-gpt2-xl-h200")
    path = tmp_path / "page.html"
    path.write_text(pages.render([document]), encoding="utf-8")
    page, _ = visit(browser, path, viewport={"width": 800, "height": 900})
    first = page.locator("svg[role=img]").first
    widths = {
        kind: first.locator(f"rect.{kind}").bounding_box()["width"]
        for kind in ("unpatched", "compiled", "patched")
    }
    timings = document["result"]
    for kind, variant in (("compiled", "static_compile"), ("patched", "patched")):
        expected = timings[variant]["tpot_ms"]["p50"] / timings["unpatched"]["tpot_ms"]["p50"]
        assert widths[kind] / widths["unpatched"] == pytest.approx(expected, rel=0.05)
    page.close()


def test_a_page_that_asks_for_something_is_noticed(browser: Any, tmp_path: Path) -> None:
    """What the test above relies on; the page's policy keeps it from asking at all."""
    path = tmp_path / "page.html"
    image = "<img src='file:///nowhere.png'>"
    text = pages.render([lm_eval()])
    for made, expected in (
        (text.replace("<main>", f"<main>{image}"), "Content Security Policy"),
        (f"<!DOCTYPE html>{image}", "file:///nowhere.png"),
    ):
        path.write_text(made, encoding="utf-8")
        page, noise = visit(browser, path)
        assert any(expected in line for line in noise)
        page.close()
