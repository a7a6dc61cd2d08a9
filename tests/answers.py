"""How the tests run a model and compare what it gives patched and unpatched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from helpers import count_ops, largest_error, relative_error, strange
from models import architecture_of, layers_of, norms_of, padded, tokens_for
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import hf_fuse
from hf_fuse.decode.loop import engine_of
from hf_fuse.modules import state_of

FP32 = 1e-4
GREEDY = {"do_sample": False, "disable_compile": True}
Run = Callable[[nn.Module], Any]


def flatten(value: Any, name: str = "output") -> Iterator[tuple[str, Any]]:
    """Every tensor of a model output, a dict or a sequence, with where it was found."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from flatten(item, f"{name}[{i}]")
    elif isinstance(value, DynamicCache | StaticCache):
        for i, layer in enumerate(value.layers):
            yield from flatten((layer.keys, layer.values), f"{name}.layer{i}")
    else:
        yield name, value


def assert_same(actual: Any, expected: Any, tolerance: float = FP32) -> None:
    """The same structure; integers, NaN and Inf alike; floats within `tolerance`, relative, both in
    the norm and at the worst element.
    """
    got, want = dict(flatten(actual)), dict(flatten(expected))
    assert got.keys() == want.keys()
    for name, a in got.items():
        b = want[name]
        if not isinstance(b, Tensor):
            assert a == b, name
            continue
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), name
        if not b.is_floating_point():
            assert torch.equal(a, b), name
            continue
        finite = b.isfinite()
        assert torch.equal(strange(a), strange(b)), f"{name}: NaN or Inf differ"
        for measure in (relative_error, largest_error):
            error = measure(a[finite], b[finite])
            assert error <= tolerance, f"{name}: {measure.__name__} {error:.2e}"


def both(model: nn.Module, run: Run, **options: Any) -> tuple[Any, Any]:
    """What `run` gives on the patched model, and on the unpatched one; the fused add has run."""
    expected = run(model)
    with hf_fuse.patched(model, **options), count_ops() as calls:
        actual = run(model)
    assert calls["hf_fuse::add_norm"] > 0
    return actual, expected


def check(model: nn.Module, run: Run, tolerance: float = FP32, **options: Any) -> None:
    """`run` gives the same patched and unpatched."""
    assert_same(*both(model, run, **options), tolerance)


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    """The logits of one forward without gradients."""
    with torch.no_grad():
        return model(**inputs).logits


def gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor | None]:
    """The gradient of every parameter, of the loss of one batch, with a fixed seed for dropout."""
    inputs.setdefault("labels", inputs.get("input_ids"))
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    model(**inputs).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def checkpoint(model: nn.Module, reentrant: bool, **options: Any) -> None:
    """Turn gradient checkpointing on; skips the test where this transformers lacks an option."""
    # The newer name, where there is one.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    for name in options.keys() - inspect.signature(enable).parameters.keys():
        pytest.skip(f"this transformers has no {name}")
    enable({"use_reentrant": reentrant}, **options)


def generate(model: nn.Module, ids: Tensor, new: int = 64, **options: Any) -> Tensor:
    """`new` greedy tokens for a left-padded batch."""
    inputs = padded(ids, "left")
    return model.generate(**inputs, min_new_tokens=new, max_new_tokens=new, **GREEDY, **options)


def norm_calls(model: nn.Module) -> int:
    """How many add_norm calls one forward of a patched model makes: one a norm, or a pair."""
    parallel = getattr(layers_of(model)[0], "use_parallel_residual", False)
    return len(layers_of(model)) + 1 if parallel else len(norms_of(model))


def rotated(model: nn.Module, whole: bool) -> int:
    """How many layers have rotary positions and see all tokens, or only a window of them."""
    attentions = [getattr(layer, "self_attn", layer) for layer in layers_of(model)]
    of_all = getattr(model.config, "sliding_window", None) is not None
    types = getattr(model.config, "layer_types", None) or [
        "sliding_attention" if of_all else "full_attention" for _ in attentions
    ]
    return sum(
        getattr(a, "use_rope", True) and (kind == "full_attention") == whole
        for a, kind in zip(attentions, types, strict=True)
    )


def check_forward(model: nn.Module) -> None:
    """Logits, loss, cache and every hidden state are the same."""
    ids = tokens_for(model, 3, 37)

    def run(model: nn.Module) -> Any:
        with torch.no_grad():
            return model(input_ids=ids, labels=ids, output_hidden_states=True)

    actual, expected = both(model, run)
    assert_same(actual, expected)
    assert len(actual.hidden_states) == len(layers_of(model)) + 1


def check_greedy(model: nn.Module, cache: str, new: int = 64) -> None:
    """The same greedy tokens, from one call of each op a step and layer."""
    ids = tokens_for(model, 3, 11)
    expected = generate(model, ids, new, cache_implementation=cache)
    layers = set(architecture_of(model).ops) - {"decode"}  # transformers' own loop
    with hf_fuse.patched(model, ops=layers), count_ops() as calls:
        actual = generate(model, ids, new, cache_implementation=cache)
    assert torch.equal(actual, expected)
    assert actual.shape[1] == ids.shape[1] + new
    assert calls["hf_fuse::add_norm"] == new * norm_calls(model)
    if "rotary" in architecture_of(model).ops:
        whole, sliding = (rotated(model, whole=w) for w in (True, False))
        static = whole if cache == "static" else 0
        assert calls["hf_fuse::rotary_cache_"] == new * static
        assert calls["hf_fuse::rotary"] == new * (whole + sliding - static)


def steps_taken(model: nn.Module) -> int:
    """How many tokens the engine selected in the last call; 0 without an engine."""
    with engine_of(model) as engine:
        return 0 if engine is None else int(engine.step)


def left_to_transformers(model: nn.Module) -> list[str]:
    """Why calls of `generate` on the patched ForCausalLM ran transformers' own loop."""
    return [note.removeprefix("generate: ") for note in state_of(model).notes]
