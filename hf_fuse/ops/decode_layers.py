"""decode_layers: a decoding step's embedding and layers for one sequence, as one CUDA kernel.

    residual = table[token] + positions[length - start]
    for each layer:
        residual += attention_out(attention(qkv(layer_norm(residual))))
        residual += mlp_out(act(mlp_in(layer_norm(residual))))

Shapes: residual [1, size] float32, table [vocab, size], positions [num_positions, size], token,
length and start [1] int64. A layer's tensors, in the order of `Layer`: weights [rows, inputs], rows
contiguous and one after another, q, k and v in one; biases and norm weights [rows] or [size]; keys
and values [1, num_heads, capacity, head_dim], contiguous. The new key and value go to slot
`length`; slots start to length are attended to. Dtypes: float16 or bfloat16, alike.

What is added to the residual stream is summed in fixed point (2^-32), so that the order in which
blocks add does not count: same input, same bits. A norm's result is multiplied as the sum of two
elements of the dtype, attention's output and the MLP's middle are rounded to it, products are
summed in fp32. A NaN, or a part of a sum beyond 2^17, makes the residual NaN.

CUDA from sm_90 on, heads of 64, sizes up to 1792; `suits` says whether model and GPU do. Writes
into residual, the caches and the workspace, which the caller keeps, and has no gradient. Errors
name the tensor (RuntimeError); the layers' tensors are the caller's to check, as `layer_table` is
given addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_fuse.ops._library import on_load, use_kernel
from hf_fuse.ops.activations import index_of

SUM_SETS = 16  # csrc/include/decode.cuh, kSumSets


class Layer(NamedTuple):
    """A layer's tensors."""

    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    attention_out: Tensor
    attention_out_bias: Tensor
    mlp_norm_weight: Tensor
    mlp_norm_bias: Tensor
    mlp_in: Tensor
    mlp_in_bias: Tensor
    mlp_out: Tensor
    mlp_out_bias: Tensor
    keys: Tensor
    values: Tensor


def layer_table(layers: Sequence[Layer]) -> Tensor:
    """The addresses of the layers' tensors as the op takes them; it does not keep them alive."""
    addresses = [[tensor.data_ptr() for tensor in layer] for layer in layers]
    return torch.tensor(addresses, dtype=torch.int64).to(layers[0].keys.device)


def workspace(size: int, device: torch.device) -> Tensor:
    """For one stream at a time; the op leaves it as it was."""
    return torch.zeros(SUM_SETS * size + 2, dtype=torch.int64, device=device)


def suits(table: Tensor, layers: Sequence[Layer], num_heads: int, backend: str = "auto") -> bool:
    """Whether the kernel takes these layers, by their dtype, shapes and addresses, and by the GPU.

    False for tensors on a CPU and for backend "reference".
    """
    if not table.is_cuda or not use_kernel(table, backend) or table.data_ptr() % 16:
        return False
    size, middle = table.shape[1], len(layers[0].mlp_in)
    shapes = {
        "qkv": (3 * size, size),
        "attention_out": (size, size),
        "mlp_in": (middle, size),
        "mlp_out": (size, middle),
    }
    for layer in layers:
        if any(t.dtype != table.dtype or t.data_ptr() % 16 for t in layer):
            return False
        if not all(t.is_contiguous() for t in layer):
            return False
        if any(getattr(layer, name).shape != shape for name, shape in shapes.items()):
            return False
    return torch.ops.hf_fuse.decode_layers_suits.default(table, len(layers), num_heads, middle)


def decode_layers(
    residual: Tensor,
    scratch: Tensor,
    layers: Tensor,
    token: Tensor,
    table: Tensor,
    positions: Tensor,
    length: Tensor,
    start: Tensor,
    *,
    num_heads: int,
    middle: int,
    capacity: int,
    eps: float,
    scaling: float,
    act: str,
) -> None:
    """Run the layers of `layer_table`, [layers, 14]. `scratch` is the `workspace`."""
    torch.ops.hf_fuse.decode_layers.default(
        residual, scratch, layers, token, table, positions, length, start, num_heads, middle,
        capacity, eps, scaling, index_of("decode_layers", act),
    )  # fmt: skip


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::decode_layers", lambda *arguments: None)
