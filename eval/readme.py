"""The tables of the README and of docs/, made from the results. `python -m hf_fuse.eval.readme`, in
a clone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_fuse.patches import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def supported_section() -> str:
    """The architectures, as they state themselves."""
    rows = [[f"`{a.model_type}`", f"`{a.backbone.__name__}`", a.summary] for a in ARCHITECTURES]
    return _markdown(["architecture", "every head of", "fused"], rows, numbers=False)


def demo_section() -> str:
    """What the demo printed, from demo-cpu.json, and how much faster it was elsewhere."""
    result = _load("demo-cpu.json")
    head = [
        "model", "parameters", "perplexity", "patched", "greedy tokens", "TPOT ms", "patched", "×",
    ]  # fmt: skip
    rows = [
        [
            row["model"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['perplexity']['perplexity_unpatched']:.3f}",
            f"{row['perplexity']['perplexity_patched']:.3f}",
            "identical" if row["decode"]["identical"] else "differ",
            f"{row['decode']['unpatched']['tpot_ms']['p50']:.2f}",
            f"{row['decode']['patched']['tpot_ms']['p50']:.2f}",
            f"{row['decode']['speedup']:.2f}",
        ]
        for row in result["rows"]
    ]
    others = [_load(path.name) for path in sorted(RESULTS.glob("demo-cpu-*.json"))]
    where = [f"This is an {result['device']}."]
    for run in others:
        ratios = ", ".join(f"{row['decode']['speedup']:.2f}" for row in run["rows"])
        where.append(f"On an {run['device']}: {ratios} ×.")
    return "\n\n".join([_markdown(head, rows), " ".join(where)])


def kernels_section() -> str:
    """The ops on the GPU and on the CPU, from kernels-h200.json and kernels-cpu.json."""
    gpu, cpu = _load("kernels-h200.json"), _load("kernels-cpu.json")
    ceiling = gpu["ceiling_bytes_per_s"] / 1e12
    peers = ["eager", "torch", "torch.compile", "liger"]
    rows = [
        [
            row["case"],
            f"{row['us']['hf_fuse']:.2f}",
            f"{100 * row['share_of_ceiling']:.0f} %" if " [1, " not in row["case"] else "",
            *(f"{row['speedup'][p]:.2f}" if p in row["speedup"] else "" for p in peers),
        ]
        for row in gpu["cases"]
    ]
    cpu_rows = [
        [row["case"], *(f"{row['speedup'][p]:.2f}" for p in ("eager", "torch"))]
        for row in cpu["cases"]
    ]
    liger = gpu["versions"].get("liger-kernel", "")
    return "\n\n".join(
        [
            f"Each op in a CUDA graph, measured on an {gpu['device']} (torch "
            f"{gpu['versions']['torch']}, bf16, {gpu['date'][:10]}; copy ceiling of the same run "
            f"{ceiling:.2f} TB/s). × is the other's time over ours: below 1.00 the other is "
            f"faster. eager is what transformers runs; liger is liger-kernel {liger}.",
            _markdown(["op", "µs", "of the ceiling", *(f"× {p}" for p in peers)], rows),
            "On two CPU cores, ratios of one run (eager: the add and the norm module):",
            _markdown(["op", "× eager", "× torch's functions"], cpu_rows),
        ]
    )


def _median(timing: dict | None, measure: str, digits: int) -> str:
    return "" if timing is None else f"{timing[measure]['p50']:.{digits}f}"


def decode_section() -> str:
    """`generate` at real shapes, from decode-*.json."""
    results = [_load(path.name) for path in sorted(RESULTS.glob("decode-*.json"))]
    gpu = [r for r in results if r["device"].startswith("NVIDIA")]
    cpu = [r for r in results if not r["device"].startswith("NVIDIA")]
    sides = ("unpatched", "static_compile", "patched", "sampled")
    rows = [
        [
            r["model"].removeprefix("shape:"),
            *(_median(r["result"][side], "tpot_ms", 3) for side in sides),
            f"{r['result']['floor_ms']:.3f}",
            *(_median(r["result"][side], "ttft_ms", 1) for side in sides[:3]),
        ]
        for r in gpu
    ]
    cpu_rows = [
        [
            r["model"].removeprefix("shape:"),
            r["dtype"],
            r["device"].partition(",")[0],
            f"{r['result']['speedup']:.2f}",
            *(_gb_per_s(r, side) for side in ("unpatched", "patched")),
        ]
        for r in cpu
    ]
    first = gpu[0]
    return "\n\n".join(
        [
            f"`model.generate`, greedy, one sequence, prompt 128, 128 new tokens (64 where no "
            f"compiled path stands beside it), end of sequence checked, {first['dtype']}, "
            f"published shapes with random weights, measured on an "
            f"{first['device']} (torch {first['versions']['torch']}, transformers "
            f"{first['versions']['transformers']}, {_days(gpu)}). Milliseconds, medians: "
            f"time per output token in transformers' eager mode, with its static cache and "
            f"`torch.compile`, patched, and patched sampling (temperature, top-k, top-p); the "
            f"floor, a step's bytes at the read bandwidth measured in the same run; then the time "
            f"to the first token.",
            _markdown(
                [
                    "shape", "eager", "compiled", "patched", "sampling", "floor",
                    "TTFT eager", "compiled", "patched",
                ],
                rows,
            ),
            "After longer prompts, 64 new tokens:",
            _markdown(
                ["shape", "prompt", "eager", "patched", "floor"],
                [*_sweep("context", "prompt_length", ("unpatched", "patched"))],
            ),
            "Several sequences at once, 32 new tokens; tokens/s are of all of them, patched:",
            _markdown(
                ["shape", "sequences", "eager", "compiled", "patched", "floor", "tokens/s"],
                [
                    [*row, f"{1e3 * int(row[1]) / float(row[4]):.0f}"]
                    for row in _sweep("batches", "batch_size", sides[:3])
                ],
            ),
            "On two CPU cores, TPOT, ratios of one run each, and at what rate the weights and the "
            "cache are read. Memory is the bound, and other work shares it:",
            _markdown(["shape", "dtype", "on", "×", "GB/s eager", "patched"], cpu_rows),
            "Perplexity in bf16, the patched model token by token through those steps (tiny "
            "models, CPU; KL is the divergence from the fp32 model, in nats):",
            _markdown(
                ["model", "perplexity", "patched", "KL", "patched"],
                [_through_decode(p.name) for p in sorted(RESULTS.glob("ppl-decode-*.json"))],
            ),
        ]
    )  # fmt: skip


def step_section() -> str:
    """A step of each shape, kernel by kernel, from step-*.json."""
    parts = []
    for path in sorted(RESULTS.glob("step-*.json")):
        run = _load(path.name)
        ceiling = run["read_bytes_per_s"]
        rows = [
            [
                row["name"],
                str(row["count"]),
                f"{row['us']:.2f}",
                f"{row['bytes'] / 1e6:.2f}",
                f"{1e8 * row['bytes'] / row['us'] / ceiling:.0f} %",
            ]
            for row in (*run["kernels"], run["step"])
        ]
        parts += [
            f"{run['model'].removeprefix('shape:')}, {run['dtype']}, {_sequences(run)} after "
            f"{run['context']} tokens, on an {run['device']}, {run['date'][:10]}; it reads at "
            f"{ceiling / 1e12:.2f} TB/s:",
            _markdown(["kernel", "a step", "µs", "MB it must read", "of the bandwidth"], rows),
        ]
    return "\n\n".join(parts)


def losses_section() -> str:
    """Where another is faster, in any of the results."""
    rows = []
    for name in ("kernels-h200.json", "kernels-cpu.json"):
        run = _load(name)
        rows += [
            [case["case"], run["device"], peer, f"{ratio:.3f}"]
            for case in run["cases"]
            for peer, ratio in case["speedup"].items()
            if ratio < 1
        ]
    rivals = {"unpatched": "eager", "static_compile": "compiled"}
    for path in sorted(RESULTS.glob("*.json")):
        run = _load(path.name)
        for result in (run.get("results") or [run["result"]]) if _decodes(run) else []:
            for side, rival in rivals.items():
                for measure in ("ttft_ms", "tpot_ms"):
                    ours, theirs = ((result[s] or {}).get(measure) for s in ("patched", side))
                    if theirs and theirs["p50"] < ours["p50"]:
                        what = f"{measure[:4].upper()} of {run['model'].removeprefix('shape:')}"
                        sizes = f"{result['batch_size']} × {result['prompt_length']}"
                        ratio = f"{theirs['p50'] / ours['p50']:.3f}"
                        rows.append(
                            [f"{what}, {run['dtype']}, {sizes}", run["device"], rival, ratio]
                        )
    return _markdown(["what", "on", "faster", "its time over ours"], rows)


def results_section() -> str:
    """Every result, and the command that made it."""
    rows = [
        [f"`{path.name}`", run["device"], run["date"][:10], f"`{run['command']}`"]
        for path in sorted(RESULTS.glob("*.json"))
        for run in [_load(path.name)]
    ]
    return _markdown(["result", "measured on", "day", "by"], rows, numbers=False)


def _gb_per_s(run: dict[str, Any], side: str) -> str:
    result = run["result"]
    return f"{result['step_bytes'] / result[side]['tpot_ms']['p50'] / 1e6:.1f}"


def _days(runs: list[dict[str, Any]]) -> str:
    days = sorted({run["date"][:10] for run in runs})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _decodes(run: dict[str, Any]) -> bool:
    return run["kind"] in ("decode", "decode sweep")


def _sequences(run: dict[str, Any]) -> str:
    return "one sequence" if run["batch_size"] == 1 else f"{run['batch_size']} sequences"


def _sweep(kind: str, varied: str, sides: tuple[str, ...]) -> Iterator[list[str]]:
    """Shape, what was varied, the sides' TPOT and the floor, from {kind}-*.json."""
    for path in sorted(RESULTS.glob(f"{kind}-*.json")):
        run = _load(path.name)
        for result in run["results"]:
            medians = (f"{result[side]['tpot_ms']['p50']:.3f}" for side in sides)
            shape = run["model"].removeprefix("shape:")
            yield [shape, str(result[varied]), *medians, f"{result['floor_ms']:.3f}"]


def _through_decode(name: str) -> list[str]:
    run = _load(name)
    result = run["result"]
    return [
        run["model"],
        *(f"{result[f'perplexity_{side}']:.3f}" for side in ("unpatched", "patched")),
        *(f"{result[f'kl_reference_{side}']:.1e}" for side in ("unpatched", "patched")),
    ]


SECTIONS = {
    "demo": demo_section,
    "supported": supported_section,
    "decode": decode_section,
    "kernels": kernels_section,
    "step": step_section,
    "losses": losses_section,
    "results": results_section,
}


def rewritten(text: str) -> str:
    """`text` with what stands between each pair of markers made anew."""
    for name, section in SECTIONS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if f"<!-- {name} -->" in text:
            made = section()
            text = re.sub(
                pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL
            )
    return text


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _markdown(head: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    right = "---:" if numbers else "---"
    lines = [head, ["---", *[right] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
