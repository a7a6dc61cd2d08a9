"""The prompt of a DecoderSpec: its rows into the caches, and its last residual row.

What the patched layers compute, by the same kernels and with the same roundings, but from the spec:
no module is called, and keys and values go straight to the engine's caches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, scaled_dot_product_attention

from hf_fuse import ops
from hf_fuse.decode.spec import DecoderSpec, LayerSpec, Norm, Projection, Rotation
from hf_fuse.ops.rotary import reference as rotary_reference


def prefill(
    spec: DecoderSpec,
    input_ids: Tensor,
    start: Tensor,
    last: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    backend: str = "auto",
) -> Tensor:
    """Run the prompt `input_ids` [batch, length], of which the first start[b] are padding (`start`
    is on the host) and `last`, [1], is the last token; what follows it changes nothing.

    Writes slots 0 to length of `keys` and `values`, each [batch, kv_heads, capacity, head_dim], and
    returns the residual row of the last token, [batch, hidden_size], before the final norm.
    """
    attention = _Attention(spec, input_ids, start, backend)
    x = embedding(input_ids, spec.embedding)
    if spec.embedding_scale != 1:
        x = x * spec.embedding_scale
    if spec.positions is not None:
        x = x + embedding(attention.positions, spec.positions)
    opening = [_opening_norms(layer) for layer in spec.layers]
    x, rows = _add_norms(x, (), opening[0], backend)
    for index, layer in enumerate(spec.layers):
        attended = attention(layer, rows[0], keys[index], values[index], index)
        attended = _added(spec, attended, layer.attention_post_norm, backend)
        if layer.parallel:
            deltas: tuple[Tensor, ...] = (_mlp(layer, rows[1], backend), attended)
        else:
            x, rows = _add_norms(x, (attended,), (layer.mlp_norm,), backend)
            mlp = _mlp(layer, rows[0], backend)
            deltas = (_added(spec, mlp, layer.mlp_post_norm, backend),)
        if index + 1 < len(spec.layers):
            x, rows = _add_norms(x, deltas, opening[index + 1], backend)
    x, *ends = (t.index_select(1, last)[:, 0] for t in (x, *deltas))
    return (ends[0] + ends[1] if len(ends) == 2 else ends[0]) + x


class _Attention:
    """Attention of a whole prompt, with what all its layers share."""

    def __init__(self, spec: DecoderSpec, input_ids: Tensor, start: Tensor, backend: str):
        self.spec, self.backend = spec, backend
        length, device = input_ids.shape[1], input_ids.device
        slots = torch.arange(length, device=device)
        self.positions = slots[None]
        self.first: Tensor | None = None  # [batch, 1], with padding
        if bool(start.any()):
            self.first = start.to(device)[:, None]
            self.positions = (slots - self.first).clamp(min=0)
        self.masks: dict[int, Tensor] = {}  # by window
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}  # cos and sin by rotation
        self.lengths = torch.zeros(len(spec.layers), dtype=torch.int64, device=device)

    def _mask(self, window: int) -> Tensor | None:
        """[batch or 1, 1, length, length], or None where the causal mask is all."""
        length = self.positions.shape[1]
        window = window if window < length else 0
        if not window and self.first is None:
            return None
        if window not in self.masks:
            slots = torch.arange(length, device=self.positions.device)
            seen = slots <= slots[:, None]
            if window:
                seen = seen & (slots > slots[:, None] - window)
            seen = seen[None]
            if self.first is not None:
                # Padding sees itself: a row that sees nothing would be NaN.
                seen = (seen & (slots >= self.first[:, :, None])) | (slots == slots[:, None])
            self.masks[window] = seen[:, None]
        return self.masks[window]

    def _cos_sin(self, rotation: Rotation) -> tuple[Tensor, Tensor]:
        if id(rotation) not in self.tables:
            angles = self.positions[..., None] * rotation.inv_freq
            angles = torch.cat((angles, angles), dim=-1)
            dtype = angles.dtype if rotation.wide else self.spec.embedding.dtype
            cos, sin = angles.cos() * rotation.scale, angles.sin() * rotation.scale
            self.tables[id(rotation)] = cos.to(dtype), sin.to(dtype)
        return self.tables[id(rotation)]

    def __call__(
        self, layer: LayerSpec, row: Tensor, keys: Tensor, values: Tensor, index: int
    ) -> Tensor:
        q, k, v = self._heads(layer, row)
        length, rotation = row.shape[1], layer.rotation
        if rotation is not None and not rotation.wide:
            ops.rotary_cache_(
                q, k, v, *self._cos_sin(rotation), keys, values, self.lengths[index : index + 1],
                backend=self.backend,
            )  # fmt: skip
        else:
            if rotation is not None:
                rotated = rotary_reference(q.float(), k.float(), *self._cos_sin(rotation))
                q, k = (t.to(v.dtype) for t in rotated)
            keys[:, :, :length] = k
            values[:, :, :length] = v
        k, v = keys[:, :, :length], values[:, :, :length]
        mask = self._mask(layer.window)
        grouped = k.shape[1] != q.shape[1]
        if grouped and (mask is not None or layer.softcap):  # no fast kernel has both
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
            grouped = False
        if layer.softcap:
            attended = _capped_attention(q, k, v, mask, layer)
        else:
            attended = scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=layer.scaling, enable_gqa=grouped
            )
        return _project(attended.transpose(1, 2).flatten(2), layer.attention_out)[0]

    def _heads(self, layer: LayerSpec, row: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each [batch, heads, length, head_dim]."""
        spec, parts = self.spec, _project(row, layer.qkv)
        if spec.interleaved:
            heads = parts[0].unflatten(-1, (spec.num_heads, 3 * spec.head_dim)).transpose(1, 2)
            return heads.chunk(3, dim=-1)
        if len(parts) == 1:
            kv = spec.num_kv_heads * spec.head_dim
            parts = parts[0].split((spec.num_heads * spec.head_dim, kv, kv), dim=-1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k, v = parts
            parts = _norm(q, layer.q_norm, self.backend), _norm(k, layer.k_norm, self.backend), v
        return tuple(part.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2) for part in parts)


def _capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: LayerSpec
) -> Tensor:
    """With softly capped scores, in transformers' order of roundings."""
    scores = torch.tanh(q @ k.transpose(2, 3) * layer.scaling / layer.softcap) * layer.softcap
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _opening_norms(layer: LayerSpec) -> tuple[Norm | None, ...]:
    return (layer.attention_norm, layer.mlp_norm) if layer.parallel else (layer.attention_norm,)


def _norm(x: Tensor, norm: Norm, backend: str) -> Tensor:
    """Of each row as long as the norm's weight."""
    rows = x.unflatten(-1, (-1, len(norm.weight)))
    normed = ops.add_norm(
        rows, norm.weight, norm.bias, eps=norm.eps, kind=norm.kind, backend=backend
    )[1]
    return normed.flatten(-2)


def _added(spec: DecoderSpec, delta: Tensor, norm: Norm | None, backend: str) -> Tensor:
    """What is added to the residual stream of what a projection gave."""
    if norm is not None:
        delta = _norm(delta, norm, backend)
    return delta if spec.residual_scale == 1 else delta * spec.residual_scale


def _add_norms(
    x: Tensor, deltas: tuple[Tensor, ...], norms: tuple[Norm | None, ...], backend: str
) -> tuple[Tensor, list[Tensor]]:
    """The sum of `x` and `deltas`, and its row by each of one or two norms, or the sum itself."""
    first, last = norms[0], norms[-1]
    if first is None or last is None:
        x = deltas[0] + x if deltas else x
        return x, [x]
    together = len(norms) == 2 and (first.eps, first.kind) == (last.eps, last.kind)
    x, row, second = ops.add_norm(
        x, first.weight, first.bias, eps=first.eps, kind=first.kind, deltas=deltas,
        weight2=last.weight if together else None, bias2=last.bias if together else None,
        backend=backend,
    )  # fmt: skip
    if len(norms) == 2 and second is None:
        second = _norm(x, last, backend)
    return x, [row] if second is None else [row, second]


def _mlp(layer: LayerSpec, row: Tensor, backend: str) -> Tensor:
    parts = _project(row, layer.mlp_in)
    if layer.gated:
        middle = ops.gated_act(parts[0], parts[1], layer.act, backend=backend)
    else:
        middle = ops.bias_act(parts[0], None, layer.act, backend=backend)
    return _project(middle, layer.mlp_out)[0]


def _project(row: Tensor, projection: Projection) -> tuple[Tensor, ...]:
    pairs = zip(projection.weights, projection.biases, strict=True)
    return tuple(linear(row, weight, bias) for weight, bias in pairs)
