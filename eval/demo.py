"""The demo: perplexity and speed of the three tiny models, unpatched and patched, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fuse.eval.decode import DecodeResult, evaluate_decode
from hf_fuse.eval.environment import UsageError, device_name
from hf_fuse.eval.loading import (
    check_patchable,
    default_device,
    encode,
    load_model,
    prompts,
    tiny_models,
)
from hf_fuse.eval.perplexity import PerplexityResult, evaluate_perplexity
from hf_fuse.eval.report import (
    change,
    identical,
    prepare_outputs,
    table,
    write_png,
    write_result,
)
from hf_fuse.eval.text import pydoc_text

CONTEXT, STRIDE, PROMPT_LENGTH, NEW_TOKENS, REPEATS = 256, 128, 128, 64, 3


@dataclass(frozen=True)
class DemoRow:
    """One model's results."""

    model: str
    parameters: int
    perplexity: PerplexityResult
    decode: DecodeResult

    @property
    def same_answers(self) -> bool:
        """Identical greedy tokens, and a perplexity within 0.05 %."""
        return self.decode.identical and abs(self.perplexity.change_percent) <= 0.05


def run_demo(
    *,
    device: str | None = None,
    dtype: str = "float32",
    backend: str = "auto",
    json_path: str | Path = "results/demo.json",
    png_path: str | Path = "results/demo.png",
    html_path: str | Path | None = None,
    arguments: Sequence[str] = ("demo",),
) -> list[DemoRow]:
    """Measure every tiny model, print one table, save it as JSON and as a picture.

    Takes under two minutes on two CPU cores. In float32 greedy tokens are identical; bf16 may part
    at a near tie.
    """
    prepare_outputs(json_path, png_path, html_path)
    device = device or default_device()
    rows = [measure(name, device=device, dtype=dtype, backend=backend) for name in tiny_models()]
    print(f"{device_name(device)}, {dtype}; perplexity of text not trained on; greedy decoding\n")
    print(demo_table(rows))
    facts = {"dtype": dtype, "rows": [_row_dict(row) for row in rows]}
    write_result(
        "demo", facts, device=device, arguments=arguments, json_path=json_path, html_path=html_path
    )
    print("\nsaved", ", ".join(str(path) for path in (json_path, html_path) if path), end="")
    try:
        write_png(
            png_path, {r.model: r.perplexity for r in rows}, {r.model: r.decode for r in rows}
        )
        print(f" and {png_path}")
    except UsageError as error:
        print(f"; no picture: {error}")
    return rows


def measure(name: str, *, device: str, dtype: str, backend: str) -> DemoRow:
    """Perplexity over the held-out text, then decoding from its beginning."""
    model, tokenizer = load_model(name, dtype=dtype, device=device, progress=False)
    check_patchable(model, backend=backend, verify=False)
    text = pydoc_text("held-out")
    ids = encode(tokenizer, text)
    perplexity = evaluate_perplexity(model, ids, context=CONTEXT, stride=STRIDE, backend=backend)
    prompt = prompts(tokenizer, text, 1, PROMPT_LENGTH).to(device)
    decode = evaluate_decode(model, prompt, new_tokens=NEW_TOKENS, repeats=REPEATS, backend=backend)
    return DemoRow(name, sum(p.numel() for p in model.parameters()), perplexity, decode)


def demo_table(rows: Sequence[DemoRow]) -> str:
    """One line a model: the answers first, then the speed."""
    headers = [
        "model", "params", "ppl unpatched", "ppl patched", "change", "KL (nats)",
        "greedy identical", "TPOT unpatched ms", "TPOT patched ms", "×",
    ]  # fmt: skip
    return table(headers, [_cells(row) for row in rows])


def _cells(row: DemoRow) -> list[str]:
    perplexity, decode = row.perplexity, row.decode
    return [
        row.model,
        f"{row.parameters / 1e6:.2f} M",
        f"{perplexity.unpatched.perplexity:.3f}",
        f"{perplexity.patched.perplexity:.3f}",
        change(perplexity.change_percent),
        f"{perplexity.kl_unpatched_patched:.1e}",
        identical(decode),
        f"{decode.unpatched.tpot_ms.p50:.2f}",
        f"{decode.patched.tpot_ms.p50:.2f}",
        f"{decode.speedup:.2f}",
    ]


def _row_dict(row: DemoRow) -> dict[str, Any]:
    return {
        "model": row.model,
        "parameters": row.parameters,
        "same_answers": row.same_answers,
        "perplexity": row.perplexity.to_dict(),
        "decode": row.decode.to_dict(),
    }
