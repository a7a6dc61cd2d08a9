"""What a patch did, as a dict and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import groupby

import torch
import transformers
from torch import nn

from hf_fuse import jit
from hf_fuse.decode.loop import Generates
from hf_fuse.decode.obstacles import off_engine
from hf_fuse.modules import STATE, Fused
from hf_fuse.patches import BY_BACKBONE

RECORD = "_hf_fuse_patch"  # the key in a patched backbone's __dict__


@dataclass(eq=False)
class PatchRecord:
    """What `patch` was asked for and what it left alone."""

    model_type: str
    ops: tuple[str, ...]
    backend: str
    skipped: dict[str, tuple[str, str]] = field(default_factory=dict)  # module -> (op, reason)
    verified: str = "not asked for"
    unknown_sources: tuple[str, ...] = ()  # classes of transformers that hf_fuse does not know so


@dataclass(frozen=True)
class FusedModule:
    """One swapped module: its name in the model, its class before and now, the op it uses and where
    that runs.
    """

    name: str
    original: str
    fused: str
    op: str
    backend: str


@dataclass(frozen=True)
class Report:
    """The state of a model: `str(report)` for reading, `to_dict()` for programs."""

    model: str
    patched: bool
    model_type: str | None = None
    ops: tuple[str, ...] = ()
    verified: str | None = None
    unknown_sources: tuple[str, ...] = ()
    modules: tuple[FusedModule, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)  # module -> why
    off_engine: dict[str, str] = field(default_factory=dict)  # what keeps generate off it -> why
    left_to_transformers: dict[str, int] = field(default_factory=dict)  # reason -> calls
    failures: dict[str, str] = field(default_factory=dict)  # backend -> why it is not there
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The report as plain data, ready for json."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.patched:
            lines = [f"{self.model}: not patched by hf_fuse"]
            return "\n".join(lines + self._left_alone())
        lines = [f"{self.model} ({self.model_type}): patched with {', '.join(self.ops)}"]
        lines += [f"  verified: {self.verified}"]
        if self.unknown_sources:
            lines.append(
                f"  not the source hf_fuse was tested over, in transformers "
                f"{self.versions['transformers']}: {', '.join(self.unknown_sources)}; "
                f"only the verification vouches for it"
            )
        for (fused, original, op, backend), group in groupby(
            sorted(self.modules, key=_kind), key=_kind
        ):
            names = [m.name for m in group]
            where = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
            lines.append(f"  {op:<10} {original} -> {fused} on {backend}: {where}")
        lines += self._left_alone()
        lines += [
            f"  keeps generate off the decode engine: {reason}: {', '.join(names)}"
            for reason, names in _by_reason(self.off_engine).items()
        ]
        lines += [
            f"  left to transformers: {reason} ({count} calls)"
            for reason, count in self.left_to_transformers.items()
        ]
        lines += [
            f"  {backend} kernels are not there: {why}" for backend, why in self.failures.items()
        ]
        return "\n".join(lines)

    def _left_alone(self) -> list[str]:
        return [
            f"  left alone: {reason}: {', '.join(names)}"
            for reason, names in _by_reason(self.skipped).items()
        ]


def _kind(module: FusedModule) -> tuple[str, str, str, str]:
    return module.fused, module.original, module.op, module.backend


def _by_reason(skipped: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    return {
        reason: names if len(names) < 4 else [f"{names[0]} .. {names[-1]} ({len(names)})"]
        for reason, names in reasons.items()
    }


def build_report(model: nn.Module) -> Report:
    """Read the state of `model` from its modules."""
    name = type(model).__name__
    records = {n: m.__dict__[RECORD] for n, m in model.named_modules() if RECORD in m.__dict__}
    refused = {
        n or "the model": reason
        for n, m in model.named_modules()
        if RECORD not in m.__dict__
        and type(m) in BY_BACKBONE
        and (reason := BY_BACKBONE[type(m)].refusal(m))
    }
    if not records:
        return Report(name, patched=False, skipped=refused)
    first = next(iter(records.values()))
    modules, notes, outside = [], Counter[str](), dict[str, str]()
    for path, module in model.named_modules():
        state = module.__dict__.get(STATE)
        if state is not None:
            where = _backend(module, state)
            modules.append(
                FusedModule(
                    path, state.original.__name__, type(module).__qualname__, state.op, where
                )
            )
            notes.update(state.notes)
        if isinstance(module, Generates):
            outside |= {_joined(path, part): why for part, why in off_engine(module).items()}
    skipped = refused | {
        _joined(prefix, path): f"{op}: {reason}"
        for prefix, record in records.items()
        for path, (op, reason) in record.skipped.items()
    }
    return Report(
        model=name,
        patched=True,
        model_type=first.model_type,
        ops=tuple(dict.fromkeys(sorted(m.op for m in modules))),
        verified=first.verified,
        unknown_sources=first.unknown_sources,
        modules=tuple(modules),
        skipped=skipped,
        off_engine=outside,
        left_to_transformers=dict(notes),
        failures={backend: str(error) for backend, error in jit.failures.items()},
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )


def _joined(prefix: str, path: str) -> str:
    return ".".join(filter(None, (prefix, path)))


def _backend(module: nn.Module, state: Fused) -> str:
    parameter = next(module.parameters(), None)
    device = "cpu" if parameter is None else parameter.device.type
    if device == "meta" and state.backend == "auto":
        return "the kernels of the device its weights come to"
    if state.backend == "reference" or not jit.is_loaded(device):
        return f"the reference ({device})"
    return f"{device} kernels"
