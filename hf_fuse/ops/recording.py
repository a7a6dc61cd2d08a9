"""Calls of a decoding step's ops on a CPU, recorded to be run again by one call.

By its own a call takes Python and torch's dispatcher about 20 us, longer than a small kernel runs;
on a GPU a CUDA graph spares that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch

from hf_fuse import jit
from hf_fuse.ops._library import kernels


class Recording:
    """The CPU kernels that `calls` would run, in turn; recording runs none of them.

    The calls are of `decode_` ops, which check their arguments now; what else they do is done now
    and not again. They, or the caller, keep the tensors, for only addresses are recorded.
    RuntimeError where the CPU kernels could not be built, and for a recording within another.
    """

    def __init__(self, calls: Iterable[Callable[[], None]]):
        if not kernels("cpu"):
            raise RuntimeError(
                f"hf_fuse: a recording needs the CPU kernels, which could not be built: "
                f"{jit.failures['cpu']}"
            )
        self._calls = tuple(calls)  # they refer to the tensors
        ops = torch.ops.hf_fuse
        ops.begin_recording()
        try:
            for call in self._calls:
                call()
        finally:
            self._number = ops.end_recording()
            weakref.finalize(self, ops.drop_recording, self._number)

    def run(self) -> None:
        """Run the kernels."""
        torch.ops.hf_fuse.run_recording.default(self._number)
