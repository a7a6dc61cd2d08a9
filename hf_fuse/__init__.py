"""hf_fuse puts a Hugging Face transformers model on fused kernels, in place, and takes it off
again.

import hf_fuse

hf_fuse.patch(model)            # the same model, faster
print(hf_fuse.report(model))    # what was fused, where it runs, what was left alone and why
hf_fuse.unpatch(model)          # bit for bit the model it was
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_fuse.auto import register, registered, unregister
    from hf_fuse.patching import (
        UnsupportedModelError,
        VerificationError,
        is_patched,
        patch,
        patched,
        report,
        supported,
        unpatch,
    )
    from hf_fuse.reporting import Report
    from hf_fuse.streaming import StreamingCache

__version__ = "0.1.0"

__all__ = [
    "Report",
    "StreamingCache",
    "UnsupportedModelError",
    "VerificationError",
    "__version__",
    "is_patched",
    "patch",
    "patched",
    "register",
    "registered",
    "report",
    "supported",
    "unpatch",
    "unregister",
]
_ELSEWHERE = {
    **dict.fromkeys(("register", "registered", "unregister"), "hf_fuse.auto"),
    "StreamingCache": "hf_fuse.streaming",
}


def __getattr__(name: str) -> Any:
    """Imports torch and transformers when something is used, so that `hf-fuse --help` is quick."""
    if name in __all__:
        where = _ELSEWHERE.get(name, "hf_fuse.patching")
        return getattr(import_module(where), name)
    raise AttributeError(f"module 'hf_fuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


if os.environ.get("HF_FUSE_AUTO", "0") not in ("", "0"):
    import_module("hf_fuse.auto").register()
