"""patch, unpatch and what tells about them.

A patched model is the same object with the same parameters: each decoder layer, norm, attention and
MLP that an architecture names (hf_fuse/patches/) has its `__class__` swapped for a subclass and one
entry in its `__dict__`. `unpatch` takes both back. No class and no module global of transformers is
touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TypeVar

from torch import nn

from hf_fuse import jit, ops, sources
from hf_fuse.decode.loop import forget
from hf_fuse.modules import STATE, Fused, state_of
from hf_fuse.ops._library import BACKENDS, kernels
from hf_fuse.patches import ARCHITECTURES, BY_BACKBONE
from hf_fuse.patches.architecture import Architecture
from hf_fuse.reporting import RECORD, PatchRecord, Report, build_report
from hf_fuse.verify import Snapshot, VerificationError, compare, snapshot

Model = TypeVar("Model", bound=nn.Module)


class UnsupportedModelError(ValueError):
    """The model, or a part of it, is not one hf_fuse knows; the message says which are."""


def patch(
    model: Model,
    *,
    ops: Iterable[str] | None = None,
    backend: str = "auto",
    strict: bool = True,
    verify: bool = True,
) -> Model:
    """Put `model` on fused kernels, in place, and return it.

    ops: which ops to use, of "add_norm", "rotary", "gated_act", "bias_act", and "decode" for the
        decode engine under `generate`; None for all that the architecture has. Naming only ops it
        cannot use is an UnsupportedModelError.
    backend: "auto" takes the kernels of the device each tensor is on, or the plain-torch reference
        where they could not be built (with one warning); "cuda" and "cpu" insist on those kernels;
        "reference" runs the reference.
    strict: raise UnsupportedModelError for a model, or a part, that is not supported; False leaves
        it as it is, and the report says so.
    verify: run a small input through the model before and after, and raise VerificationError, with
        the model as it was, when they disagree by more than its dtype explains.

    The model may be any transformers model with a supported backbone inside: bare, with a task
    head, wrapped by PEFT or by torch.compile (which then recompiles). Patching again with the same
    arguments does nothing; with others it patches anew. Raises ValueError for unknown arguments and
    for a backend that does not fit the model's device, RuntimeError when the backend asked for
    cannot be built. After any error the model is as it was.
    """
    names = check_arguments(model, ops, backend)
    backbones = _backbones(model, names, strict)
    if _already(backbones, names, backend):
        return model
    _prepare_kernels(backbones, backend)
    earlier = _records(model)
    unpatch(model)
    try:
        before = {id(b): snapshot(b) for b in backbones} if verify else {}
        for backbone in backbones:
            _patch_backbone(model, backbone, BY_BACKBONE[type(backbone)], names, backend)
            if verify:
                _verify(backbone, before[id(backbone)])
    except BaseException:
        unpatch(model)
        _patch_again(model, earlier)
        raise
    return model


def unpatch(model: Model) -> Model:
    """Give back the model as it was before `patch`: classes, `__dict__` and results. A model not
    patched stays as it is.
    """
    swapped = [module for module in model.modules() if STATE in module.__dict__]
    for module in swapped:
        _refuse_wrapped(module)
    for module in swapped:
        forget(module)
        _restore(module)
    for module in model.modules():
        module.__dict__.pop(RECORD, None)
    return model


@contextmanager
def patched(model: Model, **arguments: object) -> Iterator[Model]:
    """`with patched(model):` patches for the block. A model that was patched before comes out
    patched as before.
    """
    earlier = _records(model)
    patch(model, **arguments)  # type: ignore[arg-type]
    try:
        yield model
    finally:
        unpatch(model)
        _patch_again(model, earlier)


def is_patched(model: nn.Module) -> bool:
    """Whether any part of `model` is patched."""
    return bool(_records(model))


def report(model: nn.Module) -> Report:
    """What is fused in `model`, on which backend, and what was left alone and why. `print` it or
    take `.to_dict()`.
    """
    return build_report(model)


def supported() -> dict[str, tuple[str, ...]]:
    """The supported model types (every task head on them included) and the ops each can use."""
    return {architecture.model_type: architecture.ops for architecture in ARCHITECTURES}


def check_arguments(model: nn.Module, names: Iterable[str] | None, backend: str) -> frozenset[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"hf_fuse.patch: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    if isinstance(names, str):
        raise TypeError(
            f"hf_fuse.patch: ops must be a collection of names such as {{{names!r}}}, got the "
            f"string {names!r}"
        )
    chosen = frozenset(ops.NAMES if names is None else names)
    unknown = sorted(chosen - set(ops.NAMES))
    if unknown or not chosen:
        raise ValueError(
            f"hf_fuse.patch: ops must be among {', '.join(ops.NAMES)}, got {unknown or 'none'}"
        )
    if backend not in BACKENDS:
        raise ValueError(
            f"hf_fuse.patch: backend must be one of {', '.join(BACKENDS)}, got {backend!r}"
        )
    return chosen


def _backbones(model: nn.Module, names: frozenset[str], strict: bool) -> list[nn.Module]:
    found, reasons = [], []
    for name, module in model.named_modules():
        architecture = BY_BACKBONE.get(type(module))
        if architecture is None:
            continue
        reason = architecture.refusal(module)
        if reason is None and names.isdisjoint(architecture.ops):
            reason = (
                f"{architecture.model_type} uses none of the ops {', '.join(sorted(names))}; "
                f"it can use {', '.join(architecture.ops)}"
            )
        if reason is None:
            found.append(module)
        else:
            reasons.append(f"{name or 'the model'} ({type(module).__name__}): {reason}")
    if strict and reasons:
        raise UnsupportedModelError(f"hf_fuse.patch: {'; '.join(reasons)}")
    if strict and not found:
        known = ", ".join(f"{a.model_type} ({a.backbone.__name__})" for a in ARCHITECTURES)
        raise UnsupportedModelError(
            f"hf_fuse.patch: {type(model).__name__} holds no backbone that hf_fuse knows. Known: "
            f"{known}, each with every task head."
        )
    return found


def _already(backbones: list[nn.Module], names: frozenset[str], backend: str) -> bool:
    wanted = (tuple(sorted(names)), backend)
    records = [b.__dict__.get(RECORD) for b in backbones]
    return bool(records) and all(r is not None and (r.ops, r.backend) == wanted for r in records)


def _prepare_kernels(backbones: list[nn.Module], backend: str) -> None:
    devices = {p.device.type for b in backbones for p in b.parameters()}
    if backend in ("cpu", "cuda"):
        wrong = sorted(devices - {backend, "meta"})
        if wrong:
            raise ValueError(
                f"hf_fuse.patch: backend {backend!r} was asked for, "
                f"but the model is on {', '.join(wrong)}"
            )
        if not kernels(backend):
            raise RuntimeError(
                f"hf_fuse.patch: backend {backend!r} could not be built: {jit.failures[backend]}"
            )
    elif backend == "auto":
        for device in sorted(devices & {"cpu", "cuda"}):
            kernels(device)


def _patch_backbone(
    model: nn.Module,
    backbone: nn.Module,
    architecture: Architecture,
    names: frozenset[str],
    backend: str,
) -> None:
    record = PatchRecord(
        architecture.model_type,
        tuple(sorted(names)),
        backend,
        unknown_sources=sources.unknown(architecture, names),
    )
    owners = ((n, m) for n, m in model.named_modules() if backbone in m.children())
    for name, module in (*owners, *backbone.named_modules()):
        for swap in architecture.swaps:
            if type(module) is not swap.original:
                continue
            reason = f"{swap.op} was not asked for" if swap.op not in names else swap.refuse(module)
            if reason is None:
                _swap(module, swap.fused, Fused(swap.original, swap.op, backend))
            else:
                record.skipped[name] = (swap.op, reason)
    _link_norms(backbone, architecture)
    backbone.__dict__[RECORD] = record


def _records(model: nn.Module) -> list[tuple[nn.Module, PatchRecord]]:
    """The patched backbones in `model`, with what each was patched with."""
    return [(m, m.__dict__[RECORD]) for m in model.modules() if RECORD in m.__dict__]


def _patch_again(model: nn.Module, earlier: list[tuple[nn.Module, PatchRecord]]) -> None:
    """Put a patch that was taken off back on, as it was recorded."""
    for backbone, record in earlier:
        architecture = BY_BACKBONE[type(backbone)]
        _patch_backbone(model, backbone, architecture, frozenset(record.ops), record.backend)
        backbone.__dict__[RECORD] = record


def _link_norms(backbone: nn.Module, architecture: Architecture) -> None:
    layers = list(getattr(backbone, architecture.layers))
    final_norm = getattr(backbone, architecture.final_norm)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if STATE in layer.__dict__:
            state_of(layer).next_norms = (
                (final_norm,) if following is None else architecture.opening_norms(following)
            )


def _swap(module: nn.Module, fused: type[nn.Module], state: Fused) -> None:
    module.__dict__[STATE] = state
    module.__class__ = fused
    _rebind_hooked_forward(module)


def _refuse_wrapped(module: nn.Module) -> None:
    state = module.__dict__[STATE]
    wrapped = type(module) is not state.original and state.original not in type(module).__bases__
    if wrapped:
        raise RuntimeError(
            f"hf_fuse.unpatch: {type(module).__qualname__} was made from a patched layer (by "
            "FSDP2, say); undo that first"
        )


def _restore(module: nn.Module) -> None:
    state = module.__dict__.pop(STATE)
    module.__class__ = state.original
    _rebind_hooked_forward(module)


def _rebind_hooked_forward(module: nn.Module) -> None:
    """accelerate keeps the forward it wrapped in the instance; point it at the present class."""
    if isinstance(module.__dict__.get("_old_forward"), MethodType):
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)


def _verify(backbone: nn.Module, before: Snapshot | None) -> None:
    record = backbone.__dict__[RECORD]
    if before is None:
        record.verified = "not run: the parameters hold no data to run on"
        return
    after = snapshot(backbone)
    assert after is not None
    record.verified = compare(before, after)


__all__ = [
    "UnsupportedModelError",
    "VerificationError",
    "is_patched",
    "patch",
    "patched",
    "report",
    "supported",
    "unpatch",
]
