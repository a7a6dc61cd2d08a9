"""Calls of a decoding step's ops on a CPU, recorded to be run again by one call.

By its own a call takes Python and torch's dispatcher about 20 us, longer than a small kernel runs;
on a GPU a CUDA graph spares that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fuse import jit
from hf_fuse.ops._library import kernels

Call = Callable[[], None]


def recorded(calls: Iterable[Call]) -> list[Call]:
    """What does the same as `calls`, in turn: neighbours that run nothing but `decode_` ops' CPU
    kernels as one `Recording`, the others as they are.

    To find them each is called once, which writes what others than those kernels write.
    """
    runs: list[Call] = []
    for recordable, group in groupby(calls, _is_recordable):
        if recordable:
            runs.append(Recording(group).run)
        else:
            runs += group
    return runs


class Recording:
    """The CPU kernels that `calls` would run, in turn; recording runs none of them.

    The calls are of `decode_` ops, which check their arguments now; what else they do is done now
    and not again. They, or the caller, keep the tensors, for only addresses are recorded.
    RuntimeError where the CPU kernels could not be built, and for a recording within another.
    """

    def __init__(self, calls: Iterable[Call]):
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


class _Others(TorchDispatchMode):
    """Sees whether there are calls of other ops."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= not func.name().startswith("hf_fuse::decode_")
        return func(*args, **(kwargs or {}))


def _is_recordable(call: Call) -> bool:
    others = _Others()

    def watched() -> None:
        with others:
            call()

    Recording([watched])
    return not others.found
