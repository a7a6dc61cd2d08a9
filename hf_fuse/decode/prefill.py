"""The prompt of a DecoderSpec: its rows into the caches, and its last residual row.

What the patched layers compute, by the same kernels and with the same roundings, but from the spec:
no module is called, and keys and values go straight to the engine's caches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, scaled_dot_product_attention

from hf_fuse import ops
from hf_fuse.decode.spec import DecoderSpec, LayerSpec, Norm, Projection


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
    if spec.positions is not None:
        x = x + embedding(attention.positions, spec.positions)
    opening = [_opening_norms(layer) for layer in spec.layers]
    x, rows = _add_norms(x, (), opening[0], backend)
    for index, layer in enumerate(spec.layers):
        attended = attention(layer, rows[0], keys[index], values[index], index)
        if layer.parallel:
            deltas: tuple[Tensor, ...] = (_mlp(layer, rows[1], backend), attended)
        else:
            x, rows = _add_norms(x, (attended,), (layer.mlp_norm,), backend)
            deltas = (_mlp(layer, rows[0], backend),)
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
        self.mask: Tensor | None = None
        self.positions = slots[None]
        if bool(start.any()):
            first = start.to(device)[:, None]
            self.positions = (slots - first).clamp(min=0)
            seen = (slots <= slots[:, None]) & (slots >= first[:, :, None])
            # Padding sees itself: a row that sees nothing would be NaN.
            self.mask = (seen | (slots == slots[:, None]))[:, None]
        if spec.inv_freq is not None:
            angles = self.positions[..., None] * spec.inv_freq
            angles = torch.cat((angles, angles), dim=-1)
            dtype = spec.embedding.dtype
            self.cos = (angles.cos() * spec.rope_scale).to(dtype)
            self.sin = (angles.sin() * spec.rope_scale).to(dtype)
            self.lengths = torch.zeros(len(spec.layers), dtype=torch.int64, device=device)

    def __call__(
        self, layer: LayerSpec, row: Tensor, keys: Tensor, values: Tensor, index: int
    ) -> Tensor:
        q, k, v = self._heads(layer.qkv, row)
        length = row.shape[1]
        if self.spec.inv_freq is None:
            keys[:, :, :length] = k
            values[:, :, :length] = v
        else:
            ops.rotary_cache_(
                q, k, v, self.cos, self.sin, keys, values, self.lengths[index : index + 1],
                backend=self.backend,
            )  # fmt: skip
        k, v = keys[:, :, :length], values[:, :, :length]
        grouped = k.shape[1] != q.shape[1]
        if grouped and self.mask is not None:  # no fast kernel has both
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
            grouped = False
        attended = scaled_dot_product_attention(
            q, k, v, self.mask, is_causal=self.mask is None, scale=layer.scaling,
            enable_gqa=grouped,
        )  # fmt: skip
        return _project(attended.transpose(1, 2).flatten(2), layer.attention_out)[0]

    def _heads(self, qkv: Projection, row: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each [batch, heads, length, head_dim]."""
        spec, parts = self.spec, _project(row, qkv)
        if spec.interleaved:
            heads = parts[0].unflatten(-1, (spec.num_heads, 3 * spec.head_dim)).transpose(1, 2)
            return heads.chunk(3, dim=-1)
        if len(parts) == 1:
            kv = spec.num_kv_heads * spec.head_dim
            parts = parts[0].split((spec.num_heads * spec.head_dim, kv, kv), dim=-1)
        return tuple(part.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2) for part in parts)


def _opening_norms(layer: LayerSpec) -> tuple[Norm, ...]:
    return (layer.attention_norm, layer.mlp_norm) if layer.parallel else (layer.attention_norm,)


def _add_norms(
    x: Tensor, deltas: tuple[Tensor, ...], norms: tuple[Norm, ...], backend: str
) -> tuple[Tensor, list[Tensor]]:
    """The sum of `x` and `deltas`, and its row by each of one or two norms."""
    first, last = norms[0], norms[-1]
    together = len(norms) == 2 and (first.eps, first.kind) == (last.eps, last.kind)
    x, row, second = ops.add_norm(
        x, first.weight, first.bias, eps=first.eps, kind=first.kind, deltas=deltas,
        weight2=last.weight if together else None, bias2=last.bias if together else None,
        backend=backend,
    )  # fmt: skip
    if len(norms) == 2 and second is None:
        _, second, _ = ops.add_norm(
            x, last.weight, last.bias, eps=last.eps, kind=last.kind, backend=backend
        )
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
