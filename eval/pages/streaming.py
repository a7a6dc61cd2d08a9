"""A long text with attention sinks and with a plain window: perplexity over it, and step times."""

from __future__ import annotations

from collections.abc import Sequence

from hf_fuse.eval.pages.parts import (
    Document,
    Markup,
    heading,
    number,
    patch_report,
    table,
    tag,
    tiles,
    together,
)
from hf_fuse.eval.pages.plots import Bar, Series, bars, lines, plots

KINDS = ("patched", "reference", "compiled", "unpatched")  # the readings' classes in report.css
NOTE = (
    "Token by token through the decode engine, sinks and plain window in caches of one size. "
    "Windows that begin anew show what the text itself does. Steps were timed in turns."
)


def streaming(documents: Sequence[Document]) -> Markup:
    """Each result."""
    return together(tag("p", NOTE), *(_one(document) for document in documents))


def _one(document: Document) -> Markup:
    r = document["result"]
    readings = list(zip(r["readings"], KINDS, strict=True))
    rows = [
        [reading["name"], *map(number, reading["quarters"]), _change(reading["change_percent"])]
        for reading, _ in readings
    ]
    parts = len(r["readings"][0]["parts"])
    ends = [f"{r['num_tokens'] * (i + 1) / parts / 1000:.3g}k" for i in range(parts)]
    labels = [end if i % 4 == 3 else "" for i, end in enumerate(ends)]
    series = [Series(reading["name"], reading["parts"], kind) for reading, kind in readings]
    early, late, attention = r["early"], r["late"], r["attention"]
    steps = [
        Bar(f"from token {t['token']}", t["median_ms"], f"{t['median_ms']:.3f} ms")
        for t in (early, late)
    ]
    facts = [
        ("last quarter over first, sinks", _change(r["readings"][0]["change_percent"])),
        ("plain window", _change(r["readings"][1]["change_percent"])),
        (
            f"attention to the first {attention['tokens']} tokens, evenly spread",
            f"{number(attention['share'])}, {number(attention['even'])}",
        ),
        ("late step over early", f"{r['tpot_ratio']:.4f}"),
        ("tokens", r["num_tokens"]),
    ]
    quarters = [f"quarter {i}" for i in range(1, 5)]
    return together(
        heading(document, document.get("text")),
        tiles(facts),
        plots(
            lines("Perplexity up to a token; lower is better", labels, series, ""),
            bars("Time per output token, median", steps),
        ),
        table("Perplexity by quarters", ["reading", *quarters, "last over first"], rows),
        patch_report(r["report"]),
    )


def _change(percent: float | None) -> str:
    return "–" if percent is None else f"{percent:+.1f} %"
