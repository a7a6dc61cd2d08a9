"""A step's layers as one kernel, for one sequence, where `ops.decode_layers` takes the model: a
chain of kernels leaves the memory idle between them, a third of the time with small layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hf_fuse import ops
from hf_fuse.decode.spec import DecoderSpec, LayerSpec
from hf_fuse.ops.decode_layers import Layer, layer_table, suits, workspace


@dataclass
class Stack:
    """The layers of `spec` over their caches."""

    spec: DecoderSpec
    layers: tuple[Layer, ...]
    _table: Tensor = field(init=False)
    _scratch: Tensor = field(init=False)

    def __post_init__(self) -> None:
        embedding = self.spec.embedding
        self._table = layer_table(self.layers)
        self._scratch = workspace(embedding.shape[1], embedding.device)

    @classmethod
    def of(
        cls, spec: DecoderSpec, keys: Sequence[Tensor], values: Sequence[Tensor], backend: str
    ) -> Stack | None:
        """None where the kernel does not take them."""
        alike = set(map(_numbers, spec.layers))
        heads = spec.num_heads == spec.num_kv_heads and not spec.interleaved
        positions = spec.positions
        if positions is None or not heads or len(alike) != 1 or spec.embedding_scale != 1:
            return None
        if positions.data_ptr() % 16 or not positions.is_contiguous():
            return None
        if not all(map(_is_plain, spec.layers)):
            return None
        layers = tuple(_tensors(*layer) for layer in zip(spec.layers, keys, values, strict=True))
        if not suits(spec.embedding, layers, spec.num_heads, backend):
            return None
        return cls(spec, layers)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """What a step reads the whole of."""
        return tuple(w for y in self.layers for w in (y.qkv, y.attention_out, y.mlp_in, y.mlp_out))

    def run(self, residual: Tensor, token: Tensor, length: Tensor, start: Tensor) -> None:
        """Write the residual stream after the last layer, [1, size]."""
        spec, layer = self.spec, self.spec.layers[0]
        assert spec.positions is not None
        ops.decode_layers(
            residual, self._scratch, self._table, token, spec.embedding, spec.positions, length,
            start, num_heads=spec.num_heads, middle=len(self.layers[0].mlp_in),
            capacity=self.layers[0].keys.shape[2], eps=layer.norms[0].eps,
            scaling=layer.scaling, act=layer.act,
        )  # fmt: skip


def _numbers(layer: LayerSpec) -> tuple:
    return tuple(norm.eps for norm in layer.norms), layer.scaling, layer.act


def _is_plain(layer: LayerSpec) -> bool:
    """Whether `layer` is a pre-norm LayerNorm layer of single projections with biases."""
    norms = layer.norms
    projections = (layer.qkv, layer.attention_out, layer.mlp_in, layer.mlp_out)
    return (
        not layer.gated
        and not layer.parallel
        and not layer.chained
        and layer.rotation is None
        and not layer.window
        and not layer.softcap
        and len(norms) == 2
        and all(norm.kind == "layer" and norm.bias is not None for norm in norms)
        and norms[0].eps == norms[1].eps
        and all(len(p.weights) == 1 and p.biases[0] is not None for p in projections)
    )


def _tensors(layer: LayerSpec, keys: Tensor, values: Tensor) -> Layer:
    found: list[Tensor | None] = []
    for norm, projections in zip(
        layer.norms,
        ((layer.qkv, layer.attention_out), (layer.mlp_in, layer.mlp_out)),
        strict=True,
    ):
        found += [norm.weight, norm.bias]
        for projection in projections:
            found += [projection.weights[0], projection.biases[0]]
    return Layer(*(t for t in (*found, keys, values) if t is not None))
