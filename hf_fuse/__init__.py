"""hf_fuse puts a Hugging Face transformers model on fused kernels, in place, and takes it off
again.

import hf_fuse

hf_fuse.patch(model)            # the same model, faster
print(hf_fuse.report(model))    # what was fused, where it runs, what was left alone and why
hf_fuse.unpatch(model)          # bit for bit the model it was
"""

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
from hf_fuse.report import Report

__version__ = "0.1.0"

__all__ = [
    "Report",
    "UnsupportedModelError",
    "VerificationError",
    "__version__",
    "is_patched",
    "patch",
    "patched",
    "report",
    "supported",
    "unpatch",
]
