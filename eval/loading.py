"""Finds a model by path, by hub name or by the name of a tiny model that ships with the package."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_fuse
from hf_fuse.decode.loop import Generates
from hf_fuse.decode.obstacles import spec_of
from hf_fuse.decode.spec import DecoderSpec, Unsuited
from hf_fuse.eval.environment import UsageError
from hf_fuse.eval.shapes import PREFIX, build_shape
from hf_fuse.eval.text import Text, TextError

MODELS = Path(__file__).resolve().parent / "models"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def tiny_models() -> dict[str, Path]:
    """The shipped models: `tiny-llama` and so on, with their folders."""
    return {
        f"tiny-{path.parent.name}": path.parent for path in sorted(MODELS.glob("*/config.json"))
    }


def default_device() -> str:
    """`cuda` where torch sees a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None, progress: bool = True
) -> tuple[nn.Module, Any]:
    """The model in evaluation mode on `device`, and its tokenizer; None for a shape.

    Args:
        name: a folder, a hub name, the name of a tiny model, or `shape:` and one of
            `hf_fuse.eval.shapes.SHAPES`.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own.
        device: default the GPU where there is one.
        progress: let transformers show its progress bars, on a terminal.

    Raises:
        UsageError: when the model, its tokenizer or the device is not there, or hf_fuse does not
            know the architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    target = checked_device(device)
    if name.startswith(PREFIX):
        return build_shape(name.removeprefix(PREFIX), dtype, target), None
    path = resolve(name)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        with _quiet(progress):
            _check_architecture(name, AutoConfig.from_pretrained(path))
            tokenizer = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=wanted)
    except UsageError:
        raise
    except Exception as error:  # transformers and the hub raise many kinds
        raise UsageError(f"cannot load the model {name}: {first_line(error)}") from error
    return model.to(target).eval(), tokenizer


def check_patchable(model: nn.Module, **patch_options: Any) -> None:
    """Patch with verification, and take it off again. Raises UsageError with patch's own reason."""
    try:
        with hf_fuse.patched(model, **patch_options):
            pass
    except Exception as error:  # whatever stops the patch, the user reads its first line
        raise UsageError(f"cannot patch the model: {first_line(error)}") from error


def encode(tokenizer: Any, text: Text, max_tokens: int | None = None) -> Tensor:
    """Token ids of the text, int64 [num_tokens], at most `max_tokens`."""
    ids = tokenizer(text.text, verbose=False).input_ids[:max_tokens]
    if len(ids) < 2:
        raise TextError(f"the text {text.name} has fewer than 2 tokens")
    return torch.tensor(ids)


def prompts(tokenizer: Any, text: Text, batch_size: int, prompt_length: int) -> Tensor:
    """Consecutive pieces of the text, int64 [batch_size, prompt_length]; a short one repeats.
    Without a tokenizer, random tokens.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(2, 30000, (batch_size, prompt_length), generator=generator)
    ids, count = encode(tokenizer, text), batch_size * prompt_length
    return ids.repeat(-(-count // len(ids)))[:count].view(batch_size, prompt_length)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with what follows its colon; the error's name where it
    has none, or only a key.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        return " ".join([type(error).__name__, *lines[:1]])
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """No progress bars in logs and pipes, no line for each retry of the hub."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    if not (progress and sys.stderr.isatty()):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def resolve(name: str) -> str:
    """The folder of a tiny model or of a path, else `name`, which the hub may know. Raises
    UsageError for a folder or a tiny model that is not there.
    """
    tiny = tiny_models()
    exists = os.path.exists(os.path.expanduser(name))  # a Path raises for a name that is too long
    if name in tiny and not exists:
        return str(tiny[name])
    if name.startswith("tiny-") and "/" not in name and not exists:
        raise UsageError(f"there is no tiny model {name}; there are {', '.join(tiny)}")
    path = Path(name).expanduser()
    looks_like_a_path = path.is_absolute() or name.startswith(".") or name.count("/") > 1
    if looks_like_a_path and not exists:
        raise UsageError(f"there is no model folder {name}")
    return str(path) if exists else name


def _check_architecture(name: str, config: Any) -> None:
    known = sorted(hf_fuse.supported())
    kind = config.model_type
    if kind not in known:
        raise UsageError(
            f"{name} is a {kind} model, which hf_fuse does not know; it knows {', '.join(known)}"
        )


def checked_device(name: str | None) -> torch.device:
    """The device of that name, or the default one. Raises UsageError where it is not there."""
    try:
        device = torch.device(name or default_device())
    except RuntimeError as error:
        raise UsageError(f"there is no device {name!r}: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"the device {name!r} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"torch sees no device {device}: it sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def decoder_spec_of(model: nn.Module) -> DecoderSpec:
    """A patched model as the decode engine runs it. Raises UsageError where it does not."""
    try:
        if not isinstance(model, Generates):
            raise Unsuited("the op decode was left out, or the model has no language head")
        return spec_of(model)
    except Unsuited as error:
        raise UsageError(f"the decode engine does not take this model: {error}") from error
