"""The answers at the sizes of real models, four layers of each, in fp32."""

from __future__ import annotations

from answers import check, check_forward, check_greedy, gradients
from models import REAL_SHAPES, Case, cases, tokens_for

QUICK = ("SmolLM-135M", "pythia-160m", "gpt2")


@cases(REAL_SHAPES, slow=tuple(c.id for c in REAL_SHAPES if c.id not in QUICK))
def test_real_shapes_cut_to_four_layers(case: Case, device: str) -> None:
    model = case.build(device=device)
    check_forward(model)
    ids = tokens_for(model, 2, 40)
    check(model, lambda m: gradients(m, input_ids=ids))
    check_greedy(model, "dynamic")
    check_greedy(model, "static")
