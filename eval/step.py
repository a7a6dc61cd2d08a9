"""One decoding step, kernel by kernel: `hf-fuse step MODEL`.

Each kind of kernel is timed over all the model's layers, one after another as in a step, so that
its weights are not in the L2 cache: on a GPU in a CUDA graph, where launches overlap as they do in
the step. The kinds' times need not add up to the step's: there each overlaps with another kind.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hf_fuse
from hf_fuse import Report
from hf_fuse.decode.engine import DecodeEngine
from hf_fuse.eval.decode import read_bandwidth
from hf_fuse.eval.environment import evaluating
from hf_fuse.eval.kernels import time_alone
from hf_fuse.eval.loading import decoder_spec_of
from hf_fuse.eval.report import table

ROOM = 64  # slots beyond the context: replays of the whole step move on


@dataclass(frozen=True)
class Timed:
    """A kind of kernel, or the step; microseconds and bytes of one."""

    name: str
    count: int
    us: float
    bytes: int

    @property
    def gb_per_s(self) -> float:
        """Of what it must read."""
        return self.bytes / self.us / 1e3


@dataclass(frozen=True)
class StepResult:
    """`read_bytes_per_s`: the ceiling, measured in the same run; None on a CPU."""

    batch_size: int
    context: int
    kernels: tuple[Timed, ...]
    step: Timed
    read_bytes_per_s: float | None
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure_step(
    model: nn.Module, *, batch_size: int = 1, context: int = 128, **patch_options: Any
) -> StepResult:
    """Time the kernels of a greedy step after `context` tokens, and the whole step.

    The model comes back unpatched. Raises UsageError where the decode engine does not take it.
    """
    options = {"verify": False, **patch_options}
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    # A graph is not captured on the default stream.
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else nullcontext()
    with evaluating(model), hf_fuse.patched(model, **options), torch.no_grad(), stream:
        spec = decoder_spec_of(model)
        bandwidth = read_bandwidth(device)
        engine = DecodeEngine(spec, batch_size, context + ROOM, options.get("backend", "auto"))
        for cache in (*engine.keys, *engine.values):
            cache.normal_()

        def begin() -> None:
            engine.begin((), 0)
            engine.begin_at(context + 1, torch.zeros(batch_size, dtype=torch.int64))

        begin()
        kinds: dict[str, list[Callable[[], None]]] = {}
        read: dict[str, int] = {}
        for kernel in engine.kernels:
            kinds.setdefault(kernel.name, []).append(kernel.run)
            weights = sum(w.nbytes for w in kernel.weights)
            read[kernel.name] = read.get(kernel.name, 0) + weights
        read["embed"] = batch_size * spec.embedding[0].nbytes
        slots = engine.keys[0][:, :, :context]
        read["rotary, cache, attention"] = 2 * _nbytes(slots) * len(spec.layers)
        read["select"] = engine.logits.nbytes
        kinds["select"] = [engine.select]
        timed = [
            _timed(name, len(runs), engine.launches(runs), read[name], on_gpu)
            for name, runs in kinds.items()
        ]
        begin()
        report = hf_fuse.report(model)
        step = [*(kernel.run for kernel in engine.kernels), engine.select]
        whole = _timed("step", 1, engine.launches(step), sum(read.values()), on_gpu)
    return StepResult(batch_size, context, tuple(timed), whole, bandwidth, report)


def _nbytes(x: Tensor) -> int:
    """Of the elements, not of what lies between them."""
    return x.numel() * x.element_size()


def _timed(name: str, count: int, runs: list[Callable[[], None]], read: int, on_gpu: bool) -> Timed:
    """`runs` one after another: what one of `count` takes, and its share of the bytes they read."""

    def call() -> None:
        for run in runs:
            run()

    seconds = time_alone(call, calls=1) if on_gpu else _on_cpu(call)
    return Timed(name, count, seconds * 1e6 / count, read // count)


def _on_cpu(call: Callable[[], None]) -> float:
    times = []
    for _ in range(12):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def step_table(result: StepResult) -> str:
    """A line a kind of kernel, then the step."""
    ceiling = result.read_bytes_per_s
    rows = [
        [
            row.name,
            str(row.count),
            f"{row.us:.2f}",
            f"{row.bytes / 1e6:.2f}",
            f"{row.gb_per_s:.0f}",
            "" if ceiling is None else f"{1e11 * row.gb_per_s / ceiling:.1f}",
        ]
        for row in (*result.kernels, result.step)
    ]
    head = f"batch {result.batch_size}, context {result.context}"
    if ceiling is not None:
        head += f"; read ceiling {ceiling / 1e9:.0f} GB/s"
    return f"{head}\n\n{table(['kernel', 'a step', 'us', 'MB', 'GB/s', '% of read'], rows)}"
