"""decode_linear: projections of one token a sequence, with the norm before and what follows.

    n = norm(x), or x
    y = n @ concatenation(weights).T + concatenation(biases)
    store: out = y         act: out = act(y)         gated: out = act(y1) * y2         add: out += y

Shapes: x [batch, size], a weight [rows, size] with contiguous rows (any row stride), a bias [rows],
norm weight and bias [size], out [batch, all rows], or [batch, rows of one weight] when gated.
Dtypes: weights, biases and norm weights float32, float16 or bfloat16, alike; x float32 under a
norm, else their dtype; out float32 for store and add, else their dtype. Sums are fp32; nothing is
rounded before out, but for several sequences of 16-bit weights on a GPU, whose normed rows go to
tensor cores in the weights' dtype, as in transformers' layers.

For inference: writes into `out`, which the caller keeps, and has no gradient. Errors name the
tensor (RuntimeError).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fuse.ops._library import on_load, use_kernel
from hf_fuse.ops.activations import ACTIVATIONS, REFERENCES, index_of
from hf_fuse.ops.add_norm import reference as add_norm_reference

EPILOGUES = ("store", "act", "gated", "add")


def decode_linear(
    out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (),
    *,
    norm: tuple[Tensor, Tensor | None, float, str] | None = None,
    epilogue: str = "store",
    act: str = ACTIVATIONS[0],
    backend: str = "auto",
) -> None:
    """Write the projection of `x` into `out`. `norm` is (weight, bias, eps, "rms" or "layer"); one
    to three `weights`, two when gated.
    """
    norm_weight, norm_bias, eps, kind = norm or (None, None, 0.0, "rms")
    if epilogue not in EPILOGUES:
        raise ValueError(
            f"hf_fuse decode_linear: epilogue must be one of {', '.join(EPILOGUES)}, "
            f"got {epilogue!r}"
        )
    if not 1 <= len(weights) <= 3:
        raise ValueError(f"hf_fuse decode_linear: 1 to 3 weights, got {len(weights)}")
    if not use_kernel(weights[0], backend):
        reference(out, x, weights, biases, norm=norm, epilogue=epilogue, act=act)
        return
    torch.ops.hf_fuse.decode_linear.default(
        out,
        x,
        norm_weight,
        norm_bias,
        eps,
        kind == "rms",
        *(*weights, None, None)[:3],
        *(*biases, None, None, None)[:3],
        EPILOGUES.index(epilogue),
        index_of("decode_linear", act),
    )


def decode_linear_two(
    outs: tuple[Tensor, Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: tuple[tuple[Tensor, Tensor | None, float, str], ...],
    *,
    act: str,
    backend: str = "auto",
) -> None:
    """Two projections of the same `x`, each under a norm of its own, as one kernel where that can
    be: "store" into outs[0] and "act" into outs[1]. The norms share eps and kind.
    """
    (norm1, bias1, eps, kind), (norm2, bias2, *same) = norms
    if same != [eps, kind]:
        raise ValueError(
            f"hf_fuse decode_linear_two: the norms must share eps and kind, got {(eps, kind)} and "
            f"{tuple(same)}"
        )
    if not use_kernel(weights[0], backend):
        epilogues = ("store", "act")
        for out, weight, bias, norm, epilogue in zip(
            outs, weights, biases, norms, epilogues, strict=True
        ):
            reference(out, x, [weight], [bias], norm=norm, epilogue=epilogue, act=act)
        return
    torch.ops.hf_fuse.decode_linear_two.default(
        *outs, x, norm1, bias1, norm2, bias2, eps, kind == "rms", weights[0], biases[0],
        weights[1], biases[1], index_of("decode_linear_two", act),
    )  # fmt: skip


def decode_linear_sum(
    out: Tensor,
    xs: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    backend: str = "auto",
) -> None:
    """Two projections of rows of their own, both added to `out`, as one kernel where that can be:
    out += xs[0] @ weights[0].T + biases[0] + xs[1] @ weights[1].T + biases[1].
    """
    if not use_kernel(weights[0], backend):
        for x, weight, bias in zip(xs, weights, biases, strict=True):
            reference(out, x, [weight], [bias], epilogue="add")
        return
    torch.ops.hf_fuse.decode_linear_sum.default(
        out, *xs, weights[0], biases[0], weights[1], biases[1]
    )


def reference(
    out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (),
    *,
    norm: tuple[Tensor, Tensor | None, float, str] | None = None,
    epilogue: str = "store",
    act: str = ACTIVATIONS[0],
) -> None:
    """The same in plain torch."""
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    n, ys = normed(x.to(wide), norm), []
    for weight, bias in zip(weights, (*biases, *[None] * len(weights)), strict=False):
        y = n @ weight.to(wide).T
        ys.append(y if bias is None else y + bias.to(wide))
    if epilogue == "gated":
        out.copy_(REFERENCES[act](ys[0]) * ys[1])
        return
    y = torch.cat(ys, -1)
    if epilogue == "add":
        out.add_(y)
    else:
        out.copy_(REFERENCES[act](y) if epilogue == "act" else y)


def normed(x: Tensor, norm: tuple[Tensor, Tensor | None, float, str] | None) -> Tensor:
    """The norm of x in x's dtype, or x itself."""
    if norm is None:
        return x
    weight, bias, eps, kind = norm
    bias = None if bias is None else bias.to(x.dtype)
    return add_norm_reference(x, weight.to(x.dtype), bias, eps=eps, kind=kind)[1]


@on_load
def _register() -> None:
    torch.library.register_fake("hf_fuse::decode_linear", lambda *arguments: None)
    torch.library.register_fake("hf_fuse::decode_linear_two", lambda *arguments: None)
    torch.library.register_fake("hf_fuse::decode_linear_sum", lambda *arguments: None)
