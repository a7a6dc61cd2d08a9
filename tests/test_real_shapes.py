"""The answers at the sizes of real models, four layers of each, in fp32."""

from __future__ import annotations

import pytest
from answers import check, check_forward, check_greedy, gradients
from models import Case, each_real_shape, tokens_for


@each_real_shape
def test_forward_and_gradients_at_real_shapes(case: Case, device: str) -> None:
    model = case.build(device=device)
    check_forward(model)
    ids = tokens_for(model, 2, 40)
    check(model, lambda m: gradients(m, input_ids=ids))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@each_real_shape
def test_64_greedy_tokens_at_real_shapes(case: Case, cache: str, device: str) -> None:
    check_greedy(case.build(device=device), cache)
