"""What a model answers, before and after patching: perplexity with KL, and lm-eval's metrics."""

from __future__ import annotations

from collections.abc import Sequence

from hf_fuse.eval.pages.parts import (
    Document,
    Markup,
    heading,
    model_of,
    number,
    patch_report,
    small,
    table,
    tag,
    tiles,
    together,
)
from hf_fuse.eval.pages.plots import Bar, bars, plots

# A side's key in a result (and its class in report.css), its name.
SIDES = (("unpatched", "unpatched"), ("patched", "patched"), ("reference", "fp32 reference"))
# A divergence's key, its name, its class.
PAIRS = (
    ("reference_unpatched", "KL(fp32 ‖ unpatched)", "unpatched"),
    ("reference_patched", "KL(fp32 ‖ patched)", "patched"),
    ("unpatched_patched", "KL(unpatched ‖ patched)", "sampled"),
)


def perplexity(documents: Sequence[Document]) -> Markup:
    """All in one table, then each."""
    rows = []
    for document in documents:
        r = document["result"]
        perplexities = [number(r[f"perplexity_{key}"]) for key, _ in SIDES]
        divergences = [small(r[f"kl_{key}"]) for key, *_ in PAIRS]
        rows.append(
            [
                model_of(document), document["dtype"], *perplexities,
                _change(r["change_percent"]), *divergences,
            ]
        )  # fmt: skip
    names = [f"perplexity {name}" for _, name in SIDES]
    head = ["model", "dtype", *names, "change", *(f"{name} nats" for _, name, _ in PAIRS)]
    note = "The variants read the same windows. KL is the mean over the scored tokens."
    return together(
        tag("p", note),
        table("Perplexity and KL", head, rows),
        *(_perplexity_of_one(document) for document in documents),
    )


def _perplexity_of_one(document: Document) -> Markup:
    r = document["result"]
    perplexities = [
        Bar(name, r[f"perplexity_{key}"], number(r[f"perplexity_{key}"], 4), key)
        for key, name in SIDES
    ]
    divergences = [
        Bar(name, r[f"kl_{key}"], f"{small(r[f'kl_{key}'])} nats", kind)
        for key, name, kind in PAIRS
    ]
    mean, error = r["nll_difference_mean"], r["nll_difference_standard_error"]
    facts = [
        ("perplexity change", _change(r["change_percent"])),
        ("NLL difference, paired, nats", f"{small(mean)} ± {small(error)}"),
        ("tokens scored", r["num_scored"]),
        ("context, stride", f"{r['context']}, {r['stride']}"),
    ]
    notes = [r["note"]]
    if r.get("through") == "decode":
        notes.append("the patched model reads token by token, by the decode engine's steps")
    return together(
        heading(document, document.get("text")),
        tiles(facts),
        plots(
            bars("Perplexity; lower is better", perplexities),
            bars("KL divergence; lower is better", divergences),
        ),
        *(tag("p", f"Note: {note}.", class_="soft") for note in notes if note),
        patch_report(r["report"]),
    )


def _change(percent: float | None) -> str:
    return "–" if percent is None else f"{percent:+.4f} %"


def lm_eval(documents: Sequence[Document]) -> Markup:
    """Every metric on both sides; a difference past the tolerance is marked."""
    return together(*(_metrics(document) for document in documents))


def _metrics(document: Document) -> Markup:
    tolerance, metrics = document["tolerance"], document["metrics"]
    differences = [_difference(m["unpatched"], m["patched"]) for m in metrics]
    # Not a number is past it, too.
    past = [d is None or d > tolerance for d in differences]
    shown = ["–" if d is None else f"{d:.1e}" for d in differences]
    rows = [
        [
            m["task"], m["name"], number(m["unpatched"], 6), number(m["patched"], 6),
            tag("span", text, class_="loss") if bad else text,
        ]
        for m, text, bad in zip(metrics, shown, past, strict=True)
    ]  # fmt: skip
    drawn = [
        Bar(f"{m['task']}, {m['name']}", d, text, "reference" if bad else "patched")
        for m, d, text, bad in zip(metrics, differences, shown, past, strict=True)
    ]
    verdict = f"{sum(past)} of {len(metrics)} metrics differ by more than {tolerance:g}, relative."
    return together(
        heading(document),
        tag("p", verdict),
        plots(bars("Relative difference", drawn, (tolerance, f"tolerance {tolerance:g}"))),
        table("Metrics", ["task", "metric", "unpatched", "patched", "difference"], rows),
        patch_report(document.get("report")),
    )


def _difference(unpatched: float | None, patched: float | None) -> float | None:
    if unpatched is None or patched is None:
        return None
    larger = max(abs(unpatched), abs(patched))
    return abs(patched - unpatched) / larger if larger else 0.0
