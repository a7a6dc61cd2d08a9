"""Attention sinks: a cache of the first tokens and a rolling window, for text of any length.

A language model gives much of its attention to its first tokens whatever they say. A window that
drops them breaks the model; one that keeps their keys and values beside the last tokens' does not,
if positions are those within the cache (Xiao et al. 2023, Efficient Streaming Language Models with
Attention Sinks).

Rotary attention knows differences of positions alone, and the window's tokens are neighbours, so
they keep the rotation of their place in the text. Only the sinks have to move: they are rotated,
from their first keys each time, to the positions directly before the window's. That is what
re-assigning all positions within the cache gives, without rotating the window at every token.

float32 angles of far positions are coarse: at position p they are off by up to p * 2^-24 radians,
0.004 at 65536 and 0.06 at a million. In transformers' loop positions are those in the text, and so
is the error; the decode engine starts counting anew past 65536 tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from hf_fuse.decode.spec import Unsuited, rotation
from hf_fuse.ops.decode_sinks import rotate


class StreamingLayer(DynamicLayer):
    """Keys and values of one layer: those of the first `sinks` tokens, then of the last
    `window - 1`, each [batch, kv_heads, length, head_dim]. The sinks' keys are kept as they came.
    """

    is_croppable = False  # what was evicted is gone

    def __init__(self, sinks: int, window: int, inv_freq: Tensor | None):
        super().__init__()
        self.sinks, self.window = sinks, window
        self.inv_freq = inv_freq  # [rotary_dim / 2], or None in a layer without rotary positions
        self.seen = 0  # tokens, evicted ones included

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, evict, and return what the new tokens attend to: all that was kept before them,
        and themselves.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        evicted = self._evicted()
        keys, values = key_states, value_states
        if self.seen:
            assert self.keys is not None
            assert self.values is not None
            keys = torch.cat([self.keys, keys], dim=-2)
            values = torch.cat([self.values, values], dim=-2)
        self.hold(keys, values, self.seen + key_states.shape[-2])
        if evicted and self.sinks and self.inv_freq is not None:
            # float64: of the angle, only the frequency's own rounding remains
            angles = evicted * self.inv_freq.to(keys.device).double()
            sinks = rotate(keys[:, :, : self.sinks], angles)
            keys = torch.cat([sinks, keys[:, :, self.sinks :]], dim=-2)
        return keys, values

    def hold(self, keys: Tensor, values: Tensor, seen: int) -> None:
        """Keep what is to be kept of `keys` and `values`, the first `sinks` and the last ones of
        the `seen` tokens so far.
        """
        self.keys, self.values, self.seen = self._cut(keys), self._cut(values), seen

    def _cut(self, rows: Tensor) -> Tensor:
        length = rows.shape[-2]
        if length < self.sinks + self.window:
            return rows
        last = rows[:, :, length - self.window + 1 :]
        return torch.cat([rows[:, :, : self.sinks], last], dim=-2)

    def _kept(self) -> int:
        return min(self.seen, self.sinks + self.window - 1)

    def _evicted(self) -> int:
        return self.seen - self._kept()

    def get_seq_length(self) -> int:
        """How many tokens were seen: the next one's position in the text."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The keys that `query_length` new tokens attend to, and the place of the first of them
        counted back from theirs.
        """
        return self._kept() + query_length, self._evicted()

    def get_max_length(self) -> int:
        """-1: of any length."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.is_initialized, self.seen = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: evicted tokens cannot come back."""
        raise ValueError("a StreamingCache cannot be cropped: what it evicted is gone")


class StreamingCache(Cache):
    """A cache of `sinks` first tokens and a rolling window, for `generate` and plain forwards of
    patched and unpatched models.

        attends(token n) = tokens 0 .. sinks - 1, at the positions before the window's,
                           tokens n - window + 1 .. n

    Tokens that come together (a prompt) attend to all that was kept before them, and to each other
    in full; then the cache is cut. That is the published code's behaviour, whose window does not
    count the new token. With sinks=0 it is plain window attention.

    `generate` of a patched model decodes over it on the engine; without patching, in transformers'
    own loop. Memory and time per token are the same at any length.

    Args:
        config_or_model: of a model with rotary positions among `hf_fuse.supported()`. From a model
            the frequencies are read; from a config they are worked out, which differs where
            `model.half()` rounded them.
        sinks: first tokens kept, 0 for none; 4 in the paper.
        window: last tokens attended to, the new one included; sinks + window should be no more
            than the model was trained for.

    Sequences of a batch must not be padded: padding on the left would be taken for the sinks. A
    patched model's `generate` refuses it; transformers' does not tell a cache.

    Raises:
        UnsupportedModelError: for learned positions, frequencies that depend on the length
            ("dynamic", "longrope"), layers with a sliding window, Phi 3 (whose cache transformers
            drops on the way), and unknown models.
        ValueError: for a negative number of sinks, or a window below 1.

    Source: Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks.
    """

    def __init__(
        self, config_or_model: PreTrainedConfig | nn.Module, sinks: int = 4, window: int = 1024
    ):
        if sinks < 0 or window < 1:
            raise ValueError(
                f"sinks must be at least 0 and window at least 1, got {sinks} and {window}"
            )
        self.sinks, self.window = sinks, window
        frequencies = _frequencies(config_or_model)
        super().__init__(layers=[StreamingLayer(sinks, window, f) for f in frequencies])

    def hold(self, keys: Tensor, values: Tensor, seen: int) -> None:
        """Keep what is to be kept of all layers' keys and values, [layers, batch, kv_heads, length,
        head_dim]: the sinks as they came, and the last ones of the `seen` tokens so far.
        """
        layer: Any
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(k, v)
            layer.hold(k, v, seen)


def _frequencies(config_or_model: Any) -> list[Tensor | None]:
    """Of each layer's rotation. Raises UnsupportedModelError."""
    model = config_or_model if isinstance(config_or_model, nn.Module) else None
    config = config_or_model if model is None else getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        kind = type(config_or_model).__name__
        raise TypeError(f"StreamingCache takes a transformers config or model, got {kind}")
    from hf_fuse.patching import UnsupportedModelError  # whose import needs this module

    config = config.get_text_config(decoder=True)
    rotary = _rotary(config, model)
    if config.model_type == "phi3":
        raise UnsupportedModelError(
            "StreamingCache: transformers' generate drops any cache of a phi3 model at "
            "original_max_position_embeddings tokens"
        )
    if any(DynamicCache(config=config).is_sliding):
        raise UnsupportedModelError(
            f"StreamingCache: this {config.model_type} model has layers with a sliding window"
        )
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    by_type = isinstance(rotary.rope_type, dict)  # frequencies for each
    try:
        found = {kind: rotation(rotary, kind if by_type else None).inv_freq for kind in set(types)}
    except Unsuited as unsuited:
        raise UnsupportedModelError(f"StreamingCache: {unsuited}") from unsuited
    rotated = getattr(config, "no_rope_layers", None) or [1] * len(types)  # 0: not (SmolLM 3)
    return [found[kind] if rope else None for kind, rope in zip(types, rotated, strict=True)]


def _rotary(config: PreTrainedConfig, model: nn.Module | None) -> Any:
    """The module that has the frequencies: the model's own, or a new one from the config."""
    from hf_fuse.patches import ARCHITECTURES, BY_BACKBONE
    from hf_fuse.patching import UnsupportedModelError

    known = {a.model_type: a.backbone for a in ARCHITECTURES}
    rotary = {
        name: found
        for name, backbone in known.items()
        for attribute, found in vars(sys.modules[backbone.__module__]).items()
        if attribute.endswith("RotaryEmbedding")
    }
    if config.model_type not in rotary:
        reason = "has learned positions" if config.model_type in known else "is not known"
        raise UnsupportedModelError(
            f"StreamingCache: {config.model_type} {reason}; known with rotary positions are "
            f"{', '.join(sorted(rotary))}"
        )
    if model is None:
        return rotary[config.model_type](config)
    return next(m for m in model.modules() if type(m) in BY_BACKBONE).rotary_emb
