"""decode_sample: the reference against transformers' processors and torch.multinomial; the kernel
against float64, where a border or a race that rounding may decide may go either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import NAN, assert_equal, registered
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_fuse.decode.sampling import Sampler, Selection, selection_of
from hf_fuse.ops import decode_sample
from hf_fuse.ops.decode_sample import Filters, kept_scores
from hf_fuse.ops.decode_sample import reference as sample_reference
from hf_fuse.ops.decode_select import workspace

INF = float("inf")
FILTERS = {
    "none": Filters(),
    "temperature": Filters(temperature=0.7),
    "hot": Filters(temperature=30.0),
    "cold": Filters(temperature=1e-3),
    "k=1": Filters(top_k=1),
    "k=50": Filters(top_k=50),
    "k=all": Filters(top_k=10**6),
    "p=0": Filters(top_p=0.0),
    "p=0.001": Filters(top_p=0.001),
    "p=0.9": Filters(top_p=0.9),
    "p=0.99999": Filters(top_p=0.99999),
    "min_p": Filters(min_p=0.05),
    "k and p": Filters(top_k=50, top_p=0.9),
    "all": Filters(1.3, 0.8, 40, 0.95, 0.02),
    "reward": Filters(penalty=0.8, top_p=0.5),
}
each_filters = pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)


@dataclass(frozen=True)
class Sample:
    """One call and what it starts from."""

    logits: Tensor
    noise: Tensor | None
    filters: Filters = Filters()  # noqa: RUF009  (frozen)
    seen: Tensor | None = None
    finished: Sequence[int] = ()
    eos: Sequence[int] = ()
    pad: int = 0
    min_step: int = 0
    step: int = 0

    def __call__(self, function: Callable[..., None] = decode_sample, **options: Any) -> dict:
        """Everything that is written, on the CPU."""
        batch, device = len(self.logits), self.logits.device

        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        written = {
            "token": ints(*[-7] * batch),
            "finished": ints(*(self.finished or [0] * batch)),
            "history": torch.full((4, batch), -7, device=device),
            "length": ints(17),
            "step": ints(self.step),
        }
        scratch = () if function is sample_reference else (workspace(batch, device),)
        seen = None if self.seen is None else self.seen.clone()
        function(
            *written.values(), *scratch, seen, self.logits, self.noise,
            self.filters.tensor().to(device), ints(*self.eos), self.pad, self.min_step, **options,
        )  # fmt: skip
        if seen is not None:
            written["seen"] = seen
        return {name: tensor.cpu() for name, tensor in written.items()}

    def scores(self) -> Tensor:
        """Before top_k, top_p and min_p, as torch computes them on this device."""
        only = replace(self.filters, top_k=0, top_p=1.0, min_p=0.0).tensor()
        eos = torch.tensor(self.eos, dtype=torch.int64, device=self.logits.device)
        return kept_scores(self.logits, self.seen, only, eos if self.step < self.min_step else None)

    def check(self) -> dict:
        """A token that may be kept wins the race against all that must be; the rest follows."""
        written = self(backend="cuda")
        assert_equal(written["history"][self.step], written["token"])
        assert (written["length"].item(), written["step"].item()) == (18, self.step + 1)
        assert self.noise is not None
        finished = self.finished or [0] * len(self.logits)
        rows = zip(self.scores(), self.noise, written["token"].tolist(), strict=True)
        for b, (scores, noise, token) in enumerate(rows):
            if finished[b]:
                assert token == self.pad
                continue
            must, may = kept(scores.double(), self.filters)
            race = (scores.double() - scores.double().max()).exp() / noise.double()
            assert may[token], f"sequence {b}: token {token} is not kept"
            assert race[token] >= race[must].max() * (1 - 1e-5), f"sequence {b}: token {token}"
        if self.seen is not None:
            tokens = written["token"].to(self.seen.device)[:, None]
            expected = self.seen.scatter(1, tokens.clamp(0, self.seen.shape[1] - 1), 1)
            assert_equal(written["seen"], expected.cpu())
        return written


def kept(scores: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """Of one sequence's scores, float64 [vocab]: what must be kept and what may be."""
    must = may = torch.ones_like(scores, dtype=torch.bool)
    if filters.top_k:
        least = scores.topk(min(filters.top_k, len(scores))).values[-1]
        must, may = scores >= least, scores >= least - 2**-25
    ratio = (scores - scores.max()).exp()
    if filters.top_p < 1:
        weights = torch.where(must, ratio, 0.0)
        # The higher index first among equals.
        order = len(scores) - 1 - scores.flip(0).sort(descending=True, stable=True).indices
        above = torch.empty_like(weights)
        above[order] = (weights[order].cumsum(0) - weights[order]) / weights.sum()
        above[order[0]] = -1.0  # one is always kept
        must, may = must & (above < filters.top_p - 2e-6), may & (above < filters.top_p + 2e-6)
    if filters.min_p:
        must = must & (ratio >= filters.min_p * (1 + 1e-5))
        may = may & (ratio >= filters.min_p * (1 - 1e-5))
    return must, may


def make(
    vocab: int, batch: int, filters: Filters, device: str, spread: float = 2.5, **more: Any
) -> Sample:
    logits = spread * torch.randn(batch, vocab, device=device)
    noise = torch.empty_like(logits).exponential_()
    seen = None
    if filters.penalty != 1:
        seen = (torch.rand(batch, vocab, device=device) < 0.1).to(torch.uint8)
    return Sample(logits, noise, filters, seen, **more)


# The reference


def processors_of(filters: Filters) -> LogitsProcessorList:
    made: list[Any] = []
    if filters.penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(filters.penalty))
    if filters.temperature != 1:
        made.append(TemperatureLogitsWarper(filters.temperature))
    if filters.top_k:
        made.append(TopKLogitsWarper(filters.top_k))
    if filters.top_p < 1:
        made.append(TopPLogitsWarper(filters.top_p))
    if filters.min_p:
        made.append(MinPLogitsWarper(filters.min_p))
    return LogitsProcessorList(made)


@each_filters
@pytest.mark.parametrize("vocab", [1, 31, 5000])
def test_reference_keeps_what_transformers_processors_keep(
    vocab: int, filters: Filters, device: str
) -> None:
    logits = 2.5 * torch.randn(3, vocab, device=device)
    ids = torch.randint(vocab, (3, 40), device=device)
    seen = torch.zeros(3, vocab, dtype=torch.uint8, device=device).scatter_(1, ids, 1)
    expected = processors_of(filters)(ids, logits)
    assert_equal(kept_scores(logits, seen, filters.tensor(), None), expected)


@each_filters
def test_reference_draws_what_multinomial_draws(filters: Filters, device: str) -> None:
    call = make(5000, 4, filters, device)
    scores = kept_scores(call.logits, call.seen, filters.tensor(), None)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        torch.manual_seed(seed)
        noise = torch.empty_like(call.logits).exponential_()
        drawn = replace(call, noise=noise)(sample_reference)["token"]
        assert drawn.tolist() == expected.tolist()


# The kernel


@pytest.mark.cuda
@each_filters
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("vocab", [1, 31, 1000, 50257, 128256, 151936, 300000])
def test_every_vocabulary_batch_and_filter(vocab: int, batch: int, filters: Filters) -> None:
    make(vocab, batch, filters, "cuda", step=2).check()


@pytest.mark.cuda
@each_filters
@pytest.mark.parametrize("spread", [0.05, 40.0])
def test_flat_and_steep_distributions(spread: float, filters: Filters) -> None:
    make(128256, 2, filters, "cuda", spread).check()
    far = make(50257, 2, filters, "cuda", spread)
    replace(far, logits=far.logits - 100).check()


@pytest.mark.cuda
@each_filters
def test_many_sequences(filters: Filters) -> None:
    make(128256, 70, filters, "cuda").check()


@pytest.mark.cuda
@each_filters
@pytest.mark.parametrize("vocab", [1000, 50257])
def test_ties_and_infinite_logits(vocab: int, filters: Filters) -> None:
    call = make(vocab, 3, filters, "cuda")
    coarse = call.logits.bfloat16().float()
    replace(call, logits=coarse).check()
    replace(call, logits=torch.where(torch.rand_like(coarse) < 0.6, -INF, coarse)).check()


@pytest.mark.cuda
@pytest.mark.parametrize("vocab", [1000, 128256])
def test_of_equal_logits_the_higher_indices_reach_top_p(vocab: int) -> None:
    filters, found = Filters(top_p=0.5), []
    for _ in range(40):
        call = make(vocab, 3, filters, "cuda")
        found += replace(call, logits=torch.full_like(call.logits, 0.37)).check()["token"].tolist()
    assert vocab // 2 - 1 <= min(found) < 0.55 * vocab
    assert max(found) > 0.95 * vocab


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["k=1", "p=0", "cold"])
def test_what_leaves_one_token_leaves_the_largest(name: str) -> None:
    call = make(128256, 5, FILTERS[name], "cuda")
    assert_equal(call(backend="cuda")["token"], call.logits.argmax(-1).cpu())


@pytest.mark.cuda
@pytest.mark.parametrize("vocab", [1000, 128256])
def test_scores_a_bit_apart_are_told_apart(vocab: int) -> None:
    call = make(vocab, 3, Filters(top_k=1), "cuda")
    best = call.logits.max() + 1
    call.logits[:, 5], call.logits[:, 900] = best, best.nextafter(best + 1)
    assert call(backend="cuda")["token"].tolist() == [900] * 3


@pytest.mark.cuda
@each_filters
def test_the_same_input_gives_the_same_bits(filters: Filters) -> None:
    call = make(128256, 3, filters, "cuda", spread=0.3)
    first = call(backend="cuda")
    for _ in range(5):
        again = call(backend="cuda")
        for name, tensor in first.items():
            assert_equal(again[name], tensor, name)


@pytest.mark.cuda
@pytest.mark.parametrize("vocab", [31, 50257])
def test_without_noise_the_largest_penalised_score(vocab: int) -> None:
    call = replace(make(vocab, 5, Filters(penalty=1.4), "cuda"), noise=None)
    call.logits[1, 7] = call.logits[1, 3] = 50.0
    call.logits[2, 4] = NAN
    for name, tensor in call(sample_reference).items():
        assert_equal(call(backend="cuda")[name], tensor, name)


@pytest.mark.cuda
def test_finished_sequences_eos_and_the_least_step() -> None:
    call = make(50257, 5, Filters(1.2, top_k=3), "cuda")
    call.logits[:, 3], call.logits[:, 500] = 90.0, 80.0
    call = replace(call, finished=(0, 1, 0, 0, 1), eos=(3, 9), pad=77, step=1, min_step=2)
    early = call.check()
    assert early["token"].tolist() == [500, 77, 500, 500, 77]
    assert early["finished"].tolist() == [0, 1, 0, 0, 1]
    late = replace(call, min_step=1).check()
    assert late["token"].tolist() == [3, 77, 3, 3, 77]
    assert late["finished"].tolist() == [1, 1, 1, 1, 1]


@pytest.mark.cuda
@each_filters
def test_no_distribution_gives_minus_1(filters: Filters) -> None:
    call = make(50257, 4, filters, "cuda")
    call.logits[0, 40000], call.logits[1, 7], call.logits[2] = NAN, INF, -INF
    written = call(backend="cuda")
    assert written["token"].tolist()[:3] == [-1] * 3 == call(sample_reference)["token"].tolist()[:3]
    assert written["token"][3] >= 0
    assert written["history"][0].tolist() == written["token"].tolist()


@pytest.mark.cuda
def test_many_calls_with_the_same_workspace() -> None:
    call = make(128256, 3, Filters(top_k=20, top_p=0.9), "cuda")
    ints = {n: torch.zeros(s, dtype=torch.int64, device="cuda") for n, s in SHAPES.items()}
    scratch, eos = workspace(3, call.logits.device), ints["step"].new_tensor([])
    filters = call.filters.tensor().cuda()
    expected = call(backend="cuda")["token"].tolist()
    for _ in range(10):
        decode_sample(*ints.values(), scratch, None, call.logits, call.noise, filters, eos, 0)
    assert ints["history"][:10].tolist() == [expected] * 10
    assert (ints["length"].item(), ints["step"].item()) == (10, 10)


SHAPES: dict[str, Any] = {"token": 3, "finished": 3, "history": (10, 3), "length": 1, "step": 1}
ERRORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "bfloat16_noise": ("noise", Tensor.bfloat16, r"noise must have the dtype of logits, float32"),
    "narrow_noise": ("noise", lambda t: t[:, :5], r"noise must have the shape of logits"),
    "strided_noise": ("noise", lambda t: t.t().contiguous().t(), r"noise must be a contiguous"),
    "bool_seen": ("seen", Tensor.bool, r"seen must be uint8, got bool"),
    "narrow_seen": ("seen", lambda t: t[:, :5], r"seen must be a contiguous \[3, 8\]"),
    "float32_filters": ("filters", Tensor.float, r"filters must be 5 float64 in a row, got float"),
    "four_filters": ("filters", lambda t: t[:4], r"filters must be 5 float64 in a row"),
    "filters_on_cpu": ("filters", Tensor.cpu, r"filters must be on the device of logits"),
    "int32_token": ("token", Tensor.int, r"token must be 3 int64 in a row, got int32"),
}


def arguments() -> dict[str, Any]:
    ints = {n: torch.zeros(s, dtype=torch.int64, device="cuda") for n, s in SHAPES.items()}
    logits = torch.randn(3, 8, device="cuda")
    seen = torch.zeros(3, 8, dtype=torch.uint8, device="cuda")
    return {
        **ints,
        "scratch": workspace(3, logits.device),
        "seen": seen,
        "logits": logits,
        "noise": torch.ones_like(logits),
        "filters": Filters().tensor().cuda(),
        "eos": ints["step"].new_tensor([5]),
        "pad": 0,
    }


@pytest.mark.cuda
@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_tensor(case: str) -> None:
    name, change, message = ERRORS[case]
    given = arguments()
    given[name] = change(given[name])
    with pytest.raises(RuntimeError, match=rf"hf_fuse decode_sample: {message}"):
        decode_sample(**given, backend="cuda")


@pytest.mark.cuda
def test_a_vocabulary_too_large_is_refused() -> None:
    with pytest.raises(RuntimeError, match="at most 4194304 logits a sequence, got 4194305"):
        make(4194305, 1, Filters(), "cuda")(backend="cuda")


@pytest.mark.cuda
def test_opcheck() -> None:
    for optional in ({}, {"seen": None}, {"noise": None}):
        given = {**arguments(), **optional}
        torch.library.opcheck(registered("cuda").decode_sample.default, tuple(given.values()))


# Which calls of generate the device takes


def selection(
    *processors: Any, do_sample: bool = True, output_scores: bool = False, eos: Sequence[int] = (5,)
) -> Selection | None:
    config = SimpleNamespace(do_sample=do_sample, output_scores=output_scores)
    return selection_of(processors, config, eos, 9, torch.device("cuda"))


def test_selection_of_transformers_own_processors() -> None:
    eos = torch.tensor([5])
    penalty, least = RepetitionPenaltyLogitsProcessor(1.3), MinLengthLogitsProcessor(12, eos)
    filters = Filters(1.3, 0.5, 7, 0.9, 0.1)
    found = selection(penalty, least, *processors_of(replace(filters, penalty=1.0)))
    assert found == Selection(True, 3, filters, 0)
    assert selection() == Selection(True)
    assert selection(penalty, do_sample=False) == Selection(False, 0, Filters(1.3), 0)


def test_selection_of_anything_else_is_left_to_transformers() -> None:
    hot, top_k = TemperatureLogitsWarper(2.0), TopKLogitsWarper(7)
    assert selection(NoRepeatNGramLogitsProcessor(2)) is None
    assert selection(top_k, hot) is None
    assert selection(top_k, top_k) is None
    assert selection(hot, output_scores=True) is None
    assert selection(hot, do_sample=False) is None
    assert selection(TopPLogitsWarper(0.5, min_tokens_to_keep=2)) is None
    assert selection(TopKLogitsWarper(7, filter_value=-100.0)) is None
    assert selection(MinLengthLogitsProcessor(12, torch.tensor([5])), eos=[4]) is None
    assert selection(RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=10)) is None
    config = SimpleNamespace(do_sample=True, output_scores=False)
    assert selection_of([hot], config, [5], 9, torch.device("cpu")) is None


@pytest.mark.parametrize("ignored", [None, 0, 4, torch.tensor([0, 3, 9])])
def test_seen_is_what_the_penalty_counts(ignored: Any, device: str) -> None:
    logits = 2.5 * torch.randn(3, 50, device=device)
    ids = torch.randint(50, (3, 9), device=device)
    beyond = ids.clone()  # the head; transformers' own processor takes none in all versions
    beyond[:, 5] = 57
    ids[:, 5] = ids[:, 8]
    try:
        processor = RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=ignored)
    except ValueError:
        pytest.skip("this transformers takes one length for all prompts")
    found = selection(processor)
    assert found is not None
    sampler = Sampler(logits, draws=False, penalises=True)
    sampler.begin(found, beyond)
    expected = processor(ids, logits)
    assert_equal(kept_scores(logits, sampler.seen, sampler.filters, None), expected)
