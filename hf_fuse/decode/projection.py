"""A step's projections: by the decode_linear kernels, or for very many sequences by cuBLAS."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fuse import ops
from hf_fuse.decode.spec import Norm, Projection
from hf_fuse.ops.activations import ACTIVATIONS

# On a GPU decode_linear reads 16-bit weights once for this many sequences, on tensor cores, where a
# row suits them; all others once for every 4. Above, cuBLAS.
MAX_SEQUENCES, MAX_SEQUENCES_OF_OTHERS = 32, 8
# Large matrices without a bias, with no more rows than a row has elements, are cuBLAS's from fewer
# sequences on: blocks of decode_linear share such rows, and read at half the memory's speed.
MAX_SEQUENCES_OF_LARGE, LARGE = 16, 1 << 24
TENSOR_CORE_SIZES = range(32, 16384 + 1, 32)


def project(
    out: Tensor,
    x: Tensor,
    projection: Projection,
    *,
    norm: Norm | None = None,
    epilogue: str = "store",
    act: str = ACTIVATIONS[0],
    backend: str = "auto",
) -> None:
    """`ops.decode_linear`, by its kernels or by matrix products."""
    if by_matmul(x, projection, backend):
        matmul(out, x, projection, norm=norm, epilogue=epilogue, act=act)
        return
    ops.decode_linear(
        out, x, projection.weights, projection.biases, norm=norm.arguments if norm else None,
        epilogue=epilogue, act=act, backend=backend,
    )  # fmt: skip


def project_two(
    outs: tuple[Tensor, Tensor],
    x: Tensor,
    projections: tuple[Projection, Projection],
    norms: tuple[Norm, Norm],
    *,
    act: str,
    backend: str = "auto",
) -> None:
    """`ops.decode_linear_two`, likewise."""
    if by_matmul(x, projections[0], backend):
        for out, projection, norm, epilogue in zip(
            outs, projections, norms, ("store", "act"), strict=True
        ):
            matmul(out, x, projection, norm=norm, epilogue=epilogue, act=act)
        return
    ops.decode_linear_two(
        outs, x, [w for p in projections for w in p.weights],
        [b for p in projections for b in p.biases], tuple(n.arguments for n in norms),
        act=act, backend=backend,
    )  # fmt: skip


def project_sum(
    out: Tensor,
    xs: tuple[Tensor, Tensor],
    projections: tuple[Projection, Projection],
    *,
    backend: str = "auto",
) -> None:
    """`ops.decode_linear_sum`, likewise."""
    if any(by_matmul(x, p, backend) for x, p in zip(xs, projections, strict=True)):
        for x, projection in zip(xs, projections, strict=True):
            project(out, x, projection, epilogue="add", backend=backend)
        return
    ops.decode_linear_sum(
        out, xs, [w for p in projections for w in p.weights],
        [b for p in projections for b in p.biases], backend=backend,
    )  # fmt: skip


def by_matmul(x: Tensor, projection: Projection, backend: str) -> bool:
    """Whether `x`, [batch, size], has sequences enough."""
    weight, *others = projection.weights
    most = MAX_SEQUENCES
    if weight.dtype == torch.float32 or x.shape[1] not in TENSOR_CORE_SIZES:
        most = MAX_SEQUENCES_OF_OTHERS
    elif (
        not others
        and projection.biases[0] is None
        and weight.numel() >= LARGE
        and len(weight) <= weight.shape[1]
    ):
        most = MAX_SEQUENCES_OF_LARGE
    return x.is_cuda and backend != "reference" and len(x) > most


def matmul(
    out: Tensor,
    x: Tensor,
    projection: Projection,
    *,
    norm: Norm | None = None,
    epilogue: str = "store",
    act: str = ACTIVATIONS[0],
) -> None:
    """As `ops.decode_linear`, but that the normed row is rounded to the weights' dtype, as it is in
    transformers' layers. Products are summed in fp32 and not rounded.
    """
    if norm is not None:
        bias = None if norm.bias is None else norm.bias.to(x.dtype)
        x = ops.add_norm(x, norm.weight.to(x.dtype), bias, eps=norm.eps, kind=norm.kind)[1]
    x = x.to(projection.weights[0].dtype)
    wide = epilogue in ("store", "add")
    rows = sum(map(len, projection.weights))
    y = out if wide else out.new_empty(len(x), rows, dtype=torch.float32)
    first = 0
    for weight, bias in zip(projection.weights, projection.biases, strict=True):
        _multiply(y[:, first : first + len(weight)], x, weight, bias, add=epilogue == "add")
        first += len(weight)
    if epilogue == "act":
        out.copy_(ops.bias_act(y, None, act))
    elif epilogue == "gated":
        gate, up = y.chunk(2, -1)
        out.copy_(ops.gated_act(gate, up, act))


def _multiply(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, add: bool = False
) -> None:
    """out = x @ weight.T + bias in fp32, or the same added to it."""
    if x.is_cuda and x.dtype != torch.float32:
        torch.addmm(out, x, weight.T, out_dtype=torch.float32, beta=int(add), out=out)
    else:
        torch.addmm(out, x.float(), weight.float().T, beta=int(add), out=out)
    if bias is not None:
        out.add_(bias)
