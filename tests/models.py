"""The models the tests run: tiny random ones for every variant, the trained ones, and real shapes
cut to four layers.

Random weights are drawn so that mistakes show: norm weights and biases are not the ones and zeros
transformers starts with, and the matrices are large enough that attention is not uniform and the
greedy token is not a tie.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_fuse.eval.loading import MODELS
from hf_fuse.eval.shapes import LLAMA_3_2_ROPE
from hf_fuse.patches import BY_BACKBONE
from hf_fuse.patches.architecture import Architecture

VOCAB = 131
# Generation goes on to the length asked for.
NO_END = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}

CLASSES = {
    "llama": "Llama",
    "gpt_neox": "GPTNeoX",
    "gpt2": "GPT2",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "granite": "Granite",
    "smollm3": "SmolLM3",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
}
TINY: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": VOCAB,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
    },
    "gpt_neox": {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 160,
        "hidden_act": "gelu",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 72,
        "n_layer": 3,
        "n_head": 6,
        "n_inner": 100,
        "n_positions": 160,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
# LLaMA's relatives: heads that the decode kernels take on a GPU, and windows that are soon full.
_FAMILY = {**TINY["llama"], "hidden_size": 96, "head_dim": 16, "pad_token_id": 0}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_SLIDING = {"sliding_window": 12, "layer_types": _WINDOWS}
TINY |= {
    "mistral": {**_FAMILY, "sliding_window": 12},
    "qwen2": {**_FAMILY, "use_sliding_window": True, **_SLIDING},
    "qwen3": {
        **_FAMILY,
        "intermediate_size": 104,
        "head_dim": 32,
        "use_sliding_window": True,
        **_SLIDING,
    },
    "granite": {
        **_FAMILY,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.3,
        "logits_scaling": 1.5,
    },
    "smollm3": {
        **_FAMILY,
        "use_sliding_window": True,
        "no_rope_layers": [1, 0, 1],
        **_SLIDING,
    },
    "phi3": {
        **_FAMILY,
        "sliding_window": 12,
        "original_max_position_embeddings": 160,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "olmo2": _FAMILY,
    "gemma2": {
        **_FAMILY,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 30.0,
        **_SLIDING,
    },
    "gemma3_text": {
        **_FAMILY,
        "query_pre_attn_scalar": 20,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": False,
        **_SLIDING,
    },
}
FAMILY_TYPES = tuple(TINY)[3:]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.2},
    "gpt_neox": {"attention_dropout": 0.2, "hidden_dropout": 0.2},
    "gpt2": {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2},
    **{name: {"attention_dropout": 0.2} for name in FAMILY_TYPES},
}
DROPOUT["phi3"]["resid_pdrop"] = 0.2


@dataclass(frozen=True)
class Case:
    """A model to build: an architecture and what its config differs in from `base`."""

    id: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    scale: float = 0.25  # standard deviation of the matrices
    trained: bool = False

    def config(self, **changes: Any) -> PretrainedConfig:
        """The config, with `changes` on top."""
        values = {**NO_END, **TINY[self.model_type], **self.changes, **changes}
        for name in ("layer_types", "no_rope_layers"):  # one for each layer
            if values.get(name) is None:
                continue
            values[name] = list(islice(cycle(values[name]), values["num_hidden_layers"]))
        name = "Gemma3Text" if self.model_type == "gemma3_text" else CLASSES[self.model_type]
        return getattr(transformers, f"{name}Config")(**values)

    def build(
        self,
        head: str = "ForCausalLM",
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attention: str | None = None,
        seed: int = 0,
        **changes: Any,
    ) -> PreTrainedModel:
        """The model in evaluation mode; the same arguments give the same weights."""
        attention = attention or self.attention
        if self.trained:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                MODELS / self.model_type, dtype=dtype, attn_implementation=attention, **changes
            )
            model.generation_config.eos_token_id = None
            return model.to(device).eval()
        name = {"": "Model", "ForCausalLM": CAUSAL[self.model_type]}.get(head, head)
        if self.model_type == "gemma3_text" and name != "ForCausalLM":
            name = f"Text{name}"
        config = self.config(**changes)
        config._attn_implementation = attention
        torch.manual_seed(seed)
        model = getattr(transformers, CLASSES[self.model_type] + name)(config)
        centre = 0.0 if self.model_type.startswith("gemma") else 1.0
        randomize(model, self.scale, seed, centre)
        return model.to(dtype).to(device).eval()


CAUSAL = {name: "LMHeadModel" if name == "gpt2" else "ForCausalLM" for name in CLASSES}

LLAMA = Case("llama", "llama")
GPT_NEOX = Case("gpt_neox", "gpt_neox")
GPT2 = Case("gpt2", "gpt2")
PLAIN = (LLAMA, GPT_NEOX, GPT2)
# LLaMA's relatives. Gemma 2 caps its scores, which torch's sdpa cannot: by default transformers has
# eager attention there, or an older one sdpa without the cap.
_CAPPED = "sdpa" if transformers.Gemma2PreTrainedModel._supports_sdpa else "eager"
FAMILY = tuple(
    Case(name, name, attention=_CAPPED if name == "gemma2" else "sdpa") for name in FAMILY_TYPES
)

GPT_NEOX_SERIAL = Case("gpt_neox-serial", "gpt_neox", {"use_parallel_residual": False})
VARIANTS = (
    *PLAIN,
    Case("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama-scaled_rope", "llama", {"rope_parameters": LLAMA3_ROPE}),
    Case("llama-gelu", "llama", {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    GPT_NEOX_SERIAL,
    Case("gpt_neox-no_attention_bias", "gpt_neox", {"attention_bias": False}),
    Case("gpt2-inverse_layer_scale", "gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    Case("gpt2-upcast", "gpt2", {"reorder_and_upcast_attn": True}, attention="eager"),
)
TRAINED = tuple(Case(f"{c.id}-trained", c.id, trained=True) for c in PLAIN)


def _llama_shape(name: str, hidden: int, inner: int, heads: int, kv: int, **more: Any) -> Case:
    sizes = {"hidden_size": hidden, "intermediate_size": inner}
    counts = {"num_attention_heads": heads, "num_key_value_heads": kv}
    return _real("llama", name, {"num_hidden_layers": 4, **sizes, **counts, **more})


def _gpt_neox_shape(name: str, hidden: int, heads: int) -> Case:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": heads}
    return _real("gpt_neox", name, {"num_hidden_layers": 4, **sizes})


def _gpt2_shape(name: str, hidden: int, heads: int) -> Case:
    return _real("gpt2", name, {"n_layer": 4, "n_embd": hidden, "n_inner": None, "n_head": heads})


def _real(model_type: str, name: str, changes: dict[str, Any]) -> Case:
    # The vocabulary is cut to 4096: the embedding and the head are not what is fused.
    positions = {"n_positions" if model_type == "gpt2" else "max_position_embeddings": 1024}
    return Case(name, model_type, {"vocab_size": 4096, **positions, **changes}, scale=0.04)


REAL_SHAPES = (
    _llama_shape("SmolLM-135M", 576, 1536, 9, 3, rms_norm_eps=1e-5),
    _llama_shape("TinyLlama-1.1B", 2048, 5632, 32, 4, rms_norm_eps=1e-5),
    _llama_shape("Llama-3.2-1B", 2048, 8192, 32, 8, rope_parameters=LLAMA_3_2_ROPE),
    _gpt_neox_shape("pythia-160m", 768, 12),
    _gpt_neox_shape("pythia-410m", 1024, 16),
    _gpt_neox_shape("pythia-1b", 2048, 8),
    _gpt2_shape("gpt2", 768, 12),
    _gpt2_shape("gpt2-medium", 1024, 16),
    _gpt2_shape("gpt2-large", 1280, 20),
    _gpt2_shape("gpt2-xl", 1600, 25),
)


def heads_of_16(case: Case) -> Case:
    """The tiny case with heads that the decode kernels take on a GPU: a multiple of 8."""
    sizes = {"llama": {"hidden_size": 96}, "gpt2": {"n_embd": 96}}.get(case.model_type, {})
    return case if case.trained else replace(case, changes={**sizes, **case.changes})


def cases(*groups: tuple[Case, ...], slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Parametrize `case` over the groups; ids named in `slow` carry that mark."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(c, id=c.id, marks=pytest.mark.slow if c.id in slow else ())
            for group in groups
            for c in group
        ],
    )


QUICK_SHAPES = ("SmolLM-135M",)
each_real_shape = cases(
    REAL_SHAPES, slow=tuple(c.id for c in REAL_SHAPES if c.id not in QUICK_SHAPES)
)


def randomize(model: nn.Module, scale: float, seed: int = 0, centre: float = 1.0) -> None:
    """Random parameters: norm weights around `centre`, other vectors small, matrices of std
    `scale`.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(dict(model.named_parameters()).items()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * scale)
            else:
                parameter.copy_(noise * 0.2 + (centre if name.endswith("weight") else 0.0))


def architecture_of(model: nn.Module) -> Architecture:
    """How hf_fuse describes the model's backbone."""
    return BY_BACKBONE[type(backbone_of(model))]


def backbone_of(model: nn.Module) -> nn.Module:
    """The decoder stack inside `model`."""
    return next(m for m in model.modules() if type(m) in BY_BACKBONE)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of `model`."""
    return getattr(backbone_of(model), architecture_of(model).layers)


def norms_of(model: nn.Module) -> list[nn.Module]:
    """Every norm of `model`: each layer's, in order, then the final one."""
    final = getattr(backbone_of(model), architecture_of(model).final_norm)
    known = type(final)
    return [*(m for layer in layers_of(model) for m in layer.modules() if type(m) is known), final]


def tokens_for(model: PreTrainedModel, batch: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids [batch, length] on the model's device, never the padding token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)
    return ids.to(model.device)


def padded(ids: Tensor, side: str) -> dict[str, Tensor]:
    """The batch with row i shortened by 3 i tokens, padded on `side`, as model inputs."""
    mask = torch.ones_like(ids)
    for i in range(len(ids)):
        count = 3 * i
        rows = slice(0, count) if side == "left" else slice(ids.shape[1] - count, None)
        mask[i, rows] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
