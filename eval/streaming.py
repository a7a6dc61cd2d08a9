"""Perplexity and time per token of one long text, with attention sinks and with a plain window.

Both read token by token through the decode engine's step, the very one that `generate` takes over a
StreamingCache, with caches of the same size: `sinks` first tokens and a window, or a window of as
many more. Beside them are a cache of all tokens, and, for what the text itself does, windows of the
same length that each begin anew.

Published behaviour (Xiao et al. 2023): with sinks perplexity is that of windows read anew, at any
length; a plain window's explodes once the first tokens are evicted, if the model gives them much of
its attention whatever they are; a cache of all tokens fails past the length of the training. So
the result also says how much attention the first tokens get.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hf_fuse
from hf_fuse import Report
from hf_fuse.decode.engine import DecodeEngine
from hf_fuse.decode.rolling import Stream
from hf_fuse.decode.spec import Unsuited
from hf_fuse.eval.environment import UsageError, evaluating, synchronize
from hf_fuse.eval.loading import decoder_spec_of
from hf_fuse.eval.perplexity import score

EARLY = 1000  # the token from which the early steps are timed
# Steps that are timed together, often enough that the slots come to their end in some of them.
BLOCK, BLOCKS = 32, 160
PARTS = 16  # of the text, in a plot
_ROWS = 256  # of logits, scored at once


@dataclass(frozen=True)
class Reading:
    """What one way of reading gave, over quarters and PARTS of the text, in order."""

    name: str
    sinks: int
    window: int
    perplexity: float
    quarters: tuple[float, ...]
    parts: tuple[float, ...]

    @property
    def change_percent(self) -> float:
        """Of the last quarter against the first."""
        return 100.0 * (self.quarters[-1] / self.quarters[0] - 1.0)


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds a step from `token` on, each value of BLOCK steps."""

    token: int
    median_ms: float
    mean_ms: float
    blocks_ms: tuple[float, ...]

    @classmethod
    def of(cls, token: int, blocks_ms: list[float]) -> StepTimes:
        return cls(token, statistics.median(blocks_ms), statistics.mean(blocks_ms), (*blocks_ms,))


@dataclass(frozen=True)
class Attention:
    """The share of attention that the first `tokens` tokens of a text get from those of the second
    half of `context` tokens, a mean over layers and heads; `even` is what they would get were it
    spread evenly.
    """

    tokens: int
    context: int
    share: float
    even: float


@dataclass(frozen=True)
class StreamingResult:
    """What `evaluate_streaming` found; `late` and `early` were timed in turns. afresh: windows that
    begin anew.
    """

    num_tokens: int
    streaming: Reading
    plain: Reading
    full: Reading
    afresh: Reading
    attention: Attention
    early: StepTimes
    late: StepTimes
    report: Report

    @property
    def readings(self) -> tuple[Reading, ...]:
        return self.streaming, self.plain, self.full, self.afresh

    @property
    def tpot_ratio(self) -> float:
        """Time of late steps over that of the early ones timed directly before, the median."""
        pairs = zip(self.late.blocks_ms, self.early.blocks_ms, strict=True)
        return statistics.median(late / early for late, early in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        readings = [{**asdict(r), "change_percent": r.change_percent} for r in self.readings]
        return {
            "num_tokens": self.num_tokens,
            "readings": readings,
            "attention": asdict(self.attention),
            "early": asdict(self.early),
            "late": asdict(self.late),
            "tpot_ratio": self.tpot_ratio,
            "report": self.report.to_dict(),
        }


def evaluate_streaming(
    model: nn.Module,
    input_ids: Tensor,
    *,
    sinks: int = 4,
    window: int = 256,
    progress: bool = True,
    **patch_options: Any,
) -> StreamingResult:
    """Read `input_ids` with `sinks` and `window`, with a window of sinks + window, with all tokens
    kept, and in windows of sinks + window tokens (of the model's positions where those are fewer)
    that begin anew.

    Args:
        model: an unpatched causal language model with rotary positions; it comes back unpatched.
        input_ids: int64 [num_tokens], one text, longer than twice sinks + window.
        sinks, window: as `hf_fuse.StreamingCache` takes them.
        progress: show a progress bar.
        patch_options: passed to `hf_fuse.patched`.

    Raises:
        UsageError: for a text that is too short, counts that make no sense, or a model that the
            engine does not stream.
    """
    size = sinks + window
    if sinks < 0 or window < 1 or size < 2:
        raise UsageError(f"streaming takes a window, and sinks from 0 up: got {window} and {sinks}")
    if len(input_ids) <= 2 * size:
        raise UsageError(
            f"streaming needs more than {2 * size} tokens to evict some, got {len(input_ids)}"
        )
    positions = getattr(model.config, "max_position_embeddings", None) or size
    context = min(size, positions)
    stride = max(1, context // 4)  # each token has three quarters of a window before it
    options = {"verify": False, **patch_options}
    attention = _attention_to_first(model, input_ids, sinks or 4, min(context, 512))
    with torch.no_grad(), evaluating(model), hf_fuse.patched(model, **options):
        spec = decoder_spec_of(model)

        def engine_of(stream: Stream | None) -> DecodeEngine:
            slots = 0 if stream else len(input_ids)
            try:
                return DecodeEngine(spec, 1, slots, options.get("backend", "auto"), stream)
            except Unsuited as unsuited:
                raise UsageError(f"this model does not stream: {unsuited}") from unsuited

        late, early, plain = map(
            engine_of, (Stream(sinks, window), Stream(sinks, window), Stream(0, size))
        )
        tokens = input_ids.to(spec.embedding.device)
        streamed = _read(late, tokens, "sinks", progress)
        alone = _read(plain, tokens, "window", progress)
        full = _read(engine_of(None), tokens, "all tokens", progress)
        afresh = score(model, input_ids, context=context, stride=stride).nll
        first = min(EARLY, len(tokens) // 2)
        _read(early, tokens[: first + 1], "early steps", progress)
        times = _time_in_turns((early, late), tokens)
        report = hf_fuse.report(model)
    return StreamingResult(
        num_tokens=len(tokens),
        streaming=_reading(f"{sinks} sinks, window {window}", sinks, window, streamed),
        plain=_reading(f"plain window {size}", 0, size, alone),
        full=_reading("all tokens kept", 0, len(tokens), full),
        afresh=_reading(f"windows of {context} afresh", 0, context, afresh),
        attention=attention,
        early=StepTimes.of(first, times[0]),
        late=StepTimes.of(len(tokens) - 1, times[1]),
        report=report,
    )


def _read(engine: DecodeEngine, tokens: Tensor, name: str, progress: bool) -> Tensor:
    """The NLL of each token but the first, float64 [num_tokens - 1]; all but the last are read."""
    engine.begin((), 0)
    engine.prepare(select=False)
    nll, rows = [], engine.logits.new_empty(_ROWS, engine.logits.shape[1])
    for first in _progress(range(0, len(tokens) - 1, _ROWS), name, progress):
        targets = tokens[first + 1 : first + 1 + _ROWS]
        for row in range(len(targets)):
            engine.put(tokens[first + row : first + row + 1])
            engine.advance(select=False)
            rows[row] = engine.logits[0]
        logs = rows[: len(targets)].double().log_softmax(-1)
        nll.append(-logs.gather(1, targets[:, None])[:, 0].cpu())
    return torch.cat(nll)


def _attention_to_first(model: Any, tokens: Tensor, first: int, context: int) -> Attention:
    """In transformers' own attention, over up to four stretches of the text."""
    half, device = context // 2, next(model.parameters()).device
    places = torch.arange(half, context, dtype=torch.float64) + 1
    before, shares = model.config._attn_implementation, []
    model.set_attn_implementation("eager")  # the only one that returns them
    try:
        with torch.no_grad(), evaluating(model):
            for part in tokens.split(context)[:4]:
                if len(part) == context:
                    out = model(part[None].to(device), output_attentions=True, use_cache=False)
                    seen = [a[..., half:, :first].double().sum(-1).mean() for a in out.attentions]
                    shares.append(float(torch.stack(seen).mean()))
    finally:
        model.set_attn_implementation(before)
    even = float((first / places).clamp(max=1).mean())
    return Attention(first, context, statistics.mean(shares), even)


def _time_in_turns(engines: tuple[DecodeEngine, ...], tokens: Tensor) -> list[list[float]]:
    """Milliseconds of each engine's further steps, by blocks: a machine that slows down does so for
    both.
    """
    times: list[list[float]] = [[] for _ in engines]
    for block in range(BLOCKS + 1):
        given = tokens[block * BLOCK % (len(tokens) - BLOCK) :][:BLOCK].split(1)
        for engine, found in zip(engines, times, strict=True):
            synchronize(tokens.device)
            start = time.perf_counter()
            for token in given:
                engine.put(token)
                engine.advance(select=False)
            synchronize(tokens.device)
            found.append(1e3 * (time.perf_counter() - start) / BLOCK)
    return [found[1:] for found in times]


def _reading(name: str, sinks: int, window: int, nll: Tensor) -> Reading:
    def perplexities(count: int) -> tuple[float, ...]:
        return tuple(math.exp(min(float(part.mean()), 700.0)) for part in nll.tensor_split(count))

    return Reading(name, sinks, window, perplexities(1)[0], perplexities(4), perplexities(PARTS))


def _progress(todo: range, name: str, show: bool) -> Iterable[int]:
    if not show:
        return todo
    from tqdm import tqdm

    return tqdm(todo, desc=name, unit_scale=_ROWS, unit="token", leave=False, disable=None)
