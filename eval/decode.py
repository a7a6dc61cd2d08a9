"""Decoding speed through `model.generate`, before and after patching: TTFT, TPOT, tokens/s, memory.

Both variants decode the same prompt greedily for the same number of tokens, in turns (A B A B),
each turn after a warm-up of the same shape, so that a machine that slows down or speeds up does so
for both. Tokens are compared in every turn: a speed means nothing before `identical` is true.
The patched model can take a turn that samples beside its greedy one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import BaseStreamer

import hf_fuse
from hf_fuse import Report
from hf_fuse.eval.environment import evaluating, peak_memory_bytes, reset_peak_memory, synchronize
from hf_fuse.ops._library import kernels

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}


@dataclass(frozen=True)
class Percentiles:
    """10th, 50th and 90th percentile, linearly interpolated, in the unit of the samples."""

    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Percentiles:
        """Percentiles of at least one sample."""
        values = torch.tensor(samples, dtype=torch.float64)
        return cls(*values.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist())


@dataclass(frozen=True)
class Timing:
    """How fast one variant decoded.

    first_call_s: the very first `generate`, with what is compiled, loaded or captured for it.
    ttft_ms: from the call of `generate` to the first token, over the repeats.
    tpot_ms: from one token to the next, over all later tokens of all repeats.
    tokens_per_s: new tokens of the whole batch over the whole call, the median repeat.
    peak_memory_bytes: on CUDA, what torch allocated at most during the turns; on CPU, the process's
        peak resident size so far, which cannot tell the variants apart.
    """

    first_call_s: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    tokens_per_s: float
    peak_memory_bytes: int
    tpot_samples_ms: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class DecodeResult:
    """What `evaluate_decode` found; `first_mismatch` is the first (row, new token)."""

    prompt_length: int
    batch_size: int
    new_tokens: int
    repeats: int
    identical: bool
    first_mismatch: tuple[int, int] | None
    step_bytes: int  # what a step must read: see `step_bytes`
    unpatched: Timing
    patched: Timing
    report: Report
    static_compile: Timing | None = None  # transformers' static cache and torch.compile
    sampled: Timing | None = None  # patched, with SAMPLING
    floor_ms: float | None = None  # step_bytes at the measured read bandwidth

    @property
    def speedup(self) -> float:
        """Median time per output token, unpatched over patched."""
        return self.unpatched.tpot_ms.p50 / self.patched.tpot_ms.p50

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with every TPOT sample."""
        return {**asdict(self), "report": self.report.to_dict(), "speedup": self.speedup}


def evaluate_decode(
    model: nn.Module,
    input_ids: Tensor,
    *,
    new_tokens: int = 64,
    repeats: int = 3,
    progress: bool = True,
    static_compile: bool = False,
    sample: bool = False,
    read_bandwidth: float | None = None,
    **patch_options: Any,
) -> DecodeResult:
    """Greedy `generate` unpatched and patched, in turns, timed token by token.

    Args:
        model: an unpatched causal language model; it comes back unpatched.
        input_ids: int64 [batch_size, prompt_length], no padding.
        new_tokens: tokens to generate a row, at least 2; the end-of-text token is suppressed.
        repeats: timed turns a variant.
        progress: show a progress bar.
        static_compile: also time the unpatched model with `cache_implementation="static"`, which
            transformers compiles on a GPU (the first call takes up to a minute).
        sample: also time the patched model with `SAMPLING`.
        read_bandwidth: bytes a second, for `floor_ms`; see `read_bandwidth`.
        patch_options: passed to `hf_fuse.patched`.

    Raises:
        ValueError: for a model that is patched already, or a count that makes no sense.
    """
    _check(model, input_ids, new_tokens, repeats)
    options = {"verify": False, **patch_options}  # the tokens are compared below
    unpatched, patched, compiled, sampled = (_Variant() for _ in range(4))
    with evaluating(model):
        for _ in _progress(range(repeats), progress):
            unpatched.take_turn(model, input_ids, new_tokens)
            if static_compile:
                compiled.take_turn(model, input_ids, new_tokens, cache_implementation="static")
            with hf_fuse.patched(model, **options):
                patched.take_turn(model, input_ids, new_tokens)
                if sample:
                    sampled.take_turn(model, input_ids, new_tokens, **SAMPLING)
                report = hf_fuse.report(model)
    mismatches = (
        first_mismatch(a, b) for a, b in zip(unpatched.tokens, patched.tokens, strict=True)
    )
    mismatch = next((m for m in mismatches if m is not None), None)
    read = step_bytes(model, input_ids.shape, new_tokens)
    return DecodeResult(
        prompt_length=input_ids.shape[1],
        batch_size=input_ids.shape[0],
        new_tokens=new_tokens,
        repeats=repeats,
        identical=mismatch is None,
        first_mismatch=mismatch,
        step_bytes=read,
        unpatched=unpatched.timing(),
        patched=patched.timing(),
        report=report,
        static_compile=compiled.timing() if static_compile else None,
        sampled=sampled.timing() if sample else None,
        floor_ms=None if read_bandwidth is None else 1e3 * read / read_bandwidth,
    )


def step_bytes(model: Any, prompt: Sequence[int], new_tokens: int) -> int:
    """What a decoding step must read: every weight but the tables it takes a row of, and the cache
    at its mean length. `prompt` is [batch_size, prompt_length].
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    unread = {id(table)} - {id(head)}
    unread |= {id(p) for name, p in model.named_parameters() if name.endswith("wpe.weight")}
    weights = sum(p.nbytes for p in model.parameters() if id(p) not in unread)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slot = 2 * config.num_hidden_layers * heads * head_dim * table.element_size()
    return weights + prompt[0] * (prompt[1] + new_tokens // 2) * slot


def read_bandwidth(device: torch.device) -> float | None:
    """Bytes a second at which a GPU reads: one row times 1 GiB of weights, far more than the L2
    cache holds, 16 times on end; the best of 5 such rounds. None without the kernels or the memory.
    """
    if device.type != "cuda" or not kernels("cuda"):
        return None
    size, rows, products = 4096, 131072, 16
    try:
        weight = torch.randn(rows, size, device=device, dtype=torch.bfloat16)
    except torch.OutOfMemoryError:
        return None
    x = torch.randn(1, size, device=device, dtype=torch.bfloat16)
    out = torch.empty(1, rows, device=device)
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(products):
            hf_fuse.ops.decode_linear(out, x, [weight])
        end.record()
        end.synchronize()
        times.append(1e-3 * start.elapsed_time(end) / products)
    return weight.nbytes / min(times)


def first_mismatch(expected: Tensor, got: Tensor) -> tuple[int, int] | None:
    """(row, position) where two [batch_size, length] token tensors first differ, or None."""
    if expected.shape != got.shape:
        raise ValueError(
            f"token tensors differ in shape: {list(expected.shape)} and {list(got.shape)}"
        )
    differences = (
        expected != got
    ).T.nonzero()  # transposed: the earliest position first, then the row
    return (int(differences[0, 1]), int(differences[0, 0])) if len(differences) else None


@dataclass
class _Variant:
    """One side of the comparison: its turns' tokens and times."""

    warm_up_s: list[float] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    peak_memory: int = 0

    def take_turn(
        self, model: nn.Module, input_ids: Tensor, new_tokens: int, **options: Any
    ) -> None:
        """A warm-up of the same shape, then the timed `generate`."""
        device = input_ids.device
        synchronize(device)
        start = time.perf_counter()
        _generate(model, input_ids, new_tokens, None, **options)
        synchronize(device)
        self.warm_up_s.append(time.perf_counter() - start)
        reset_peak_memory(device)
        clock = _Clock()
        start = time.perf_counter()
        tokens = _generate(model, input_ids, new_tokens, clock, **options)
        synchronize(device)
        elapsed = time.perf_counter() - start
        self.tokens.append(tokens)
        self.ttft_ms.append(1e3 * (clock.times[0] - start))
        self.tpot_ms += [1e3 * (b - a) for a, b in zip(clock.times, clock.times[1:], strict=False)]
        self.tokens_per_s.append(tokens.numel() / elapsed)
        self.peak_memory = max(self.peak_memory, peak_memory_bytes(device))

    def timing(self) -> Timing:
        return Timing(
            first_call_s=self.warm_up_s[0],
            ttft_ms=Percentiles.of(self.ttft_ms),
            tpot_ms=Percentiles.of(self.tpot_ms),
            tokens_per_s=statistics.median(self.tokens_per_s),
            peak_memory_bytes=self.peak_memory,
            tpot_samples_ms=tuple(self.tpot_ms),
        )


class _Clock(BaseStreamer):
    """Notes when each token arrives.

    `generate` hands tokens over on the CPU, so the kernels that made them have finished.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # the first call carries the prompt
            self._prompt_seen = True
            return
        if value.is_cuda:
            torch.cuda.synchronize(value.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate(
    model: Any,
    input_ids: Tensor,
    new_tokens: int,
    streamer: BaseStreamer | None,
    **options: Any,
) -> Tensor:
    """The new tokens, [batch_size, new_tokens], on the CPU."""
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        num_beams=1,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=_pad_token_id(model),
        streamer=streamer,
        **{"do_sample": False, **options},
    )
    return output[:, input_ids.shape[1] :].cpu()


def _pad_token_id(model: Any) -> int:
    """Never used without padding; named so that `generate` does not warn."""
    config = model.generation_config
    found = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    return found[0] if isinstance(found, list) else (found or 0)


def _check(model: nn.Module, input_ids: Tensor, new_tokens: int, repeats: int) -> None:
    if hf_fuse.is_patched(model):
        raise ValueError("evaluate_decode needs an unpatched model: call hf_fuse.unpatch first")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be [batch_size, prompt_length], not empty, got {list(input_ids.shape)}"
        )
    if new_tokens < 2:
        raise ValueError(
            f"new_tokens must be at least 2 to have a time per output token, got {new_tokens}"
        )
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and input_ids.shape[1] + new_tokens > limit:
        raise ValueError(
            f"prompt of {input_ids.shape[1]} and {new_tokens} new tokens exceed the model's "
            f"{limit} positions"
        )


def _progress(turns: range, show: bool) -> Iterable[int]:
    if not show:
        return turns
    from tqdm import tqdm

    return tqdm(turns, desc="decode", unit="turn", leave=False, disable=None)
