"""lm-eval (0.4.13) over patched models: the model name `hf-fuse`, and both sides compared.

Importing this module registers the name, for lm-eval's own functions:

    import hf_fuse.eval.harness
    lm_eval.simple_evaluate("hf-fuse", "pretrained=gpt2", tasks=["lambada_openai"])

`main` is `hf-fuse lm-eval`: lm-eval's own command line with that model and the task hf_fuse_text.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval._cli.run import Run
from lm_eval.api.registry import register_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.huggingface import HFLM

import hf_fuse
from hf_fuse.cli import OneLineParser, not_empty
from hf_fuse.eval.environment import UsageError, without_folder
from hf_fuse.eval.loading import checked_device, first_line, resolve
from hf_fuse.eval.report import prepare_outputs, table, write_result

TASKS = Path(__file__).resolve().parent / "tasks"
TOLERANCE = {torch.float32: 1e-5}  # of a metric, relative
TOLERANCE_OF_OTHERS = 5e-4


@register_model("hf-fuse")
class FusedLM(HFLM):
    """lm-eval's HFLM with its model patched, so that log-likelihoods, rolling perplexity and
    generate_until run fused.

    model_args: HFLM's, and `fuse_backend`, the `backend` of `hf_fuse.patch`. `pretrained` may be
    tiny-llama, tiny-gpt_neox or tiny-gpt2, too. `softmax_dtype` is float32 where not given: HFLM
    adds log-probabilities up in the model's dtype, and in bfloat16 a sum of 1000 moves by steps
    of 4, more than what --compare looks for.
    """

    def __init__(
        self,
        pretrained: Any,
        *args: Any,
        fuse_backend: str = "auto",
        softmax_dtype: Any = "float32",
        **kwargs: Any,
    ):
        model = resolve(pretrained) if isinstance(pretrained, str) else pretrained
        super().__init__(model, *args, softmax_dtype=softmax_dtype, **kwargs)
        self.fuse_backend = fuse_backend
        self.patch()

    def patch(self) -> None:
        """Put the model on fused kernels; it is from the start."""
        hf_fuse.patch(self.model, backend=self.fuse_backend)

    def unpatch(self) -> None:
        """Take the model off them."""
        hf_fuse.unpatch(self.model)


@dataclass(frozen=True)
class Metric:
    """A task's metric without and with hf_fuse."""

    task: str
    name: str
    unpatched: float
    patched: float

    @property
    def difference(self) -> float:
        """|patched - unpatched| over the larger of the two."""
        larger = max(abs(self.unpatched), abs(self.patched))
        return abs(self.patched - self.unpatched) / larger if larger else 0.0


def main(given: Sequence[str]) -> int:
    """`hf-fuse lm-eval`. Returns 1 when --compare finds a metric past the tolerance. Raises
    UsageError for what the user can mend.
    """
    own, rest = _own_parser().parse_known_args(given)
    if (own.json or own.html) and not own.compare:
        raise UsageError("--json and --html need --compare; lm-eval's --output_path saves its run")
    prepare_outputs(own.json, own.html)
    try:
        arguments = _their_arguments(own, rest)
        if not own.compare:
            Run._execute(arguments)
            return 0
        config = EvaluatorConfig.from_cli(arguments)
        metrics, model = compare(config)
    except (UsageError, torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # lm-eval, transformers and the hub raise many kinds
        raise UsageError(f"lm-eval: {first_line(error)}") from error
    tolerance = (
        TOLERANCE.get(model.dtype, TOLERANCE_OF_OTHERS) if own.tolerance is None else own.tolerance
    )
    past = [metric for metric in metrics if not metric.difference <= tolerance]
    rows = [
        [m.task, m.name, f"{m.unpatched:.6g}", f"{m.patched:.6g}", f"{m.difference:.1e}"]
        for m in metrics
    ]
    print(table(["task", "metric", "unpatched", "patched", "difference"], rows))
    verdict = f"{len(past)} of {len(metrics)} metrics differ" if past else "no metric differs"
    print(f"\n{verdict} by more than {tolerance:g}, relative")
    facts = {
        "model": without_folder(config.model_args["pretrained"]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tolerance": tolerance,
        "metrics": [vars(metric) for metric in metrics],
        "report": hf_fuse.report(model).to_dict(),
    }
    write_result(
        "lm-eval", facts, device=arguments.device, arguments=["lm-eval", *given],
        json_path=own.json, html_path=own.html,
    )  # fmt: skip
    return 1 if past else 0


def compare(config: EvaluatorConfig) -> tuple[list[Metric], Any]:
    """Every metric of the tasks without and with hf_fuse, by one model, loaded once; that model,
    patched.
    """
    manager = config.process_tasks(config.metadata)
    sizes = {"batch_size": config.batch_size, "max_batch_size": config.max_batch_size}
    model = FusedLM.create_from_arg_obj(config.model_args, {**sizes, "device": config.device})
    sides = []
    for turn in (model.unpatch, model.patch):
        turn()
        found = simple_evaluate(
            model=model,
            tasks=config.tasks,
            task_manager=manager,
            **{name: getattr(config, name) for name in _SHARED},
        )
        sides.append(found["results"])
    metrics = [
        Metric(task, name.removesuffix(",none"), values[name], sides[1][task][name])
        for task, values in sides[0].items()
        for name in values
        if isinstance(values[name], float) and "_stderr" not in name
    ]
    return metrics, model.model


_SHARED = (
    "num_fewshot", "batch_size", "limit", "samples", "system_instruction", "apply_chat_template",
    "fewshot_as_multiturn", "gen_kwargs", "confirm_run_unsafe_code", "metadata",
)  # fmt: skip


def _own_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="hf-fuse lm-eval", allow_abbrev=False,
        description="lm-eval with the model hf-fuse: these options and all of `lm-eval run`.",
    )  # fmt: skip
    parser.add_argument(
        "--compare", action="store_true",
        help="also without hf_fuse; exit code 1 when a metric differs by more than the tolerance",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=_tolerance, metavar="X",
        help="relative; default 1e-5 in float32, else 5e-4",
    )  # fmt: skip
    parser.add_argument(
        "--text", metavar="FILE", type=not_empty, help="what the task hf_fuse_text scores"
    )
    for option, what in (("--json", "numbers"), ("--html", "a page")):
        parser.add_argument(
            option, metavar="FILE", type=not_empty, help=f"with --compare: save {what}"
        )
    return parser


def _tolerance(value: str) -> float:
    if not float(value) >= 0:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 0 up")
    return float(value)


def _their_arguments(own: argparse.Namespace, rest: Sequence[str]) -> argparse.Namespace:
    """What lm-eval's own parser makes of the rest."""
    parser = OneLineParser(prog="hf-fuse lm-eval")
    Run.create(parser.add_subparsers())
    arguments = parser.parse_args(["run", "--model", "hf-fuse", *rest])
    if arguments.model != "hf-fuse":
        raise UsageError(f"lm-eval: the model is hf-fuse, got --model {arguments.model}")
    arguments.device = str(checked_device(arguments.device))  # HFLM goes on without the device
    size = str(getattr(arguments, "batch_size", 1))
    if not re.fullmatch(r"auto(:\d+)?|[1-9]\d*", size):
        raise UsageError(
            f"lm-eval: --batch_size must be a number from 1 up or auto[:N], got {size}"
        )
    if arguments.include_path is None:
        arguments.include_path = str(TASKS)
    if own.text:
        arguments.metadata = {**(arguments.metadata or {}), "text": own.text}
    return arguments
