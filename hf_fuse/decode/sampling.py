"""Drawing tokens on the device: which calls of `generate` allow it, and what it keeps between them.

transformers draws with `torch.multinomial`, which for one sample takes the argmax of the
probabilities over exponential noise from the device's default generator. The step fills its noise
from the same generator, which a captured step advances as it is replayed: a seed gives the tokens
it gives unpatched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_fuse.ops.decode_sample import Filters

# transformers' order, which is the kernel's.
_LEAST_LENGTH = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
_BEFORE_DRAWING = (RepetitionPenaltyLogitsProcessor, *_LEAST_LENGTH)
_FILTERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
_ORDER: tuple[type, ...] = (*_BEFORE_DRAWING, *_FILTERS)


@dataclass(frozen=True)
class Selection:
    """How the device selects tokens. unpenalised: the penalty does not count that many tokens that
    each sequence begins with, an int or [batch].
    """

    draws: bool
    min_step: int = 0
    filters: Filters = Filters()  # noqa: RUF009  (frozen)
    unpenalised: Any = 0

    @property
    def penalises(self) -> bool:
        return self.filters.penalty != 1.0


def selection_of(
    processors: Sequence[Any], config: Any, eos: Sequence[int], prompt: int, device: torch.device
) -> Selection | None:
    """What a call with these processors asks of the device; None for what it does not do: other
    processors than these, another order, scores as an output, drawing on a CPU.
    """
    places = [_ORDER.index(type(p)) if type(p) in _ORDER else -1 for p in processors]
    known = -1 not in places and places == sorted(set(places))
    if not known or (processors and config.output_scores):
        return None
    if not config.do_sample and any(type(p) in _FILTERS for p in processors):
        return None
    min_step, found = 0, {}
    unpenalised: Any = 0
    for processor in processors:
        kind = type(processor)
        if kind in _LEAST_LENGTH:
            if sorted(processor.eos_token_id.flatten().tolist()) != sorted(eos):
                return None
            new = kind is MinNewTokensLengthLogitsProcessor
            least = processor.min_new_tokens if new else processor.min_length - prompt
            min_step = max(min_step, least)
        elif kind is RepetitionPenaltyLogitsProcessor:
            found["penalty"] = processor.penalty
            ignored = getattr(processor, "prompt_ignore_length", None)
            unpenalised = 0 if ignored is None else ignored
            if int(torch.as_tensor(unpenalised).max()) > prompt:
                return None
        else:
            at_least = getattr(processor, "min_tokens_to_keep", 1)
            if kind is TopKLogitsWarper:  # its top_k is no less
                at_least = 1
            if at_least != 1 or getattr(processor, "filter_value", -torch.inf) != -torch.inf:
                return None
            found[_FILTERS[kind]] = getattr(processor, _FILTERS[kind])
    selection = Selection(config.do_sample, min_step, Filters(**found), unpenalised)
    on_cpu = device.type != "cuda"
    return None if on_cpu and (selection.draws or selection.penalises) else selection


class Sampler:
    """What `decode_sample` reads beside the logits, for one kind of call: with or without noise,
    with or without a penalty. A step captured with it serves any such call.
    """

    def __init__(self, logits: Tensor, draws: bool, penalises: bool):
        self.device = logits.device
        self.noise = torch.empty_like(logits) if draws else None
        self.seen = torch.empty_like(logits, dtype=torch.uint8) if penalises else None
        self.filters = Filters().tensor().to(self.device)

    def begin(self, selection: Selection, ids: Tensor) -> None:
        """Start after the prompts `ids` [batch, length]."""
        self.filters.copy_(selection.filters.tensor())
        if self.seen is not None:
            vocab, ignored = self.seen.shape[1], torch.as_tensor(selection.unpenalised)
            ids = ids.to(self.device).clamp(max=vocab)  # the vocabulary may be larger than the head
            places = torch.arange(ids.shape[1], device=self.device)
            before = places < ignored.to(self.device).view(-1, 1)
            marks = torch.zeros(len(ids), vocab + 1, dtype=torch.uint8, device=self.device)
            self.seen.copy_(marks.scatter_(1, ids.masked_fill(before, vocab), 1)[:, :vocab])

    def draw(self) -> None:
        """New noise."""
        if self.noise is not None:
            self.noise.exponential_()

    def generator_state(self) -> Tensor | None:
        """Of what the noise comes from, on the host; None without noise."""
        return None if self.noise is None else self._generator().get_state()

    def set_generator_state(self, state: Tensor | None) -> None:
        if state is not None:
            self._generator().set_state(state)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """A run that is forgotten: what it saw and what it drew."""
        state, seen = self.generator_state(), None if self.seen is None else self.seen.clone()
        yield
        if self.seen is not None and seen is not None:
            self.seen.copy_(seen)
        self.set_generator_state(state)

    def _generator(self) -> torch.Generator:
        return torch.cuda.default_generators[self.device.index]
