"""What keeps a model off the decode engine, part by part, and the spec of one that nothing keeps.

The engine runs a model's data and calls none of its modules. So every module must be one whose
forward the spec stands for, and nothing may be hung on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from hf_fuse.decode.spec import DecoderSpec, Unsuited, store_by_rows

# Where the classes come from whose forward a spec stands for. One of another package, or of the
# user, was put in such a class's place to do something else.
KNOWN_SOURCES = (
    "torch.nn.modules.",
    "torch._dynamo.",
    "transformers.models.",
    "transformers.activations",
    "transformers.pytorch_utils",
    "hf_fuse.",
)


def spec_of(model: Any) -> DecoderSpec:
    """The patched `model` as the engine runs it, weights laid out for that. Raises Unsuited, with
    the model as it was.
    """
    for name, reason in obstacles(model):
        raise Unsuited(f"{name}: {reason}")
    spec = _checked_spec(model)
    if any(tensor.dim() == 2 and tensor.stride(1) != 1 for tensor in spec.tensors):
        store_by_rows(model)
        spec = _checked_spec(model)
    return spec


def off_engine(model: Any) -> dict[str, str]:
    """Why no call of `generate` on the patched `model` runs on the engine: what stands in the way
    -> the reason. Empty where nothing does. Changes nothing.
    """
    found = dict(obstacles(model))
    if not found:
        try:
            _checked_spec(model)
        except Unsuited as unsuited:
            found["the model"] = str(unsuited)
    return found


def obstacles(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Each part of `model` that the engine would not run as the modules do, and why."""
    if _has_any_global_hook():
        yield "the model", "global module hooks"
    if "forward" in model.__dict__:
        yield "the model", "a forward of its own"
    yield from _within(model, "")


def _within(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    for name, child in module._modules.items():
        if child is None:
            continue
        source = type(child).__module__
        if not source.startswith(KNOWN_SOURCES):  # and what is inside is its own affair
            yield prefix + name, f"{source}.{type(child).__qualname__}{_advice(child)}"
            continue
        if any(map(_runs, (*child._forward_hooks.values(), *child._forward_pre_hooks.values()))):
            yield prefix + name, "forward hooks"
        if "forward" in child.__dict__:
            yield prefix + name, "a forward of its own"
        for parameter in child._parameters.values():
            if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
                yield prefix + name, f"a weight is a {type(parameter).__name__}"
        yield from _within(child, f"{prefix}{name}.")


def _runs(hook: Callable) -> bool:
    """Whether a hook does something in `generate`. Those that transformers leaves on its layers,
    once hidden states or attentions were asked for, do not unless they are again.
    """
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def _advice(module: nn.Module) -> str:
    removable = hasattr(module, "merge") or hasattr(module, "unload_and_optionally_merge_module")
    return " (merge_and_unload() puts a plain module back)" if removable else ""


def _checked_spec(model: Any) -> DecoderSpec:
    try:
        spec: DecoderSpec = model.decoder_spec()
    except AttributeError as error:  # a module that is not the one transformers puts there
        raise Unsuited(str(error)) from error
    spec.check()
    return spec
