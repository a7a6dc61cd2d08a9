"""decode_select: the token and all that a step keeps count of, against the reference's bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import NAN, assert_equal, registered
from torch import Tensor

from hf_fuse.ops import decode_select
from hf_fuse.ops.decode_select import reference as select_reference
from hf_fuse.ops.decode_select import workspace


@dataclass(frozen=True)
class Select:
    """One call and what it starts from."""

    logits: Tensor
    finished: Sequence[int] = ()
    eos: Sequence[int] = ()
    pad: int = 0
    min_step: int = 0
    step: int = 0
    max_steps: int = 4
    host_history: bool = True

    def __call__(self, function: Callable[..., None] = decode_select, **options: Any) -> dict:
        """Everything that is written, on the CPU."""
        batch, device = len(self.logits), self.logits.device

        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        history = torch.full((self.max_steps, batch), -1)
        if not self.host_history:
            history = history.to(device)
        elif device.type == "cuda":
            history = history.pin_memory()
        written = {
            "token": ints(*[-1] * batch),
            "finished": ints(*(self.finished or [0] * batch)),
            "history": history,
            "length": ints(17),
            "step": ints(self.step),
        }
        scratch = () if function is select_reference else (workspace(batch, device),)
        function(
            *written.values(),
            *scratch,
            self.logits,
            ints(*self.eos),
            self.pad,
            self.min_step,
            **options,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {name: tensor.cpu() for name, tensor in written.items()}

    def check(self) -> dict:
        """Equal to the reference, on the CPU, where torch.argmax promises the first index."""
        written = self(backend=self.logits.device.type)
        expected = replace(self, logits=self.logits.cpu())(select_reference)
        for name, tensor in written.items():
            assert_equal(tensor, expected[name], name)
        return written


@pytest.mark.parametrize("host_history", [False, True], ids=["device_history", "host_history"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("vocab", [1, 7, 50257, 128256])
def test_select_of_every_vocabulary(
    vocab: int, batch: int, host_history: bool, device: str
) -> None:
    logits = torch.randn(batch, vocab, device=device)
    Select(logits, step=2, host_history=host_history).check()
    Select(logits - 100).check()


@pytest.mark.parametrize("vocab", [7, 1000, 50257])
def test_select_takes_the_first_of_the_largest(vocab: int, device: str) -> None:
    for index in (0, 1, vocab // 2, vocab - 2):
        logits = torch.randn(2, vocab, device=device)
        logits[:, index] = logits[:, -1] = 9.0
        assert Select(logits).check()["token"].tolist() == [index] * 2


@pytest.mark.parametrize("value", [0.0, -float("inf"), float("inf"), NAN])
def test_select_of_equal_logits_is_0(value: float, device: str) -> None:
    written = Select(torch.full((2, 50257), value, device=device)).check()
    assert written["token"].tolist() == [0, 0]


def test_select_takes_the_first_nan(device: str) -> None:
    logits = torch.randn(3, 50257, device=device)
    logits[:, 5] = float("inf")
    logits[0, [300, 40000]] = NAN
    logits[1, -1] = NAN
    assert Select(logits).check()["token"].tolist() == [300, 50256, 5]


def test_select_finishes_at_an_eos_and_pads_from_then_on(device: str) -> None:
    logits = torch.randn(5, 111, device=device)
    logits[torch.arange(5), torch.tensor([3, 4, 5, 6, 3])] = 9.0
    written = Select(logits, finished=(0, 0, 0, 1, 1), eos=(3, 5), pad=77, step=1).check()
    assert written["token"].tolist() == [3, 4, 5, 77, 77]
    assert written["finished"].tolist() == [1, 0, 1, 1, 1]
    assert written["history"].tolist() == [[-1] * 5, [3, 4, 5, 77, 77], [-1] * 5, [-1] * 5]
    assert (written["length"].item(), written["step"].item()) == (18, 2)


def test_select_before_the_least_step_takes_no_eos(device: str) -> None:
    logits = torch.randn(2, 50257, device=device)
    logits[0, [3, 50256]] = torch.tensor([9.0, 8.0], device=device)
    logits[1, [50256, 7]] = torch.tensor([9.0, 8.0], device=device)
    early = Select(logits, eos=(3, 50256), step=1, min_step=2).check()
    assert early["token"].tolist()[1] == 7
    assert early["token"].tolist()[0] not in (3, 50256)
    assert Select(logits, eos=(3, 50256), step=2, min_step=2).check()["token"].tolist() == [
        3,
        50256,
    ]


@pytest.mark.parametrize("step", [3, 4, 100])
def test_select_past_the_last_step_writes_no_history(step: int, device: str) -> None:
    written = Select(torch.randn(2, 7, device=device), step=step).check()
    assert (written["history"] >= 0).any().item() == (step < 4)


def test_select_again_with_the_same_workspace(device: str) -> None:
    batch, logits = 3, torch.randn(10, 3, 50257, device=device)
    token, finished = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
    history = torch.full((10, batch), -1, device=device)
    length, step = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
    scratch, eos = workspace(batch, token.device), token.new_tensor([])
    for each in logits:
        decode_select(token, finished, history, length, step, scratch, each, eos, 0)
    assert_equal(history, logits.argmax(-1))
    assert (length.item(), step.item()) == (10, 10)


SELECT_ERRORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "vector_logits": ("logits", lambda t: t[0], r"logits must be \[batch, vocab\], got \[8\]"),
    "empty_logits": ("logits", lambda t: t[:, :0], r"logits must be \[batch, vocab\]"),
    "strided_logits": ("logits", lambda t: t[:, ::2], r"logits must be a contiguous"),
    "low_logits": ("logits", Tensor.bfloat16, r"logits must be float32, got bfloat16"),
    "int32_token": ("token", Tensor.int, r"token must be 2 int64 in a row, got int32"),
    "one_finished": ("finished", lambda t: t[:1], r"finished must be 2 int64 in a row"),
    "bool_finished": ("finished", Tensor.bool, r"finished must be 2 int64 in a row, got bool"),
    "int32_eos": ("eos", Tensor.int, r"eos must be 1 int64 in a row, got int32"),
    "two_lengths": ("length", lambda t: t.repeat(2), r"length must be 1 int64 in a row"),
    "two_steps": ("step", lambda t: t.repeat(2), r"step must be 1 int64 in a row"),
    "narrow_history": ("history", lambda t: t[:, :1], r"history must be \[steps, 2\], got"),
    "int32_history": ("history", Tensor.int, r"history must be 8 int64 in a row, got int32"),
    "int32_workspace": ("scratch", Tensor.int, r"workspace must be .* int64 in a row, got int32"),
}


@pytest.mark.parametrize("case", SELECT_ERRORS)
def test_select_errors_name_the_tensor(case: str, device: str) -> None:
    name, change, message = SELECT_ERRORS[case]
    ints = torch.zeros(2, dtype=torch.int64, device=device)
    arguments = {
        "token": ints.clone(),
        "finished": ints.clone(),
        "history": ints.repeat(4, 1),
        "length": ints[:1].clone(),
        "step": ints[:1].clone(),
        "scratch": workspace(2, ints.device),
        "logits": torch.randn(2, 8, device=device),
        "eos": ints[:1].clone(),
        "pad": 0,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=rf"hf_fuse decode_select: {message}"):
        decode_select(**arguments, backend=device)


def test_opcheck(device: str) -> None:
    ints = [torch.zeros(n, dtype=torch.int64, device=device) for n in (2, 2, 1, 1, 1)]
    token, finished, length, step, eos = ints
    scratch, logits = workspace(2, token.device), torch.randn(2, 8, device=device)
    history = token.repeat(4, 1)
    torch.library.opcheck(
        registered(device).decode_select.default,
        (token, finished, history, length, step, scratch, logits, eos, 0),
    )
