"""Every kernel of a decoding step once, at small shapes that reach each of its ways to share out
the work: `make sanitize`, on a GPU, runs this under compute-sanitizer's memcheck and racecheck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from test_decode_attention import make_attention
from test_decode_embed import make_embed
from test_decode_layers import make_layers
from test_decode_linear import add_both, make_linear, make_sum
from test_decode_norms import make_add_norm, vector
from test_decode_sample import FILTERS
from test_decode_sample import make as make_sample
from test_decode_select import Select
from test_decode_sinks import WINDOW, make_sinks

from hf_fuse import ops

HALF, WIDE = torch.bfloat16, torch.float32


def calls(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name and a call, of every op that `device` has a kernel for."""
    yield from linear(device)
    yield from attention(device)
    yield from small(device)
    if device == "cuda":
        yield "decode_sample", make_sample(1000, 3, FILTERS["all"], device)
        yield "decode_sample, long", make_sample(70000, 2, FILTERS["k and p"], device)
        # Without a model: with a filter by kernel name racecheck breaks off in cuBLAS's kernels.
        if torch.cuda.get_device_capability()[0] >= 9:
            for size, length in ((768, 41), (1600, 300)):
                yield f"decode_layers {size}, {length}", make_layers(size, length)


def linear(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype, size, batch, norm in (
        (HALF, 320, 1, "layer_bias"), (HALF, 1600, 2, "rms"), (WIDE, 320, 5, "rms"),
        (HALF, 33, 2, "layer_bias"),
    ):  # fmt: skip
        call = make_linear(size, [40, 9, 3], dtype, device, batch=batch, norm=norm, biases=[True])
        yield f"decode_linear {size}, {batch}", call
    # On tensor cores: several passes of a block, warps that share rows, blocks that do, or both.
    for size, rows, batch in (
        (64, 34000, 3), (1024, 2100, 3), (2048, 130, 5), (2048, 130, 16), (2048, 130, 17),
        (8192, 130, 8), (64, 17, 32),
    ):  # fmt: skip
        call = make_linear(size, [rows], HALF, device, batch=batch, norm="rms", epilogue="act")
        yield f"decode_linear {size} x {rows}, {batch}", call
    for batch in (1, 5):
        call = make_linear(320, [261, 261], HALF, device, batch=batch, epilogue="gated", act="silu")
        yield f"decode_linear gated, {batch}", call
    first, second = (
        make_linear(320, [n], HALF, device, norm="layer_bias", biases=[True], epilogue=epilogue)
        for n, epilogue in ((960, "store"), (1280, "act"))
    )
    yield (
        "decode_linear_two",
        lambda: ops.decode_linear_two(
            (first.out(), second.out()), first.x, (*first.weights, *second.weights),
            (*first.biases, *second.biases), (first.norm, second.norm), act="gelu",
        ),
    )  # fmt: skip
    # More rows of a block than it has under way: from the first weight to the second.
    for size, rows in ((320, 2600), (4096, 1300)):
        both = make_sum((size, 4 * size), rows, HALF, device)
        yield f"decode_linear_sum {size}", partial(add_both, *both, device)


def attention(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    for head_dim, group, length, start, changes in (
        (64, 4, 129, (0,), {}),  # heads of a cluster
        (128, 4, 129, (0, 7, 129), {}),  # heads apart
        (80, 1, 300, (0, 5), {}),
        (96, 8, 700, (0, 5, 0), {"window": 600}),  # in groups
        (64, 4, 4500, (0,), {}),  # on tensor cores
        (128, 8, 1500, (3, 0), {"window": 1200}),
        (256, 2, 200, (0,), {"softcap": 2.0}),
    ):
        call = make_attention(
            HALF, device, head_dim=head_dim, group=group, length=length, start=start
        )
        yield f"decode_attention {head_dim}, {group}, {length}", replace(call, **changes)


def small(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    logits = torch.randn(3, 5000, device=device)
    yield "decode_select", Select(logits, eos=(3,), min_step=2)
    embed = make_embed(HALF, device, 768)
    out = torch.empty(3, 768, device=device)
    yield "decode_embed", lambda: ops.decode_embed(out, **embed)
    for size in (768, 4096):
        given = make_add_norm(HALF, device, size)
        yield "decode_add_norm", lambda given=given: ops.decode_add_norm(**given, eps=1e-6)
    qkv, weight = torch.randn(3, 8 * 64, device=device), vector(64, HALF, device)
    yield (
        "decode_head_norm",
        lambda: ops.decode_head_norm(qkv, weight, weight, q_width=256, k_width=128, eps=1e-6),
    )
    sinks = make_sinks(HALF, device)
    yield "decode_sinks", lambda: ops.decode_sinks(**sinks, window=WINDOW)


if __name__ == "__main__":
    for name, call in calls("cuda"):
        call()
        torch.cuda.synchronize()
        print(name, flush=True)
