"""Results as text tables, JSON with provenance, HTML and PNG."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_fuse import Report
from hf_fuse.eval.decode import DecodeResult, Timing
from hf_fuse.eval.environment import UsageError, provenance, require
from hf_fuse.eval.pages import render
from hf_fuse.eval.perplexity import PerplexityResult, Score
from hf_fuse.eval.streaming import StreamingResult

_UNPATCHED, _PATCHED, _REFERENCE = "#9aa5b1", "#2b6cb0", "#d69e2e"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table: the first column to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *map(line, rows)])


def perplexity_table(result: PerplexityResult) -> str:
    """The three variants, then the paired differences."""
    variants: list[tuple[str, Score | None, float | None]] = [
        ("unpatched", result.unpatched, result.kl_reference_unpatched),
        ("patched", result.patched, result.kl_reference_patched),
        ("fp32 reference", result.reference, None),
    ]
    rows = [
        [name, f"{score.perplexity:.4f}", f"{float(score.nll.mean()):.6f}", _small(kl)]
        for name, score, kl in variants
        if score is not None
    ]
    difference = result.nll_difference
    lines = [
        table(["variant", "perplexity", "NLL (nats)", "KL(fp32 ‖ variant)"], rows),
        "",
        f"perplexity change        {change(result.change_percent)}",
        f"NLL difference, paired   {difference.mean:+.2e} ± {difference.standard_error:.1e} nats",
        f"KL(unpatched ‖ patched)  {_small(result.kl_unpatched_patched)} nats",
        *fused_lines(result.report),
        f"{result.num_scored} tokens scored, context {result.context}, stride {result.stride}"
        + (", patched: token by token through the decode engine" * (result.through == "decode")),
    ]
    return "\n".join([*lines, *([f"note: {result.note}"] if result.note else [])])


def streaming_table(result: StreamingResult) -> str:
    """Perplexity by quarters of the text, then the steps' times."""
    rows = [
        [r.name, *(f"{q:.3f}" for q in r.quarters), f"{r.change_percent:+.1f} %"]
        for r in result.readings
    ]
    headers = ["perplexity of", *(f"quarter {i}" for i in range(1, 5)), "last over first"]
    early, late = result.early, result.late
    first = result.attention
    return "\n".join([
        table(headers, rows),
        "",
        f"attention to the first {first.tokens} of {first.context} tokens: {first.share:.4f}; "
        f"spread evenly {first.even:.4f}",
        *(
            f"TPOT from token {t.token}: median {t.median_ms:.4f} ms, mean {t.mean_ms:.4f} ms"
            for t in (early, late)
        ),
        f"late over early {result.tpot_ratio:.4f}, the median of turns",
        f"{result.num_tokens} tokens, one by one through the decode engine",
        *fused_lines(result.report),
    ])  # fmt: skip


def decode_table(result: DecodeResult) -> str:
    """Whether the answers agree, then the two variants' times."""
    rows = [_timing_row("unpatched", result.unpatched), _timing_row("patched", result.patched)]
    if result.static_compile:
        rows.insert(1, _timing_row("static cache, compiled", result.static_compile))
    if result.sampled:
        rows.append(_timing_row("patched, sampling", result.sampled))
    headers = ["variant", "first call s", "TTFT ms", "TPOT p10 ms", "p50", "p90"]
    headers += ["tokens/s", "peak MiB"]
    return "\n".join([
        f"greedy tokens identical: {identical(result)}",
        "",
        table(headers, rows),
        "",
        f"{result.speedup:.2f}× the unpatched speed (median TPOT); prompt {result.prompt_length}, "
        f"{result.new_tokens} new tokens, batch {result.batch_size}, {result.repeats} turns each",
        *_floor_line(result),
        *fused_lines(result.report),
    ])  # fmt: skip


def sweep_table(results: Sequence[DecodeResult]) -> str:
    """A line for each batch size and prompt length: median TPOT of every variant, tokens/s."""
    sampled = ["sampled"] if any(r.sampled for r in results) else []
    headers = ["batch", "prompt", "unpatched ms", "compiled", "patched", *sampled]
    headers += ["floor", "×", "tokens/s"]
    rows = [
        [
            str(r.batch_size),
            str(r.prompt_length),
            f"{r.unpatched.tpot_ms.p50:.3f}",
            f"{r.static_compile.tpot_ms.p50:.3f}" if r.static_compile else "",
            f"{r.patched.tpot_ms.p50:.3f}",
            *([f"{r.sampled.tpot_ms.p50:.3f}"] if r.sampled else []),
            f"{r.floor_ms:.3f}" if r.floor_ms else "",
            f"{r.speedup:.2f}",
            f"{1e3 * r.batch_size / r.patched.tpot_ms.p50:.0f}",
        ]
        for r in results
    ]
    different = [
        f"batch {r.batch_size}, prompt {r.prompt_length}: greedy tokens identical: {identical(r)}"
        for r in results
        if not r.identical
    ]
    return "\n".join([table(headers, rows), *different, *fused_lines(results[-1].report)])


def _floor_line(result: DecodeResult) -> list[str]:
    if result.floor_ms is None:
        return []
    over = result.patched.tpot_ms.p50 / result.floor_ms
    return [f"floor (bytes at the measured read bandwidth) {result.floor_ms:.3f} ms; {over:.2f} ×"]


def fused_lines(report: Report) -> list[str]:
    """How many modules ran fused and where, and what did not and why."""
    where = Counter(module.backend for module in report.modules)
    lines = [f"fused: {count} modules on {backend}" for backend, count in where.items()]
    lines += [f"left alone: {name}: {why}" for name, why in report.skipped.items()]
    lines += [f"left to transformers: {why}" for why in report.left_to_transformers]
    return lines + [f"{name} kernels are not there: {why}" for name, why in report.failures.items()]


def identical(result: DecodeResult) -> str:
    """ "yes", or where the tokens part."""
    if result.first_mismatch is None:
        return "yes"
    row, position = result.first_mismatch
    return f"no: row {row} from new token {position}"


def change(percent: float) -> str:
    """A signed percentage; a change that rounds to nothing has no sign."""
    text = f"{percent:+.4f} %"
    return text if float(text[:-2]) else "0.0000 %"


def prepare_output(path: str | Path) -> Path:
    """Make the folder of a file to be written. Raises UsageError where the file cannot be."""
    path = Path(path)
    try:
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if new:  # nothing stays behind if the work to come fails
            path.unlink()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    return path


def prepare_outputs(*paths: str | Path | None) -> None:
    """`prepare_output` for each that is given; raises UsageError where two are one file, too."""
    given = [path for path in paths if path]
    for path in given:
        prepare_output(path)
    if len({Path(path).resolve() for path in given}) < len(given):
        raise UsageError(f"each output needs a file of its own: {', '.join(map(str, given))}")


def write_result(
    kind: str,
    result: Mapping[str, Any],
    *,
    device: torch.device | str,
    arguments: Sequence[str] = (),
    json_path: str | Path | None = None,
    html_path: str | Path | None = None,
) -> None:
    """Write `result` with its provenance: JSON, where NaN and infinity become null, and the page
    that `hf-fuse report` makes of that JSON.

    Raises UsageError for a path that cannot be written.
    """
    payload = {"kind": kind, **provenance(device, arguments), **result}
    text = json.dumps(_finite(payload), indent=2, allow_nan=False) + "\n"
    if json_path:
        prepare_output(json_path).write_text(text, encoding="utf-8")
    if html_path:
        write_html(html_path, [json.loads(text)])


def write_html(path: str | Path, documents: Sequence[Mapping[str, Any]]) -> None:
    """Write one page of saved results. Raises UsageError for a path that cannot be written."""
    # A name that is no UTF-8 (a folder's may be anything) shows as question marks.
    prepare_output(path).write_text(render(documents), encoding="utf-8", errors="replace")


def write_png(
    path: str | Path,
    perplexities: Mapping[str, PerplexityResult] | None = None,
    decodes: Mapping[str, DecodeResult] | None = None,
    sweep: Sequence[DecodeResult] | None = None,
    streaming: StreamingResult | None = None,
) -> None:
    """Draw perplexity bars and TPOT distributions, each keyed by the model's name, the TPOT of a
    sweep, and perplexity over a long text.

    Raises UsageError without matplotlib, or for a path it cannot write.
    """
    figure_module = require("matplotlib.figure", "eval", "a PNG")
    panels = [
        (draw, data)
        for draw, data in (
            (_draw_perplexity, perplexities),
            (_draw_tpot, decodes),
            (_draw_sweep, sweep),
            (_draw_streaming, streaming),
        )
        if data
    ]
    figure = figure_module.Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, (draw, data) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        draw(axes, data)
    _legend(figure)
    figure.savefig(prepare_output(path), dpi=150, format="png")


def _draw_perplexity(axes: Any, results: Mapping[str, PerplexityResult]) -> None:
    for place, result in enumerate(results.values()):
        variants = [
            ("unpatched", result.unpatched, _UNPATCHED),
            ("patched", result.patched, _PATCHED),
        ]
        if result.reference is not None:
            variants.append(("fp32 reference", result.reference, _REFERENCE))
        for offset, (name, score, color) in enumerate(variants):
            x = place + 0.27 * (offset - (len(variants) - 1) / 2)
            axes.bar(x, score.perplexity, 0.25, color=color, label=name)
        highest = max(score.perplexity for _, score, _ in variants)
        _above(axes, place, highest, change(result.change_percent))
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title("Perplexity")
    _finish(axes, list(results))


def _draw_tpot(axes: Any, results: Mapping[str, DecodeResult]) -> None:
    for place, result in enumerate(results.values()):
        variants = [
            ("unpatched", result.unpatched, _UNPATCHED),
            ("patched", result.patched, _PATCHED),
        ]
        for offset, (name, timing, color) in enumerate(variants):
            drawn = axes.boxplot(
                [timing.tpot_samples_ms],
                positions=[place + 0.27 * (offset - 0.5)],
                widths=0.25,
                whis=(10, 90),  # the percentiles of the tables
                showfliers=False,
                patch_artist=True,
                manage_ticks=False,
                medianprops={"color": "black"},
            )
            drawn["boxes"][0].set(facecolor=color, label=name)
        highest = max(timing.tpot_ms.p90 for _, timing, _ in variants)
        _above(axes, place, highest, f"{result.speedup:.2f}×")
    axes.set_ylabel("time per output token, ms (lower is better)")
    axes.set_title("TPOT: median, quartiles, p10 to p90")
    _finish(axes, list(results))


def _draw_sweep(axes: Any, results: Sequence[DecodeResult]) -> None:
    labels = [f"{r.batch_size} × {r.prompt_length}" for r in results]
    lines = [
        ("unpatched", [r.unpatched.tpot_ms.p50 for r in results], _UNPATCHED),
        ("patched", [r.patched.tpot_ms.p50 for r in results], _PATCHED),
        ("floor", [r.floor_ms for r in results], "black"),
        ("compiled", [r.static_compile and r.static_compile.tpot_ms.p50 for r in results], "C2"),
    ]
    for name, values, color in lines:
        if all(values):
            axes.plot(range(len(labels)), values, "o-", color=color, label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(labels)), labels, rotation=45)
    axes.set_xlabel("batch × prompt length")
    axes.set_ylabel("time per output token, ms")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_streaming(axes: Any, result: StreamingResult) -> None:
    colors = (_PATCHED, _REFERENCE, "C2", _UNPATCHED)
    for reading, color in zip(result.readings, colors, strict=True):
        step = result.num_tokens / len(reading.parts)
        ends = [step * (i + 1) for i in range(len(reading.parts))]
        axes.plot(ends, reading.parts, "o-", color=color, label=reading.name)
    axes.set_yscale("log")
    axes.set_xlabel("token")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title("Perplexity over a long text")
    axes.spines[["top", "right"]].set_visible(False)


def _above(axes: Any, x: float, y: float, text: str) -> None:
    place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    axes.annotate(text, (x, y), fontsize=9, **place)


def _finish(axes: Any, names: list[str]) -> None:
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xticks(range(len(names)), names)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any) -> None:
    """One legend below all panels, each variant once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    columns = 3 if len(figure.axes) > 1 else 2
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def _timing_row(name: str, timing: Timing) -> list[str]:
    tpot = timing.tpot_ms
    times = [f"{t:.3f}" for t in (timing.ttft_ms.p50, tpot.p10, tpot.p50, tpot.p90)]
    return [
        name,
        f"{timing.first_call_s:.2f}",
        *times,
        f"{timing.tokens_per_s:.1f}",
        f"{timing.peak_memory_bytes / 2**20:.0f}",
    ]


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
