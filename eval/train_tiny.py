"""Trains the tiny models of the demo and tests: LLaMA, GPT-NeoX, GPT-2, 1.9 M parameters each.

    python -m hf_fuse.eval.train_tiny          # all three, on the manual that ships with CPython
    python -m hf_fuse.eval.train_tiny llama --text my.txt --out my-models

A few minutes a model on two CPU cores. Each folder holds the weights in bf16, a byte-level BPE
tokenizer (the same for all), and `training.json` with what was trained on what and the held-out
perplexity before and after.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_fuse.eval.environment import versions
from hf_fuse.eval.perplexity import score
from hf_fuse.eval.text import Text, TextError, file_text, pydoc_text

VOCAB_SIZE, CONTEXT, STRIDE = 2048, 256, 128
END_OF_TEXT, END_OF_TEXT_ID = "<|endoftext|>", 0
MODELS = Path(__file__).resolve().parent / "models"


@dataclass(frozen=True)
class Recipe:
    """Random windows; after a warm-up a cosine from `learning_rate` down to a tenth of it."""

    steps: int = 800
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    warmup_steps: int = 20
    weight_decay: float = 0.5
    seed: int = 0


def llama_config() -> Any:
    """Grouped queries (6 heads share 2 key/value heads), tied embeddings."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )


def gpt_neox_config() -> Any:
    """Pythia's shape: parallel residual, a quarter of each head rotated, a head of its own."""
    from transformers import GPTNeoXConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return GPTNeoXConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=5,
        max_position_embeddings=CONTEXT,
        use_parallel_residual=True,
        rope_parameters=rope,
        tie_word_embeddings=False,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )


def gpt2_config() -> Any:
    """GPT-2's defaults (gelu_new, dropout 0.1, tied embeddings), smaller."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=160,
        n_layer=5,
        n_head=5,
        n_positions=CONTEXT,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": llama_config,
    "gpt_neox": gpt_neox_config,
    "gpt2": gpt2_config,
}


def train_tokenizer(text: str) -> Any:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens: any text round-trips, 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def train(
    architecture: str, token_ids: Tensor, recipe: Recipe, *, progress: bool = True
) -> nn.Module:
    """A model after `recipe.steps` AdamW steps on random windows of `token_ids`, in fp32."""
    model = untrained(architecture, recipe.seed).train()
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(
        _decay_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, recipe))
    for _ in (bar := _bar(recipe.steps, architecture, progress)):
        starts = torch.randint(len(token_ids) - CONTEXT, (recipe.batch_size,), generator=generator)
        inputs = torch.stack([token_ids[s : s + CONTEXT] for s in starts.tolist()])
        loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def untrained(architecture: str, seed: int) -> nn.Module:
    """The model that `train` starts from."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float32).eval()


def build(
    architecture: str, folder: Path, texts: tuple[Text, Text], recipe: Recipe, command: str
) -> dict[str, Any]:
    """Train, save to `folder`, score what was saved on the held-out text. Returns training.json."""
    from transformers import AutoModelForCausalLM

    train_text, held_out = texts
    tokenizer = train_tokenizer(train_text.text)
    train_ids, held_out_ids = (torch.tensor(tokenizer.encode(t.text)) for t in texts)
    before = score(
        untrained(architecture, recipe.seed), held_out_ids, context=CONTEXT, stride=STRIDE
    )
    model: Any = train(architecture, train_ids, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600, which a package keeps
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    after = score(saved, held_out_ids, context=CONTEXT, stride=STRIDE)
    facts = {
        "architecture": architecture,
        "parameters": sum(p.numel() for p in saved.parameters()),
        "text": train_text.name,
        "train_tokens": len(train_ids),
        "held_out_text": held_out.name,
        "held_out_digest": held_out.digest,
        "held_out_tokens": len(held_out_ids),
        "context": CONTEXT,
        "stride": STRIDE,
        "held_out_perplexity_untrained": round(before.perplexity, 3),
        "held_out_perplexity": round(after.perplexity, 3),
        "recipe": vars(recipe),
        "versions": versions(),
        "command": command,
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def main(argv: Sequence[str] | None = None) -> int:
    """Train the models named on the command line, one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_fuse.eval.train_tiny", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "architectures",
        nargs="*",
        metavar="ARCHITECTURE",
        help=f"of {', '.join(CONFIGS)}; default all",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="train on this file's first 90 %%, hold out the rest"
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=MODELS,
        help="default: the package's own models",
    )
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--weight-decay", type=float, default=Recipe.weight_decay, metavar="W")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args(argv)
    unknown = set(arguments.architectures) - set(CONFIGS)
    if unknown:
        parser.error(
            f"unknown architecture {', '.join(sorted(unknown))}; known: {', '.join(CONFIGS)}"
        )
    try:
        texts = _texts(arguments.text)
    except TextError as error:
        parser.error(str(error))
    recipe = Recipe(steps=arguments.steps, weight_decay=arguments.weight_decay, seed=arguments.seed)
    for architecture in arguments.architectures or CONFIGS:
        command = _command(architecture, arguments)
        facts = build(architecture, arguments.out / architecture, texts, recipe, command)
        before, after = facts["held_out_perplexity_untrained"], facts["held_out_perplexity"]
        print(
            f"{architecture}: {facts['parameters']:,} parameters, "
            f"held-out perplexity {before:.1f} -> {after:.2f}",
            flush=True,
        )
    return 0


def _texts(path: str | None) -> tuple[Text, Text]:
    if path is None:
        return pydoc_text("train"), pydoc_text("held-out")
    return file_text(path, "train"), file_text(path, "held-out")


def _command(architecture: str, arguments: argparse.Namespace) -> str:
    """How to train this model again, without the folders of the machine it was trained on."""
    text = f" --text {Path(arguments.text).name}" if arguments.text else ""
    options = f"--steps {arguments.steps} --weight-decay {arguments.weight_decay}"
    command = f"python -m hf_fuse.eval.train_tiny {architecture}{text} {options}"
    return f"{command} --seed {arguments.seed}"


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norm weights do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _cosine(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done))


def _bar(steps: int, architecture: str, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(range(steps), desc=f"train {architecture}", unit="step", disable=not show)


if __name__ == "__main__":
    sys.exit(main())
