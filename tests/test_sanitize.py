"""What `make sanitize` runs under compute-sanitizer: all there is, and it runs."""

from __future__ import annotations

import sanitize

from hf_fuse import ops

CUDA_ALONE = {"decode_sample", "decode_layers"}


def test_every_op_of_a_step_is_called(device: str) -> None:
    called = set()
    for name, call in sanitize.calls(device):
        call()
        called.add(name.replace(",", "").split()[0])
    known = {name for name in ops.__all__ if name.startswith("decode_")}
    assert called == (known if device == "cuda" else known - CUDA_ALONE)
