"""`generate`'s decoding loop over the engine.

`Generates` is mixed into the fused ForCausalLM classes. transformers looks the loop up on the class
(`_sample`), so the override takes what the engine supports and hands every other call to
transformers' own loop, which runs over the patched layers; the report counts both, with the reason.

The loop differs from transformers' in one thing: the host reads each token while the device is
already a step further, so the device never waits for it. A sequence that ends is stepped once too
often, and that step is forgotten.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from hf_fuse.decode.engine import DecodeEngine, out_of_memory
from hf_fuse.decode.obstacles import spec_of
from hf_fuse.decode.rolling import Stream
from hf_fuse.decode.sampling import selection_of
from hf_fuse.decode.spec import DecoderSpec, Unsuited, store_as_before
from hf_fuse.modules import CACHE, state_of, step_aside
from hf_fuse.ops._library import kernels
from hf_fuse.streaming import StreamingCache, StreamingLayer

# What `generate` passes beside the ids that the engine knows the meaning of.
KNOWN_KWARGS = {
    "attention_mask",
    "position_ids",
    CACHE,
    "use_cache",
    "logits_to_keep",
}
PLAIN_CACHES = {
    DynamicCache: (DynamicLayer, DynamicSlidingWindowLayer),
    StaticCache: (StaticLayer, StaticSlidingWindowLayer),
    StreamingCache: (StreamingLayer,),
}
_KEPT = "_hf_fuse_decode"  # the key in a model's __dict__


class Kept:
    """The engine of one model, for one thread at a time. Never saved or copied with the model."""

    def __init__(self) -> None:
        self.engine: DecodeEngine | None = None
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple]:
        return Kept, ()


class Generates(nn.Module):
    """A ForCausalLM whose `generate` decodes on the engine where it can."""

    def decoder_spec(self) -> DecoderSpec:
        """The model as data. Raises Unsuited."""
        raise NotImplementedError

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        def by_transformers(reason: str) -> Any:
            state_of(self).notes[f"generate: {reason}"] += 1
            return super(Generates, self)._sample(  # type: ignore[misc]
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )

        kept: Kept = self.__dict__.setdefault(_KEPT, Kept())
        if not kept.lock.acquire(blocking=False):
            return by_transformers("the engine is in use by another thread")
        try:
            _refuse_padding(model_kwargs)
            call = Call(self, input_ids, generation_config, stopping_criteria, model_kwargs)
            call.take_processors(logits_processor)
            call.check(synced_gpus)
            return call.run(call.engine(kept), streamer)
        except Unsuited as unsuited:
            reason = str(unsuited)
        finally:
            kept.lock.release()
        return by_transformers(reason)


def forget(model: nn.Module) -> None:
    """Free what the engine of `model` holds, and undo what it did to the weights' storage."""
    if model.__dict__.pop(_KEPT, None) is not None:
        store_as_before(model)


class Call:
    """One call of `generate` that the engine may take."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        config: Any,
        stopping_criteria: StoppingCriteriaList,
        kwargs: dict[str, Any],
    ):
        self.model, self.input_ids, self.config, self.kwargs = model, input_ids, config, kwargs
        self.stopping_criteria = stopping_criteria
        self.batch, self.prompt = input_ids.shape
        self.eos: list[int] = []
        self.max_length: int | None = None
        self.deadlines: list[float] = []
        self.own_criteria = False  # beside those three
        for criterion in stopping_criteria:
            if type(criterion) is MaxLengthCriteria:
                self.max_length = criterion.max_length
            elif type(criterion) is EosTokenCriteria:
                self.eos += criterion.eos_token_id.flatten().tolist()
            elif type(criterion) is MaxTimeCriteria:
                self.deadlines.append(criterion.initial_timestamp + criterion.max_time)
            else:
                self.own_criteria = True

    def take_processors(self, processors: Any) -> None:
        """Whether the device selects the tokens. Where it does not, transformers' own processors
        do, on the engine's logits.
        """
        self.processors = processors
        device = self.input_ids.device
        self.selection = None
        if not self.own_criteria:
            self.selection = selection_of(processors, self.config, self.eos, self.prompt, device)

    def check(self, synced_gpus: bool) -> None:
        """Raise Unsuited for what only transformers' loop does."""
        config, kwargs, model = self.config, self.kwargs, self.model
        others = sorted(k for k, v in kwargs.items() if v is not None and k not in KNOWN_KWARGS)
        checks = [
            (step_aside(), "torch.compile traces it"),
            (self.max_length is None, "no maximum length"),
            (config.output_attentions, "output_attentions"),
            (config.output_hidden_states, "output_hidden_states"),
            (config.prefill_chunk_size is not None, "prefill_chunk_size"),
            (getattr(config, "is_assistant", False), "assisted decoding"),
            (synced_gpus, "synced_gpus"),
            (not kwargs.get("use_cache", True), "use_cache=False"),
            (bool(others), "model inputs: " + ", ".join(others)),
            (model.training, "training mode"),
            (torch.is_autocast_enabled(self.input_ids.device.type), "autocast"),
            (state_of(model).backend == "reference", 'backend="reference"'),
            (self.batch == 0 or self.prompt == 0, "an empty prompt"),
            (_prepares_otherwise(model), "a prepare_inputs_for_generation of its own"),
        ]
        for found, reason in checks:
            if found:
                raise Unsuited(reason)
        _check_cache(kwargs.get(CACHE), self.max_length)
        if not kernels(self.input_ids.device.type):
            raise Unsuited("the kernels could not be built")

    def engine(self, kept: Kept) -> DecodeEngine:
        """The engine kept from an earlier call if it serves, or a new one. Raises Unsuited."""
        assert self.max_length is not None
        spec = spec_of(self.model)
        if spec.embedding.device != self.input_ids.device:
            raise Unsuited("input_ids are on another device than the model")
        if spec.positions is not None and self.max_length > len(spec.positions):
            raise Unsuited("max_length is beyond the learned positions")
        self.start = _left_padding(self.kwargs.get("attention_mask"), self.batch)
        self._check_positions()
        slots, stream = self.max_length, None
        cache = self.kwargs[CACHE]
        if type(cache) is StreamingCache:
            slots = 0 if cache.get_seq_length() else self.prompt
            stream = Stream(cache.sinks, cache.window)
        try:
            room = (slots, stream, self.max_length)
            if kept.engine is None or not kept.engine.serves(spec, self.batch, *room):
                kept.engine = None  # the old one's memory first
                backend = state_of(self.model).backend
                with torch.inference_mode(False):  # later calls may be outside of it
                    kept.engine = DecodeEngine(
                        spec, self.batch, slots, backend, stream, self.max_length
                    )
            self._begin(kept.engine)
        except RuntimeError as error:
            kept.engine = None
            if not out_of_memory(error):
                raise
            raise Unsuited("no memory for the engine") from error
        return kept.engine

    def _begin(self, engine: DecodeEngine) -> None:
        selection = self.selection
        engine.begin(self.eos, self._pad(), selection.min_step if selection else 0)
        if selection and (selection.draws or selection.penalises):
            engine.draw_by(selection, self.input_ids)
        if self.steps > 1:
            engine.prepare(selection is not None)

    def _check_positions(self) -> None:
        """Raise Unsuited unless each sequence's positions count from its first token."""
        given, mask = self.kwargs.get("position_ids"), self.kwargs.get("attention_mask")
        if given is None:
            return
        length = self.prompt if mask is None else mask.shape[1]
        expected = torch.arange(length)[-given.shape[-1] :] - self.start[:, None]
        if not bool(((given.cpu() == expected) | (expected < 0)).all()):
            raise Unsuited("position_ids of the caller's own")

    def run(self, engine: DecodeEngine, streamer: Any) -> Any:
        """Prefill, then a token at a time."""
        cache: Any = self.kwargs[CACHE]
        kept = Logits()
        tokens: list[Tensor] = []
        with torch.no_grad():
            held = self._prefill(engine, cache)
            rows = self._rows if self.selection else self._rows_selected_here
            for row in rows(engine, kept):
                tokens.append(row)
                if streamer is not None:
                    streamer.put(row)
            if streamer is not None:
                streamer.end()
            engine.end()
        new = torch.stack(tokens, dim=1).to(self.input_ids.device)
        sequences = torch.cat([self.input_ids, new], dim=-1)
        if self._cache_outlives(cache):
            _return(engine, cache, held, (held or self.prompt) + len(tokens) - 1)
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=cast(Any, sequences),
            scores=cast(Any, tuple(kept.scores)) if self.config.output_scores else None,
            logits=cast(Any, tuple(kept.raw)) if self.config.output_logits else None,
            **{CACHE: cache},
        )

    def _prefill(self, engine: DecodeEngine, cache: Any) -> int:
        """Run the prompt; returns how many tokens `cache` holds then. Into an empty cache the
        engine runs it, and leaves the cache empty; else the model does.
        """
        model, mask = self.model, self.kwargs.get("attention_mask")
        whole = mask is None or mask.shape[1] == self.prompt
        hooked = model._forward_hooks or model._forward_pre_hooks
        if whole and not hooked and not cache.get_seq_length():
            engine.prefill(self.input_ids, self.start)
            return 0
        outputs = model._prefill(self.input_ids, self.config, self.kwargs)
        length = int(cache.get_seq_length())
        keys = [layer.keys[:, :, :length] for layer in cache.layers]
        values = [layer.values[:, :, :length] for layer in cache.layers]
        engine.fill(keys, values, length, outputs.logits[:, -1], self.start)
        return length

    def _rows(self, engine: DecodeEngine, kept: Logits) -> Iterator[Tensor]:
        """The tokens of each step, [batch] on the host, until all sequences have ended."""
        ended = torch.zeros(self.batch, dtype=torch.bool)
        eos = torch.tensor(self.eos)
        wait = _Behind(engine.device)
        sampler = engine.sampler
        engine.select()
        for step in range(self.steps):
            if self._keeps_logits():
                logits = engine.logits.clone()
            wait.mark()
            ahead = wait.ahead and step + 1 < self.steps
            drawn = sampler.generator_state() if sampler and ahead else None
            if ahead:
                engine.advance()
            wait.reach()
            if self._keeps_logits():
                kept.add(logits, logits)
            row = engine.history[step].clone()
            if sampler and bool(((row < 0) & ~ended).any()):  # torch.multinomial's own words
                raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
            yield row
            ended |= torch.isin(row, eos)
            if bool(ended.all()) or any(time.time() > d for d in self.deadlines):
                if sampler:  # the step ahead is forgotten, and what it drew
                    sampler.set_generator_state(drawn)
                return
            if not ahead and step + 1 < self.steps:
                engine.advance()

    def _rows_selected_here(self, engine: DecodeEngine, kept: Logits) -> Iterator[Tensor]:
        """The same with transformers' own processors, sampling and stopping criteria, in its order,
        so that a seed gives its tokens.
        """
        ids, pad = self.input_ids, self._pad()
        unfinished = torch.ones(self.batch, dtype=torch.long, device=ids.device)
        for step in range(self.steps):
            logits = engine.logits.clone()
            scores = self.processors(ids, logits)
            if self._keeps_logits():
                kept.add(logits, scores)
            if self.config.do_sample:
                token = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            else:
                token = scores.argmax(-1)
            if self.eos:
                token = token * unfinished + pad * (1 - unfinished)
            ids = torch.cat([ids, token[:, None]], dim=-1)
            so_far = tuple(kept.scores) if self.config.output_scores else None
            unfinished = unfinished & ~self.stopping_criteria(ids, so_far)
            more = step + 1 < self.steps and bool(unfinished.any())
            if more:
                engine.put(token)
                engine.advance(select=False)
            yield token.cpu()
            if not more:
                return

    @property
    def steps(self) -> int:
        """How many tokens are to be made, at most."""
        assert self.max_length is not None
        return self.max_length - self.prompt

    def _keeps_logits(self) -> bool:
        config = self.config
        return config.return_dict_in_generate and (config.output_scores or config.output_logits)

    def _pad(self) -> int:
        pad = self.config._pad_token_tensor
        return 0 if pad is None else int(pad)

    def _cache_outlives(self, cache: Cache) -> bool:
        return self.config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)


@dataclass
class Logits:
    """Of each step, before and after the processors."""

    raw: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def add(self, raw: Tensor, scores: Tensor) -> None:
        self.raw.append(raw)
        self.scores.append(scores)


class _Behind:
    """Waits on the host for a marked point of the device's work while the device goes on."""

    def __init__(self, device: torch.device):
        self.ahead = device.type == "cuda"
        self._event = torch.cuda.Event() if self.ahead else None

    def mark(self) -> None:
        if self._event is not None:
            self._event.record()

    def reach(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def _check_cache(cache: Any, max_length: int | None) -> None:
    if cache is None:
        raise Unsuited("no cache")
    kinds = PLAIN_CACHES.get(type(cache))
    if kinds is None or any(type(layer) not in kinds for layer in cache.layers):
        layers = {type(layer).__name__ for layer in cache.layers}
        raise Unsuited(f"the cache is a {type(cache).__name__} of {', '.join(sorted(layers))}")
    if getattr(cache, "offloading", False):
        raise Unsuited("an offloaded cache")
    static = [layer for layer in cache.layers if type(layer) is StaticLayer]
    if max_length and any(layer.get_max_length() < max_length - 1 for layer in static):
        raise Unsuited("the static cache is too short")


def _prepares_otherwise(model: Any) -> bool:
    """PEFT's prompt and prefix tuning put their tokens into the inputs there. Afterwards they leave
    the class's own function in the instance.
    """
    own = model.__dict__.get("prepare_inputs_for_generation")
    return own is not None and (
        getattr(own, "__func__", None) is not type(model).prepare_inputs_for_generation
    )


def _left_padding(mask: Tensor | None, batch: int) -> Tensor:
    """[batch]: how many padding tokens each sequence begins with. Raises Unsuited for any other
    mask.
    """
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    if mask.dim() != 2:
        raise Unsuited("an attention mask that is not [batch, length]")
    mask = mask.cpu() != 0
    start = (~mask).sum(-1)
    expected = torch.arange(mask.shape[1]) >= start[:, None]
    if not torch.equal(mask, expected) or bool((start == mask.shape[1]).any()):
        raise Unsuited("an attention mask with other than left padding")
    return start


def _refuse_padding(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for padding and a StreamingCache: it would be taken for the sinks."""
    mask = kwargs.get("attention_mask")
    streaming = isinstance(kwargs.get(CACHE), StreamingCache)
    if streaming and mask is not None and not bool(mask.all()):
        raise ValueError("a StreamingCache takes no padding, and the attention mask has some")


def _return(engine: DecodeEngine, cache: Cache, length: int, end: int) -> None:
    """Append the tokens the engine cached, from `length` to `end`, to a cache that outlives it."""
    if end <= length:
        return
    if engine.rolling and isinstance(cache, StreamingCache):
        engine.rolling.hand_back(cache, end)
        return
    for index, (keys, values) in enumerate(zip(engine.keys, engine.values, strict=True)):
        cache.update(keys[:, :, length:end], values[:, :, length:end], index)


@contextmanager
def engine_of(model: nn.Module) -> Iterator[DecodeEngine | None]:
    """The engine that `model` keeps, held for the block; for evaluation and tests."""
    kept = model.__dict__.get(_KEPT)
    if kept is None:
        yield None
        return
    with kept.lock:
        yield kept.engine
