"""A StreamingCache in the engine: attention sinks, and a window that rolls through the slots.

A step attends to the last sinks + window slots. The window's tokens stand where they were written;
`ops.decode_sinks` puts the sinks before them, in place of evicted tokens, at the beginning of every
step. At the end of the buffers, every `window` steps or fewer, the host moves the window back to
their front: only device tensors change, so that a captured step stays what it is.

Positions go on counting, because a key is rotated for its position. Past FARTHEST they begin anew,
with the window's keys rotated back once: float32 angles stay as exact as in a text of that length,
and no key is rotated twice, for the next time it is long evicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_fuse import ops
from hf_fuse.decode.spec import DecoderSpec, Unsuited
from hf_fuse.ops.decode_sinks import rotate

if TYPE_CHECKING:
    from hf_fuse.streaming import StreamingCache

FARTHEST = 1 << 16


@dataclass(frozen=True)
class Stream:
    """What is attended to: the first `sinks` tokens, and the last `window`, the new one included.
    With it, an engine of that many steps makes room for itself.
    """

    sinks: int
    window: int

    @property
    def kept(self) -> int:
        """Tokens that a new one finds."""
        return self.sinks + self.window - 1

    @property
    def capacity(self) -> int:
        """Slots, at least: where the window moves to does not overlap where it was."""
        return self.sinks + 2 * self.window


class Rolling:
    """The host's account of what the slots hold, and the sinks as they came.

    keys, values: [layers, batch, kv_heads, capacity, head_dim], the engine's.
    """

    def __init__(self, spec: DecoderSpec, stream: Stream, keys: Tensor, values: Tensor):
        self.stream, self.keys, self.values = stream, keys, values
        self.capacity, sinks = keys.shape[3], stream.sinks
        self.sink_keys, self.sink_values = (
            t.new_empty((*t.shape[:3], sinks, t.shape[4])) for t in (keys, values)
        )
        self.inv_freq = _frequencies(spec)
        self.begin()

    def begin(self, held: int = 0, dropped: int = 0) -> None:
        """The first `held` slots are taken, after `dropped` tokens that are not there any more."""
        self.held, self.dropped = held, dropped
        self.rebased = 0  # of the dropped, those that positions do not count
        self.has_sinks = False

    def kernel(self, length: Tensor, start: Tensor, backend: str) -> Callable[[], None]:
        """The sinks into their slots, the first launch of a step."""
        return partial(
            ops.decode_sinks, self.keys, self.values, self.sink_keys, self.sink_values, length,
            start, inv_freq=self.inv_freq, window=self.stream.window, backend=backend,
        )  # fmt: skip

    def before_step(self, length: Tensor, start: Tensor) -> None:
        """Make room for a step at slot `held`, by torch's copies on the device."""
        if not self.has_sinks and self.held + self.dropped > self.stream.kept:
            # The first token to be evicted is, at the earliest, the one behind them.
            self.sink_keys.copy_(self._slots(self.keys, 0, self.stream.sinks))
            self.sink_values.copy_(self._slots(self.values, 0, self.stream.sinks))
            self.has_sinks = True
        if self.held == self.capacity:
            self._move_to_front(length, start)
        self.held += 1

    def _move_to_front(self, length: Tensor, start: Tensor) -> None:
        sinks, kept = self.stream.sinks, self.stream.kept
        for t in (self.keys, self.values):
            last = self._slots(t, self.held - (kept - sinks), self.held)
            self._slots(t, sinks, kept).copy_(last)
        moved = self.held - kept
        self.held, self.dropped = kept, self.dropped + moved
        length.sub_(moved)
        start.sub_(moved)
        if self.dropped - self.rebased > FARTHEST:
            self._begin_positions_anew(start)

    def _begin_positions_anew(self, start: Tensor) -> None:
        """The slots become those of a text of `kept` tokens, whose first are the sinks."""
        sinks, kept = self.stream.sinks, self.stream.kept
        self._turn(self._slots(self.keys, sinks, kept), self.rebased - self.dropped)
        self._slots(self.keys, 0, sinks).copy_(self.sink_keys)
        self._slots(self.values, 0, sinks).copy_(self.sink_values)
        self.rebased = self.dropped
        start.zero_()

    def hand_back(self, cache: StreamingCache, seen: int) -> None:
        """What `cache` holds after the first `seen` tokens; the engine may be a step further."""
        stream = self.stream
        if seen <= stream.kept:
            keys, values = (self._slots(t, 0, seen) for t in (self.keys, self.values))
        else:
            end = seen - self.dropped
            begin = end - stream.window + 1
            window = self._slots(self.keys, begin, end).clone()
            if self.rebased:
                self._turn(window, self.rebased)
            sinks = [self._slots(t, 0, stream.sinks) for t in (self.keys, self.values)]
            if self.has_sinks:
                sinks = [self.sink_keys, self.sink_values]
            keys = torch.cat([sinks[0], window], 3)
            values = torch.cat([sinks[1], self._slots(self.values, begin, end)], 3)
        cache.hold(keys.clone(), values.clone(), seen)

    def _turn(self, keys: Tensor, positions: int) -> None:
        """Rotate keys of all layers on by `positions`, a layer at a time to save memory."""
        for layer, frequencies in zip(keys, self.inv_freq.double(), strict=True):
            layer.copy_(rotate(layer, positions * frequencies))

    @staticmethod
    def _slots(cache: Tensor, begin: int, end: int) -> Tensor:
        return cache[:, :, :, begin:end]


def _frequencies(spec: DecoderSpec) -> Tensor:
    """[layers, rotary_dim / 2], zero where a layer is not rotated. Raises Unsuited."""
    sizes = {len(r.inv_freq) for r in spec.rotations}
    if spec.positions is not None or len(sizes) != 1:
        raise Unsuited("streaming needs rotary positions, of as many elements in all layers")
    if any(layer.window for layer in spec.layers):
        raise Unsuited("streaming in a model whose layers have windows")
    none = torch.zeros(sizes.pop(), device=spec.embedding.device)
    return torch.stack([y.rotation.inv_freq if y.rotation else none for y in spec.layers])
