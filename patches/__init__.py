"""The architectures hf_fuse knows, one file each."""

from hf_fuse.patches import gpt2, gpt_neox, llama
from hf_fuse.patches.architecture import Architecture

ARCHITECTURES: tuple[Architecture, ...] = (
    gpt_neox.ARCHITECTURE,
    llama.ARCHITECTURE,
    gpt2.ARCHITECTURE,
)
BY_BACKBONE: dict[type, Architecture] = {a.backbone: a for a in ARCHITECTURES}
