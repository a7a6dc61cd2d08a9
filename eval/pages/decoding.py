"""TPOT and TTFT against the baselines and the floor: one result, or a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from hf_fuse.eval.pages.parts import (
    Document,
    Markup,
    heading,
    model_of,
    number,
    patch_report,
    ratio,
    table,
    tag,
    tiles,
    times,
    together,
)
from hf_fuse.eval.pages.plots import Bar, Series, bars, lines, plots

# A variant's key in a result, its name, its class in report.css; those we are measured against.
VARIANTS = (
    ("unpatched", "unpatched", "unpatched"),
    ("static_compile", "static cache, compiled", "compiled"),
    ("patched", "patched", "patched"),
    ("sampled", "patched, sampling", "sampled"),
)
BASELINES = VARIANTS[:2]
AXES = {"batch_size": "batch", "prompt_length": "prompt"}
NOTE = (
    "Greedy model.generate, the variants in turns; medians. The floor is a step's bytes at the "
    "read bandwidth of the same run. × is the other's time over the patched model's: below 1.00, "
    "marked, the other is faster."
)


def decode(documents: Sequence[Document]) -> Markup:
    """All in one table where there are several, then each."""
    labels = [[model_of(d), d["dtype"], d["device"]] for d in documents]
    results = [d["result"] for d in documents]
    several = len(documents) > 1
    return together(
        tag("p", NOTE),
        _table(["model", "dtype", "device"], labels, results) if several else None,
        *(_one(document) for document in documents),
    )


def sweep(documents: Sequence[Document]) -> Markup:
    """Each sweep's lines and table."""
    return together(tag("p", NOTE), *(_one_sweep(document) for document in documents))


def _one(document: Document) -> Markup:
    r = document["result"]
    there = [(r[key], name, kind) for key, name, kind in VARIANTS if r.get(key)]
    tpot, ttft = (
        [
            Bar(name, p["p50"], f"{p['p50']:.3f} ms", kind, (p["p10"], p["p90"]))
            for timing, name, kind in there
            for p in [timing[what]]
        ]
        for what in ("tpot_ms", "ttft_ms")
    )
    floor = r.get("floor_ms")
    rows = [
        [
            name,
            *(number(timing["tpot_ms"][p]) for p in ("p10", "p50", "p90")),
            *(number(timing["ttft_ms"][p], 2) for p in ("p10", "p50", "p90")),
            number(timing.get("first_call_s"), 2),
            number(timing["tokens_per_s"], 1),
            number(timing["peak_memory_bytes"] / 2**20, 0),
        ]
        for timing, name, _ in there
    ]
    head = ["variant", "TPOT p10 ms", "p50", "p90", "TTFT p10 ms", "p50", "p90"]
    head += ["first call s", "tokens/s", "peak MiB"]
    run = (
        f"batch {r['batch_size']}, prompt {r['prompt_length']}, {r['new_tokens']} new tokens, "
        f"{r['repeats']} turns"
    )
    limit = (floor, f"floor {floor:.3f} ms") if floor else None
    return together(
        heading(document, run),
        tiles(_facts(r)),
        plots(
            bars("Time per output token, p10 to p90; lower is better", tpot, limit),
            bars("Time to the first token, p10 to p90; lower is better", ttft),
        ),
        table("Timings", head, rows),
        _near_ties(document, [r]),
        patch_report(r["report"]),
    )


def _facts(r: Document) -> list[tuple[str, object]]:
    ours = r["patched"]["tpot_ms"]["p50"]
    facts: list[tuple[str, object]] = [("TPOT, patched", f"{ours:.3f} ms")]
    for key, _, kind in BASELINES:
        if r.get(key):
            facts.append((f"TPOT, × {kind}", times(_over_ours(r, key, "tpot_ms"), "×")))
            facts.append((f"TTFT, × {kind}", times(_over_ours(r, key, "ttft_ms"), "×")))
    if r.get("floor_ms"):
        facts.append(("TPOT over the floor", number(ratio(ours, r["floor_ms"]), 2, "×")))
    return [*facts, ("greedy tokens identical", _tokens(r))]


def _one_sweep(document: Document) -> Markup:
    results = document["results"]
    labels = [[str(r["batch_size"]), str(r["prompt_length"])] for r in results]
    varied, fixed = AXES if len({r["batch_size"] for r in results}) > 1 else reversed(AXES)
    figures = [
        _lines(what, varied, fixed, value, [r for r in results if r[fixed] == value])
        for value in dict.fromkeys(r[fixed] for r in results)
        for what in ("tpot_ms", "ttft_ms")
    ]
    reports = [r["report"] for r in results]
    distinct = [report for i, report in enumerate(reports) if report not in reports[:i]]
    return together(
        heading(document, f"{results[0]['new_tokens']} new tokens"),
        plots(*figures),
        _table(["batch", "prompt"], labels, results),
        _near_ties(document, results),
        *(patch_report(report) for report in distinct),
    )


def _lines(
    what: str, varied: str, fixed: str, value: int, results: Sequence[Document]
) -> Markup | None:
    series = [
        Series(name, [_median(r, key, what) for r in results], kind) for key, name, kind in VARIANTS
    ]
    title = "Time to the first token"
    if what == "tpot_ms":
        title = "Time per output token"
        series.append(Series("floor", [r.get("floor_ms") for r in results], "floor"))
    title += f", ms, by {AXES[varied]}; {AXES[fixed]} {value}; lower is better"
    return lines(title, [str(r[varied]) for r in results], series, "ms")


def _table(head: list[str], labels: list[list[str]], results: Sequence[Document]) -> Markup:
    """A line a result: TPOT, TTFT, what the others take over ours."""
    there = [v for v in VARIANTS if any(r.get(v[0]) for r in results)]
    others = [v for v in BASELINES if v in there]
    floor = any(r.get("floor_ms") for r in results)
    head = [*head, *(f"TPOT ms {name}" for _, name, _ in there), *["floor"] * floor]
    head += [f"× {kind}" for *_, kind in others]
    head += [f"TTFT ms {name}" for _, name, _ in there]
    head += [f"× {kind}" for *_, kind in others] + ["tokens/s, patched", "greedy tokens identical"]
    rows = [
        [
            *label,
            *(number(_median(r, key, "tpot_ms")) for key, *_ in there),
            *[number(r.get("floor_ms"))] * floor,
            *(times(_over_ours(r, key, "tpot_ms")) for key, *_ in others),
            *(number(_median(r, key, "ttft_ms"), 2) for key, *_ in there),
            *(times(_over_ours(r, key, "ttft_ms")) for key, *_ in others),
            number(r["patched"]["tokens_per_s"], 0),
            _tokens(r),
        ]
        for label, r in zip(labels, results, strict=True)
    ]
    return table("Time per output token and to the first token", head, rows)


def _median(result: Document, variant: str, what: str) -> float | None:
    timing = result.get(variant)
    return timing[what]["p50"] if timing else None


def _over_ours(result: Document, variant: str, what: str) -> float | None:
    return ratio(_median(result, variant, what), _median(result, "patched", what))


def _tokens(result: Document) -> str:
    if result["identical"]:
        return "yes"
    row, position = result["first_mismatch"]
    return f"no: row {row} from new token {position}"


def _near_ties(document: Document, results: Sequence[Document]) -> Markup | None:
    if document["dtype"] not in ("bfloat16", "float16") or all(r["identical"] for r in results):
        return None
    why = (
        "In 16 bits the greedy tokens of two correct implementations may part, at a near tie; "
        "perplexity and KL tell correct from wrong."
    )
    return tag("p", why, class_="soft")
