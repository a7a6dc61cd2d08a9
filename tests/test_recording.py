"""Recordings of a step's CPU kernels, and that the engine steps by one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from threading import Thread

import pytest
import torch
from models import FAMILY, PLAIN, Case, cases
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hf_fuse
from hf_fuse import ops
from hf_fuse.decode.engine import DecodeEngine
from hf_fuse.decode.obstacles import spec_of
from hf_fuse.ops._library import kernels
from hf_fuse.ops.recording import Recording, recorded

assert kernels("cpu")
BATCH, LENGTH, STEPS = 2, 7, 5


def linear_into(out: Tensor) -> Callable[[], None]:
    size = 64
    weight, x = torch.randn(out.shape[1], size), torch.randn(len(out), size)
    return partial(ops.decode_linear, out, x, [weight], [None], epilogue="add")


def run_number(number: int) -> None:
    torch.ops.hf_fuse.run_recording(number)


def test_nothing_runs_before_run() -> None:
    out = torch.zeros(2, 300)
    call = linear_into(out)
    recording = Recording([call, call])
    assert not out.any()
    recording.run()
    found = out.clone()
    assert found.any()
    out.zero_()
    call()
    call()
    assert torch.equal(found, out)


def test_what_others_run_is_left_as_it_is() -> None:
    out, other = torch.zeros(2, 300), torch.zeros(2, 300)
    call, call_other = linear_into(out), linear_into(other)

    def scale() -> None:
        out.mul_(2)

    def both() -> None:
        call_other()
        other.add_(1)

    runs = recorded([call, call, scale, both, call])
    assert [run in (scale, both) for run in runs] == [False, True, True, False]
    outs = []
    for each in (runs, (call, call, scale, both, call)):
        out.fill_(1)
        other.fill_(1)
        for run in each:
            run()
        outs.append((out.clone(), other.clone()))
    assert all(map(torch.equal, *outs))


def test_another_thread_is_not_recorded() -> None:
    out, other = torch.zeros(2, 300), torch.zeros(2, 300)
    call, call_other = linear_into(out), linear_into(other)

    def meanwhile() -> None:
        thread = Thread(target=call_other)
        thread.start()
        thread.join()

    recording = Recording([call, meanwhile])
    assert other.any()
    other.zero_()
    recording.run()
    assert out.any()
    assert not other.any()


def test_a_call_that_fails_leaves_no_recording() -> None:
    out = torch.zeros(2, 300)
    call = linear_into(out)
    with pytest.raises(RuntimeError, match="out must be"):
        Recording([call, linear_into(torch.zeros(300, 2).T)])
    call()
    assert out.any()


def test_a_recording_within_another_is_an_error() -> None:
    out = torch.zeros(2, 300)
    call = linear_into(out)
    with pytest.raises(RuntimeError, match="recording already"):
        Recording([lambda: Recording([call]).run()])
    call()
    assert out.any()


def test_what_is_not_recorded_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="not recording"):
        torch.ops.hf_fuse.end_recording()
    with pytest.raises(RuntimeError, match="no recording 0"):
        run_number(0)


def test_a_recording_is_dropped_with_its_object() -> None:
    recording = Recording([linear_into(torch.zeros(2, 300))])
    number = recording._number
    run_number(number)
    del recording
    gc.collect()
    with pytest.raises(RuntimeError, match=f"no recording {number}"):
        run_number(number)


def engine_after_a_prompt(case: Case) -> DecodeEngine:
    engine = DecodeEngine(spec_of(hf_fuse.patch(case.build())), BATCH, LENGTH + STEPS)
    engine.begin((), 0)
    engine.prefill(torch.randint(100, (BATCH, LENGTH)), torch.tensor([0, 3]))
    return engine


@cases(PLAIN, FAMILY)
def test_a_step_is_one_call_with_the_kernels_bits(case: Case) -> None:
    engine, same = engine_after_a_prompt(case), engine_after_a_prompt(case)
    for own, other in zip((*engine.keys, *engine.values), (*same.keys, *same.values), strict=True):
        other.copy_(own)
    for token in torch.randint(100, (STEPS, BATCH)):
        for each in (engine, same):
            each.put(token)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            engine.advance(select=False)
        for kernel in same.kernels:
            kernel.run()
        assert torch.equal(engine.logits, same.logits)
        ours = [e.name for e in profiler.events() if e.name.startswith("hf_fuse::")]
        assert ours == ["hf_fuse::run_recording"]
    for own, other in zip((*engine.keys, *engine.values), (*same.keys, *same.values), strict=True):
        assert torch.equal(own[:, :, : LENGTH + STEPS], other[:, :, : LENGTH + STEPS])


def test_the_reference_is_not_recorded() -> None:
    model = hf_fuse.patch(PLAIN[0].build())
    engine = DecodeEngine(spec_of(model), BATCH, LENGTH, backend="reference")
    assert engine._launches == [kernel.run for kernel in engine.kernels]
