"""Bandwidth of each op against a ceiling measured in the same run, beside torch, torch.compile and
liger-kernel: `hf-fuse kernels`, on a GPU. Without one, add_norm against eager mode on the CPU.

Every variant is checked against float64 before it is timed, then captured in a CUDA graph and
replayed. The variants take turns, three rounds of them, each time alone and in fresh memory: where
the buffers of four streams come to lie moves a kernel by up to 5 %. The median counts. Large cases
rotate over inputs so that the L2 cache is cold; one-token cases run over the same input again and
again, because in a decoding step the previous kernel has just written it.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_fuse import ops
from hf_fuse.eval.environment import UsageError, device_name
from hf_fuse.eval.report import table, write_result
from hf_fuse.ops.add_norm import reference as add_norm_reference
from hf_fuse.ops.rotary import reference as rotary_reference

Variant = Callable[..., tuple[Tensor, ...]]

EPS = 1e-5
NORM_SHAPES = ((8192, 2560), (8192, 4096), (8192, 8192), (1, 2560), (1, 4096))
ROUNDS, WARM_REPLAYS, REPLAYS = 3, 3, 15


@dataclass(frozen=True)
class Case:
    """One op at one shape: how to make its inputs, what computes it, the bytes it must move."""

    name: str
    direction: str  # "forward" or "backward"
    num_tokens: int
    size: int
    bytes: int
    make: Callable[[], list[Tensor]]
    variants: dict[str, Variant]  # "hf_fuse", "eager" (the code it replaces), and peers
    truth: Variant  # run on float64 inputs

    @property
    def label(self) -> str:
        return f"{self.name} {self.direction} [{self.num_tokens}, {self.size}]"


def norm_case(
    kind: str,
    tokens: int,
    size: int,
    deltas: int,
    norms: int,
    direction: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """add_norm with `deltas` + 1 inputs and `norms` norms."""
    bias = kind == "layer"
    inputs_end = 1 + deltas

    def make() -> list[Tensor]:
        rows = [_randn(tokens, size, dtype=dtype) for _ in range(inputs_end)]
        vectors = [_randn(size, dtype=dtype) for _ in range(norms * (2 if bias else 1))]
        return rows + vectors

    def split(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        x, *rest = tensors
        vectors = rest[deltas:]
        pairs = [(vectors[2 * i], vectors[2 * i + 1]) for i in range(norms)] if bias else [
            (v, None) for v in vectors
        ]  # fmt: skip
        return x, rest[:deltas], pairs

    def through(function: Callable) -> Variant:
        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            x, added, pairs = split(tensors)
            second = {"weight2": pairs[1][0], "bias2": pairs[1][1]} if norms == 2 else {}
            out = function(x, *pairs[0], eps=EPS, kind=kind, deltas=added, **second)
            return tuple(t for t in (out if deltas else out[1:]) if t is not None)

        return run

    def eager(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, added, pairs = split(tensors)
        residual = (sum(added[1:], added[0]) + x) if added else x
        normed = [_torch_norm(kind, residual, *pair) for pair in pairs]
        return (residual, *normed) if deltas else tuple(normed)

    variants: dict[str, Variant] = {"hf_fuse": through(ops.add_norm), "torch": eager}
    if torch.cuda.is_available():
        variants["torch.compile"] = torch.compile(eager, dynamic=False)
    if kind == "rms":
        variants["eager"] = _hf_rms(split, deltas)
    else:
        variants["eager"] = eager
        del variants["torch"]
    variants |= _liger_norm(kind, deltas, norms)
    rows = tokens * size * dtype.itemsize
    moved = inputs_end + bool(deltas) + norms  # read, written
    if direction == "backward":
        moved = bool(deltas) + norms + 1 + 1  # two kinds of gradient and the residual; one out
    name = f"add_norm {kind}, {inputs_end} in, {norms} norm{'s' * (norms > 1)}"
    return Case(
        name, direction, tokens, size, rows * moved, make, variants, through(add_norm_reference)
    )


def _torch_norm(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, EPS)
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _hf_rms(split: Callable, deltas: int) -> Variant:
    module = LlamaRMSNorm(1, EPS)
    del module.weight  # the measured weight takes its place below, so that it gets the gradient

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, added, pairs = split(tensors)
        residual = added[0] + x if added else x
        module.__dict__["weight"] = pairs[0][0]
        normed = module(residual)
        return (residual, normed) if deltas else (normed,)

    return run


def _liger_norm(kind: str, deltas: int, norms: int) -> dict[str, Variant]:
    try:
        from liger_kernel.transformers import functional as liger
    except ImportError:
        return {}
    if norms > 1 or deltas > 1:
        return {}
    if kind == "rms" and deltas:

        def fused(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            normed, residual = liger.liger_fused_add_rms_norm(x, delta, weight, EPS, in_place=False)
            return residual, normed

        return {"liger": fused}
    if kind == "rms":
        return {"liger": lambda x, w: (liger.liger_rms_norm(x, w, EPS, in_place=False),)}

    def layer(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        residual = rest[0] + x if deltas else x
        normed = liger.liger_layer_norm(residual, rest[-2], rest[-1], EPS)
        return (residual, normed) if deltas else (normed,)

    return {"liger": layer}


def gated_case(tokens: int, size: int, direction: str) -> Case:
    """gated_act with SiLU, the middle of LLaMA's MLP."""

    def eager(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return (F.silu(gate) * up,)

    variants: dict[str, Variant] = {
        "hf_fuse": lambda gate, up: (ops.gated_act(gate, up, "silu"),),
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    try:
        from liger_kernel.transformers.functional import liger_swiglu
    except ImportError:
        pass
    else:
        # its backward writes over its inputs, which a repeated measurement cannot have
        if direction == "forward":
            variants["liger"] = lambda gate, up: (liger_swiglu(gate, up),)
    moved = 3 if direction == "forward" else 5
    return Case("gated_act silu", direction, tokens, size, tokens * size * 2 * moved,
                lambda: [_randn(tokens, size) for _ in range(2)], variants, eager)  # fmt: skip


def bias_act_case(tokens: int, size: int, direction: str) -> Case:
    """bias_act with gelu_new, the middle of GPT-2's MLP."""

    def eager(x: Tensor) -> tuple[Tensor, ...]:
        inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))
        return (0.5 * x * (1.0 + torch.tanh(inner)),)

    variants: dict[str, Variant] = {
        "hf_fuse": lambda x: (ops.bias_act(x, None, "gelu_tanh"),),
        "eager": eager,
        "torch": lambda x: (F.gelu(x, approximate="tanh"),),
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    moved = 2 if direction == "forward" else 3
    return Case("bias_act gelu_new", direction, tokens, size, tokens * size * 2 * moved,
                lambda: [_randn(tokens, size)], variants, eager)  # fmt: skip


def rotary_case(tokens: int, direction: str) -> Case:
    """rotary at Llama-3.2-1B's heads: 32 query and 8 key heads of 64."""
    batch, heads, kv_heads, dim = (4 if tokens > 4 else 1), 32, 8, 64
    seq = tokens // batch

    def make() -> list[Tensor]:
        q = _randn(batch, seq, heads, dim).transpose(1, 2)
        k = _randn(batch, seq, kv_heads, dim).transpose(1, 2)
        return [q, k, _randn(1, seq, dim), _randn(1, seq, dim)]

    variants: dict[str, Variant] = {
        "hf_fuse": ops.rotary,
        "eager": rotary_reference,
        "torch.compile": torch.compile(rotary_reference, dynamic=False),
    }
    size = (heads + kv_heads) * dim
    return Case(
        "rotary", direction, tokens, size, tokens * size * 2 * 2, make, variants, rotary_reference
    )


def cases() -> list[Case]:
    """Everything that is measured."""
    found = []
    for tokens, size in NORM_SHAPES:
        for kind in ("rms", "layer"):
            found.append(norm_case(kind, tokens, size, 1, 1, "forward"))
            if tokens > 1:
                found.append(norm_case(kind, tokens, size, 1, 1, "backward"))
        found.append(norm_case("rms", tokens, size, 0, 1, "forward"))
    found += [norm_case("layer", t, 2560, 2, 2, "forward") for t in (8192, 1)]
    found.append(norm_case("layer", 8192, 2560, 2, 2, "backward"))
    for tokens in (8192, 1):
        found += [gated_case(tokens, 8192, "forward"), bias_act_case(tokens, 10240, "forward")]
        found.append(rotary_case(tokens, "forward"))
    found += [gated_case(8192, 8192, "backward"), bias_act_case(8192, 10240, "backward")]
    return found


def ceiling() -> float:
    """Bytes per second, read and written, of a device copy of 2 GiB: a median."""
    # Not in a graph: there a copy engine would do it, slower.
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = [_timed(lambda: target.copy_(source)) for _ in range(WARM_REPLAYS + REPLAYS)]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds[WARM_REPLAYS:])


def time_alone(call: Callable[[], Any], calls: int) -> float:
    """Seconds of one call, `calls` of them in a CUDA graph: the median over its replays."""
    graph = _captured(call, calls)
    seconds = [_timed(graph.replay) / calls for _ in range(WARM_REPLAYS + REPLAYS)]
    return statistics.median(seconds[WARM_REPLAYS:])


def _timed(run: Callable[[], Any]) -> float:
    """Seconds on the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _captured(call: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
    for _ in range(3):  # what is compiled or allocated once must not happen under capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            call()
    return graph


def measure(case: Case, bandwidth: float) -> dict[str, Any]:
    """Check every variant of a case against float64, then time them.

    Raises AssertionError when hf_fuse's error is over twice the eager code's.
    """
    torch.manual_seed(0)
    large = case.num_tokens > 1
    prepare = _backward if case.direction == "backward" else _forward
    errors = _errors(case, case.make())
    samples: dict[str, list[float]] = {name: [] for name in case.variants}
    for _ in range(ROUNDS):
        for name, variant in case.variants.items():
            sets = [case.make() for _ in range(3 if large else 1)]
            call = _rotating(prepare(variant, sets))
            samples[name].append(time_alone(call, calls=10 if large else 200))
            del sets, call
            gc.collect()
            torch.cuda.empty_cache()
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    row = {
        "case": case.label, "bytes": case.bytes, "error": errors,
        "us": {name: value * 1e6 for name, value in seconds.items()},
        "us_by_round": {name: [v * 1e6 for v in values] for name, values in samples.items()},
        "gb_per_s": case.bytes / seconds["hf_fuse"] / 1e9,
        "share_of_ceiling": case.bytes / seconds["hf_fuse"] / bandwidth,
        "speedup": {n: v / seconds["hf_fuse"] for n, v in seconds.items() if n != "hf_fuse"},
    }  # fmt: skip
    torch._dynamo.reset()
    return row


def _forward(variant: Variant, sets: list[list[Tensor]]) -> list[Callable[[], Any]]:
    def call(inputs: list[Tensor]) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                variant(*inputs)

        return run

    return [call(inputs) for inputs in sets]


def _backward(variant: Variant, sets: list[list[Tensor]]) -> list[Callable[[], Any]]:
    calls = []
    for inputs in sets:
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = variant(*leaves)
        grads = [torch.randn_like(o) for o in outputs]

        def run(
            outputs: Any = outputs, leaves: Any = leaves, grads: Any = grads
        ) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

        calls.append(run)
    return calls


def _rotating(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    turn = 0

    def run() -> None:
        nonlocal turn
        calls[turn % len(calls)]()
        turn += 1

    return run


def _errors(case: Case, inputs: list[Tensor]) -> dict[str, float]:
    rows = [t if t.dim() == 1 or t.shape[0] < 1024 else t[:1024] for t in inputs]
    wide = [t.double().requires_grad_() for t in rows]
    truth = case.truth(*wide)
    seeds = [torch.randn_like(t) for t in truth]
    if case.direction == "backward":
        truth = torch.autograd.grad(truth, wide, seeds, allow_unused=True)
    found = {}
    for name, variant in case.variants.items():
        leaves = [t.detach().clone().requires_grad_() for t in rows]
        outputs = variant(*leaves)
        if case.direction == "backward":
            grads = [s.to(o.dtype) for s, o in zip(seeds, outputs, strict=True)]
            outputs = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        found[name] = max(
            ((o.double() - t).norm() / t.norm()).item()
            for o, t in zip(outputs, truth, strict=True)
            if t is not None and o is not None
        )
    limit = 2 * found["eager"] + 1e-4
    assert found["hf_fuse"] <= limit, f"{case.label}: error {found['hf_fuse']:.2e} over {limit:.2e}"
    return found


def _randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype)


def measure_on_cpu() -> list[dict[str, Any]]:
    """add_norm against the add and the norm module that it replaces, in turns; medians."""
    rows = []
    for tokens in (1, 512):
        for kind in ("rms", "layer"):
            for dtype in (torch.float32, torch.bfloat16):
                case = norm_case(kind, tokens, 2560, 1, 1, "forward", dtype)
                inputs = case.make()
                errors = _errors(case, inputs)
                seconds = _in_turns(_plain_calls(kind, *inputs))
                rows.append(
                    {
                        "case": f"{case.label} {str(dtype).removeprefix('torch.')}",
                        "error": errors,
                        "us": {name: value * 1e6 for name, value in seconds.items()},
                        "gb_per_s": case.bytes / seconds["hf_fuse"] / 1e9,
                        "share_of_ceiling": None,
                        "speedup": {
                            n: v / seconds["hf_fuse"] for n, v in seconds.items() if n != "hf_fuse"
                        },
                    }
                )
    return rows


def _plain_calls(
    kind: str, x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None = None
) -> dict[str, Callable[[], Any]]:
    """The calls with nothing around them: at one token the call itself is what takes time."""
    size, dtype = x.shape[-1], x.dtype
    module: Any = torch.nn.LayerNorm(size, EPS) if kind == "layer" else LlamaRMSNorm(size, EPS)
    module.to(dtype).weight.data = weight
    if bias is not None:
        module.bias.data = bias
    return {
        "hf_fuse": lambda: ops.add_norm(x, weight, bias, eps=EPS, kind=kind, deltas=(delta,)),
        "eager": lambda: module(delta + x),
        "torch": lambda: _torch_norm(kind, delta + x, weight, bias),
    }


def _in_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for turn in range(WARM_REPLAYS + 40):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(20):
                    call()
                if turn >= WARM_REPLAYS:
                    times[name].append((time.perf_counter() - start) / 20)
    return {name: statistics.median(values) for name, values in times.items()}


def show(rows: list[dict[str, Any]]) -> str:
    """One line a case: us | GB/s | % of the ceiling | how much faster than each other variant."""
    names = ["eager", "torch", "torch.compile", "liger"]
    lines = [
        [
            r["case"],
            f"{r['us']['hf_fuse']:.2f}",
            f"{r['gb_per_s']:.0f}",
            "" if r["share_of_ceiling"] is None else f"{100 * r['share_of_ceiling']:.1f}",
        ]
        + [f"{r['speedup'][n]:.2f}" if n in r["speedup"] else "" for n in names]
        for r in rows
    ]
    return table(["case", "us", "GB/s", "% of copy", *(f"x vs {n}" for n in names)], lines)


def run(
    only: str,
    arguments: Sequence[str],
    json_path: str | None = None,
    html_path: str | None = None,
) -> None:
    """Measure, print the table and write what is asked for. `only` selects cases by a part of their
    name.
    """
    if torch.cuda.is_available():
        bandwidth = ceiling()
        print(f"{device_name('cuda')}: copy ceiling {bandwidth / 1e9:.0f} GB/s (read + write)")
        stream = torch.cuda.Stream()
        rows = []
        with torch.cuda.stream(stream):  # autograd replays on the stream of the forward
            for case in cases():
                if only in case.label:
                    rows.append(measure(case, bandwidth))
                    print(f"  {case.label}", file=sys.stderr, flush=True)
        result = {"ceiling_bytes_per_s": bandwidth, "cases": rows}
    else:
        result = {"cases": [row for row in measure_on_cpu() if only in row["case"]]}
        print(device_name("cpu"))
    if not result["cases"]:
        raise UsageError(f"no case has {only!r} in its name")
    print(show(result["cases"]))
    write_result(
        "kernels", result, device="cuda" if torch.cuda.is_available() else "cpu",
        arguments=arguments, json_path=json_path, html_path=html_path,
    )  # fmt: skip


if __name__ == "__main__":
    from hf_fuse.cli import main

    raise SystemExit(main(["kernels", *sys.argv[1:]]))
