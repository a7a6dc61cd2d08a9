"""The architectures hf_fuse knows, one file each."""

from hf_fuse.patches import (
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from hf_fuse.patches.architecture import Architecture

ARCHITECTURES: tuple[Architecture, ...] = (
    gpt_neox.ARCHITECTURE,
    llama.ARCHITECTURE,
    gpt2.ARCHITECTURE,
    mistral.ARCHITECTURE,
    qwen2.ARCHITECTURE,
    qwen3.ARCHITECTURE,
    granite.ARCHITECTURE,
    smollm3.ARCHITECTURE,
    phi3.ARCHITECTURE,
    olmo2.ARCHITECTURE,
    gemma2.ARCHITECTURE,
    gemma3.ARCHITECTURE,
)
BY_BACKBONE: dict[type, Architecture] = {a.backbone: a for a in ARCHITECTURES}
