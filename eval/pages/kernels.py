"""Bandwidth: of each kernel of a decoding step, and of each op against its peers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hf_fuse.eval.pages.parts import (
    Document,
    Markup,
    heading,
    number,
    patch_report,
    table,
    tag,
    times,
    together,
)
from hf_fuse.eval.pages.plots import Bar, bars, plots

PEERS = ("eager", "torch", "torch.compile", "liger")


def step(documents: Sequence[Document]) -> Markup:
    """Each kernel of a step against the read bandwidth of the same run."""
    note = (
        "Each kind of kernel over all layers, one after another. Their times need not add up to "
        "the step's, where each overlaps with another kind."
    )
    return together(tag("p", note), *(_step_of_one(document) for document in documents))


def _step_of_one(document: Document) -> Markup:
    ceiling = document["read_bytes_per_s"]
    kinds = [*document["kernels"], document["step"]]
    bandwidth, duration, rows = [], [], []
    for row in kinds:
        whole = row is document["step"]
        rate = row["bytes"] / row["us"] / 1e3
        share = 1e11 * rate / ceiling if ceiling else None
        name = "the whole step" if whole else row["name"]
        kind = "reference" if whole else "patched"
        bandwidth.append(Bar(name, rate, f"{rate:.0f} GB/s", kind))
        in_step = row["us"] * row["count"]
        duration.append(Bar(name, in_step, f"{row['count']} × {row['us']:.2f} µs", kind))
        rows.append(
            [
                name, row["count"], number(row["us"], 2), number(in_step, 2),
                number(row["bytes"] / 1e6, 2), number(rate, 0), number(share, 1),
            ]
        )  # fmt: skip
    head = ["kernel", "a step", "µs", "µs a step", "MB", "GB/s", "% of read"]
    limit = (ceiling / 1e9, f"read bandwidth {ceiling / 1e9:.0f} GB/s") if ceiling else None
    return together(
        heading(document, f"batch {document['batch_size']}, context {document['context']}"),
        plots(
            bars("Bandwidth; higher is better", bandwidth, limit),
            bars("Time in a step; lower is better", duration),
        ),
        table("Kernels of a step", head, rows),
        patch_report(document.get("report")),
    )


def ops(documents: Sequence[Document]) -> Markup:
    """Each op against the copy bandwidth of the same run and its peers."""
    note = (
        "The tick is the fastest other. × is the other's time over ours: below 1.00, marked, the "
        "other is faster."
    )
    return together(tag("p", note), *(_ops_of_one(document) for document in documents))


def _ops_of_one(document: Document) -> Markup:
    cases, ceiling = document["cases"], document.get("ceiling_bytes_per_s")
    title = tag("h3", document["device"])
    if not cases:
        return together(title, tag("p", "No case was measured."))
    limit = (ceiling / 1e9, f"copy {ceiling / 1e9:.0f} GB/s") if ceiling else None
    sizes: dict[str, list[dict[str, Any]]] = {}  # by the number of tokens
    for case in cases:
        found = re.search(r"\[(\d+), ", case["case"])
        sizes.setdefault(found[1] if found else "?", []).append(case)
    peers = [peer for peer in PEERS if any(peer in case["speedup"] for case in cases)]
    rows = [
        [
            case["case"], number(case["us"]["hf_fuse"], 2), number(case["gb_per_s"], 0),
            number(_percent(case["share_of_ceiling"]), 1),
            *(times(case["speedup"][p]) if p in case["speedup"] else "" for p in peers),
        ]
        for case in cases
    ]  # fmt: skip
    head = ["op", "µs", "GB/s", "% of copy", *(f"× {peer}" for peer in peers)]
    return together(
        title,
        plots(
            *(
                bars("Time, 1 token; lower is better", [_time(case) for case in found])
                if size == "1"  # of which bandwidth says nothing: the launch takes longer
                else bars(
                    f"Bandwidth, {size} tokens; higher is better",
                    [_bandwidth(case) for case in found],
                    limit,
                )
                for size, found in sizes.items()
            )
        ),
        table("Ops", head, rows),
    )


def _bandwidth(case: dict[str, Any]) -> Bar:
    rate, peer = case["gb_per_s"], _fastest(case)
    other = rate / case["speedup"][peer] if peer else None
    mark = None if other is None else (other, f"{peer} {other:.0f} GB/s")
    return Bar(_label(case), rate, f"{rate:.0f} GB/s", mark=mark)


def _time(case: dict[str, Any]) -> Bar:
    taken, peer = case["us"]["hf_fuse"], _fastest(case)
    mark = (case["us"][peer], f"{peer} {case['us'][peer]:.2f} µs") if peer else None
    return Bar(_label(case), taken, f"{taken:.2f} µs", mark=mark)


def _fastest(case: dict[str, Any]) -> str | None:
    return min(case["speedup"], key=case["speedup"].get, default=None)


def _label(case: dict[str, Any]) -> str:
    """Short enough for a phone: the number of tokens stands above the plot."""
    return re.sub(r"\[\d+, (\d+)\]", r"\1", case["case"])


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
