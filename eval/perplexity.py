"""Perplexity of a model before and after patching, on the same windows, compared token by token.

Three variants read each batch of windows: the model as it came, the patched model, and an fp32 copy
(the reference). Perplexities of two nearly equal models say little by themselves, so the result
also holds the per-token differences of the negative log-likelihood (with their standard error) and
the mean KL divergences over the whole vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import hf_fuse
from hf_fuse import Report
from hf_fuse.decode.engine import DecodeEngine
from hf_fuse.eval.environment import evaluating
from hf_fuse.eval.loading import decoder_spec_of

# Rows of logits turned into float64 at once hold about this many bytes, so that a vocabulary of
# 128k stays small.
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) are read; tokens [first_scored, end) are predicted and counted."""

    begin: int
    end: int
    first_scored: int


@dataclass(frozen=True)
class Score:
    """Perplexity: exp of the mean of `nll`, float64 [num_scored], in nats, in text order."""

    perplexity: float
    nll: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class Difference:
    """Mean of a paired per-token difference and its standard error, in nats."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class PerplexityResult:
    """What `evaluate_perplexity` found. KL(a‖b) is a mean over the scored tokens, in nats.

    The reference and what is measured against it are None where no reference ran; `note` says why.
    """

    num_tokens: int
    num_scored: int
    context: int
    stride: int
    unpatched: Score
    patched: Score
    reference: Score | None
    change_percent: float
    nll_difference: Difference
    kl_unpatched_patched: float
    kl_reference_unpatched: float | None
    kl_reference_patched: float | None
    report: Report
    note: str
    through: str  # "forward", or "decode": the patched model read the windows token by token

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, without the per-token arrays."""
        return {
            "through": self.through,
            "num_tokens": self.num_tokens,
            "num_scored": self.num_scored,
            "context": self.context,
            "stride": self.stride,
            "perplexity_unpatched": self.unpatched.perplexity,
            "perplexity_patched": self.patched.perplexity,
            "perplexity_reference": self.reference.perplexity if self.reference else None,
            "change_percent": self.change_percent,
            "nll_difference_mean": self.nll_difference.mean,
            "nll_difference_standard_error": self.nll_difference.standard_error,
            "kl_unpatched_patched": self.kl_unpatched_patched,
            "kl_reference_unpatched": self.kl_reference_unpatched,
            "kl_reference_patched": self.kl_reference_patched,
            "report": self.report.to_dict(),
            "note": self.note,
        }


def sliding_windows(num_tokens: int, context: int, stride: int) -> list[Window]:
    """Windows of `context` tokens, `stride` apart, each token scored once, as Hugging Face does.

    A window scores the tokens that no earlier window scored. The first token a window reads has
    nothing before it and is not scored: of n tokens n - 1 are scored when stride < context, and one
    fewer a window when they are equal.

    Source: https://huggingface.co/docs/transformers/perplexity
    """
    if num_tokens < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {num_tokens}")
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, got {context}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be between 1 and the context of {context}, got {stride}")
    windows: list[Window] = []
    scored_to = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + context, num_tokens)
        first_scored = max(scored_to, begin + 1)
        if first_scored < end:
            windows.append(Window(begin, end, first_scored))
        scored_to = end
        if end == num_tokens:
            break
    return windows


def batches(windows: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Consecutive windows of one length, at most `batch_size`, so that none needs padding."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == batch_size or _length(window) != _length(batch[0])):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def score(
    model: nn.Module, input_ids: Tensor, *, context: int, stride: int, batch_size: int = 8
) -> Score:
    """Sliding-window perplexity of one model as it stands.

    Args:
        model: a causal language model.
        input_ids: int64 [num_tokens], one text.
        context, stride: window length and step, in tokens.
    """
    ids = _flat(input_ids)
    nll: list[Tensor] = []
    with torch.no_grad(), evaluating(model):
        for batch in batches(sliding_windows(len(ids), context, stride), batch_size):
            logits, targets = _logits(model, ids, batch), _targets(ids, batch)
            nll += [_nll(part, t) for part, t in _chunks(logits, targets)]
    return _score(nll)


def evaluate_perplexity(
    model: nn.Module,
    input_ids: Tensor,
    *,
    context: int,
    stride: int,
    batch_size: int = 8,
    reference: bool = True,
    through: str = "forward",
    progress: bool = True,
    **patch_options: Any,
) -> PerplexityResult:
    """Perplexity and KL of `model` unpatched, patched, and (for fp16/bf16 models) of its fp32 copy.

    Logits of one batch of windows are held at a time; everything beyond the forward passes is
    float64 in chunks.

    Args:
        model: an unpatched causal language model; it comes back unpatched.
        input_ids: int64 [num_tokens] or [1, num_tokens], one text.
        context: tokens a window reads.
        stride: tokens a window moves; a smaller one gives every token more context and costs more
            time.
        batch_size: windows a forward pass.
        reference: also run an unpatched fp32 copy, which needs 4 bytes a parameter more memory.
        through: "forward", or "decode": the patched model reads each window token by token, by the
            steps (on a GPU the graph) that `generate` takes.
        progress: show a progress bar.
        patch_options: passed to `hf_fuse.patched`, for example `backend="cpu"` or
            `ops={"add_norm"}`.

    Raises:
        ValueError: for a model that is patched already, or windows that make no sense; with
            "decode" also (a UsageError) for a model that the decode engine does not take.
    """
    if through not in ("forward", "decode"):
        raise ValueError(f'through must be "forward" or "decode", got {through!r}')
    if hf_fuse.is_patched(model):
        raise ValueError("evaluate_perplexity needs an unpatched model: call hf_fuse.unpatch first")
    ids = _flat(input_ids)
    windows = sliding_windows(len(ids), context, stride)
    reference_model, note = (
        _fp32_copy(model) if reference else (None, "the fp32 reference was not asked for")
    )
    # The comparison below is the verification, on more text than patch() would use.
    options = {"verify": False, **patch_options}
    totals = _Totals()
    # no_grad, not inference_mode: patch() may re-lay a parameter's storage, which must stay fit for
    # training.
    with torch.no_grad(), evaluating(model):
        for batch in _progress(batches(windows, batch_size), windows, batch_size, progress):
            unpatched = _logits(model, ids, batch)
            with hf_fuse.patched(model, **options):
                patched = (_logits if through == "forward" else _decoded)(model, ids, batch)
                totals.report = totals.report or hf_fuse.report(model)
            truth = None if reference_model is None else _logits(reference_model, ids, batch)
            totals.add(unpatched, patched, truth, _targets(ids, batch))
    return totals.result(len(ids), context, stride, note, through)


@dataclass
class _Totals:
    """Per-token values of each variant, gathered batch by batch."""

    unpatched: list[Tensor] = field(default_factory=list)
    patched: list[Tensor] = field(default_factory=list)
    reference: list[Tensor] = field(default_factory=list)
    kl: dict[str, float] = field(default_factory=dict)
    report: Report | None = None

    def add(
        self, unpatched: Tensor, patched: Tensor, truth: Tensor | None, targets: Tensor
    ) -> None:
        others = [patched] if truth is None else [patched, truth]
        for part, target, *rest in _chunks(unpatched, targets, *others):
            log_u, log_p = _log_probabilities(part), _log_probabilities(rest[0])
            self.unpatched.append(_pick(log_u, target))
            self.patched.append(_pick(log_p, target))
            self._add_kl("unpatched_patched", log_u, log_p)
            if truth is not None:
                log_r = _log_probabilities(rest[1])
                self.reference.append(_pick(log_r, target))
                self._add_kl("reference_unpatched", log_r, log_u)
                self._add_kl("reference_patched", log_r, log_p)

    def _add_kl(self, name: str, log_p: Tensor, log_q: Tensor) -> None:
        """KL(p‖q) = Σ p (log p - log q), summed over the rows."""
        self.kl[name] = self.kl.get(name, 0.0) + float((log_p.exp() * (log_p - log_q)).sum())

    def result(
        self, num_tokens: int, context: int, stride: int, note: str, through: str = "forward"
    ) -> PerplexityResult:
        unpatched, patched = _score(self.unpatched), _score(self.patched)
        assert self.report is not None
        count = len(unpatched.nll)
        kl = {name: total / count for name, total in self.kl.items()}
        return PerplexityResult(
            num_tokens=num_tokens,
            num_scored=count,
            context=context,
            stride=stride,
            unpatched=unpatched,
            patched=patched,
            reference=_score(self.reference) if self.reference else None,
            change_percent=100.0 * (patched.perplexity / unpatched.perplexity - 1.0),
            nll_difference=_paired(patched.nll - unpatched.nll),
            kl_unpatched_patched=kl["unpatched_patched"],
            kl_reference_unpatched=kl.get("reference_unpatched"),
            kl_reference_patched=kl.get("reference_patched"),
            report=self.report,
            note=note,
            through=through,
        )


def _score(nll: Iterable[Tensor]) -> Score:
    values = torch.cat(list(nll))
    return Score(math.exp(min(float(values.mean()), 700.0)), values)


def _paired(difference: Tensor) -> Difference:
    error = (
        float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    )
    return Difference(float(difference.mean()), error)


def _logits(model: nn.Module, ids: Tensor, batch: list[Window]) -> Tensor:
    """The rows of logits that predict the scored tokens, [num_scored, vocab], in text order."""
    device = next(model.parameters()).device
    inputs = torch.stack([ids[w.begin : w.end] for w in batch]).to(device)
    logits = model(input_ids=inputs, use_cache=False).logits
    # The row at position i predicts the token at i + 1.
    kept = [logits[i, w.first_scored - w.begin - 1 : -1] for i, w in enumerate(batch)]
    return torch.cat(kept)


def _decoded(model: Any, ids: Tensor, batch: list[Window]) -> Tensor:
    """The same rows from the decode engine, which reads one token a step; fp32."""
    spec = decoder_spec_of(model)
    inputs = torch.stack([ids[w.begin : w.end] for w in batch]).to(spec.embedding.device)
    engine = DecodeEngine(spec, len(batch), inputs.shape[1])
    engine.begin((), 0)
    engine.prepare(select=False)
    first = [w.first_scored - w.begin - 1 for w in batch]
    rows: list[list[Tensor]] = [[] for _ in batch]
    for position in range(inputs.shape[1] - 1):
        engine.put(inputs[:, position])
        engine.advance(select=False)
        for kept, start, row in zip(rows, first, engine.logits, strict=True):
            if position >= start:
                kept.append(row.clone())
    return torch.stack([row for kept in rows for row in kept])


def _targets(ids: Tensor, batch: list[Window]) -> Tensor:
    return torch.cat([ids[w.first_scored : w.end] for w in batch])


def _chunks(logits: Tensor, targets: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of logits, targets and further logits together, few enough to hold in float64."""
    rows = max(1, _CHUNK_BYTES // (8 * logits.shape[-1]))
    parts = [x.split(rows) for x in (logits, targets.to(logits.device), *others)]
    yield from zip(*parts, strict=True)


def _log_probabilities(logits: Tensor) -> Tensor:
    # float64: the KL of two nearly equal distributions is smaller than fp32's rounding of its
    # terms.
    return logits.double().log_softmax(-1)


def _pick(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets[:, None])[:, 0].cpu()


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return _pick(_log_probabilities(logits), targets)


def _fp32_copy(model: nn.Module) -> tuple[nn.Module | None, str]:
    """The model upcast to fp32, or None and why not."""
    if all(p.dtype in (torch.float32, torch.float64) for p in model.parameters()):
        return None, "the model is fp32 already: it is its own reference"
    return copy.deepcopy(model).float().eval(), ""


def _progress(
    todo: Iterator[list[Window]], windows: list[Window], batch_size: int, show: bool
) -> Iterable[list[Window]]:
    if not show:
        return todo
    from tqdm import tqdm

    total = sum(1 for _ in batches(windows, batch_size))
    return tqdm(todo, total=total, desc="perplexity", unit="batch", leave=False, disable=None)


def _flat(input_ids: Tensor) -> Tensor:
    ids = input_ids.squeeze(0) if input_ids.dim() == 2 and input_ids.shape[0] == 1 else input_ids
    if ids.dim() != 1:
        raise ValueError(
            f"input_ids must be [num_tokens] or [1, num_tokens], got {list(input_ids.shape)}"
        )
    return ids.cpu()


def _length(window: Window) -> int:
    return window.end - window.begin
