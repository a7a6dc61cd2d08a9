"""What a result was measured with: versions, device, date, command; no private folders."""

from __future__ import annotations

import importlib
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import hf_fuse


class UsageError(ValueError):
    """What a user can mend, such as a missing file or package. The message is one line."""


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or raise UsageError that names the pip extra."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise UsageError(
            f'{purpose} needs the {name} package: pip install "hf_fuse[{extra}]"'
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def synchronize(device: torch.device | str) -> None:
    """Wait for the device's queue; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device | str) -> None:
    """Start a new peak on CUDA; a process's peak cannot be reset."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device | str) -> int:
    """CUDA: torch's peak allocation since the reset. CPU: the process's peak resident size."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes


def versions() -> dict[str, str]:
    """Versions of Python and the packages a result depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["transformers"] = metadata.version("transformers")
    found["hf_fuse"] = hf_fuse.__version__
    for peer in ("liger-kernel", "triton"):
        with suppress(metadata.PackageNotFoundError):
            found[peer] = metadata.version(peer)
    return found


def device_name(device: torch.device | str) -> str:
    """The marketing name of the device, with the thread count for a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' if threads != 1 else ''}"


def provenance(device: torch.device | str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """A dict to store beside a result; folders are removed from the command line's `arguments`."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device_name(device),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "command": " ".join(["hf-fuse", *(without_folder(a) for a in arguments)]),
    }


def without_folder(argument: str) -> str:
    """An absolute path's last part, in `a=PATH,b=PATH` too; anything else as it is: results
    travel, home folders do not.
    """
    path = Path(argument).expanduser()
    if path.is_absolute():
        return path.name
    parts = re.split("([,=])", argument)
    if len(parts) == 1:
        return argument
    return "".join(part if part in ",=" else without_folder(part) for part in parts)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
    )
    return model or platform.processor() or platform.machine()
