"""The command line: `hf-fuse ppl | tpot | lm-eval | step | kernels | demo | report |
doctor | supported`.

What a user can mend (a wrong name, a missing file or package) is one line on stderr, exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

# What is heavy (torch, transformers) is imported by the commands, so that --help answers at once.
if TYPE_CHECKING:
    from hf_fuse.eval.text import Text

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_BACKENDS = ("auto", "cuda", "cpu", "reference")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns 0; 1 when the demo's answers or lm-eval's metrics differ or the doctor finds no CPU
    kernels; 2 for an error that the user can mend. Options that cannot be parsed exit with 2, as
    argparse does.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if given[:1] == ["lm-eval"]:  # most of its options are lm-eval's own
            return _lm_eval(given[1:])
        arguments = _parser().parse_args(given, argparse.Namespace(given=given))
        return arguments.run(arguments)
    except ValueError as error:
        if not _is_usage_error(error):
            raise
        print(f"hf-fuse: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        print("hf-fuse: there is not enough memory for this", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _ppl(arguments: argparse.Namespace) -> int:
    from hf_fuse.eval.environment import UsageError
    from hf_fuse.eval.loading import encode
    from hf_fuse.eval.perplexity import evaluate_perplexity
    from hf_fuse.eval.report import perplexity_table
    from hf_fuse.eval.shapes import PREFIX

    if arguments.streaming:
        return _streaming(arguments)
    if arguments.model.startswith(PREFIX):
        raise UsageError(f"{arguments.model} has random weights and no tokenizer: no perplexity")
    text, model, tokenizer, options = _prepare(arguments)
    positions = _positions(model)
    context = arguments.context or min(1024, positions)
    stride = arguments.stride or max(1, context // 2)
    if not 2 <= context <= positions:
        raise UsageError(f"--context must be from 2 to the model's {positions}, got {context}")
    if stride > context:
        raise UsageError(f"--stride must be at most the context of {context}, got {stride}")
    result = evaluate_perplexity(
        model,
        encode(tokenizer, text, arguments.max_tokens),
        context=context,
        stride=stride,
        batch_size=arguments.batch_size,
        reference=not arguments.no_reference,
        through=arguments.through,
        **options,
    )
    print(f"{arguments.model}, {_dtype_of(model)}, {text.name}\n\n{perplexity_table(result)}")
    facts = {"text": text.name, "text_digest": text.digest, "result": result.to_dict()}
    _save(arguments, model, "perplexity", facts, perplexities={_short(arguments): result})
    return 0


def _streaming(arguments: argparse.Namespace) -> int:
    from hf_fuse.eval.environment import UsageError
    from hf_fuse.eval.loading import encode, prompts
    from hf_fuse.eval.report import streaming_table
    from hf_fuse.eval.streaming import evaluate_streaming

    given = {"--context": arguments.context, "--stride": arguments.stride}
    for option in (name for name, value in given.items() if value is not None):
        raise UsageError(f"--streaming reads one long text: {option} does not go with it")
    text, model, tokenizer, options = _prepare(arguments)
    name = text.name
    if tokenizer is None:  # random weights: only the times mean something
        ids, name = prompts(None, text, 1, arguments.max_tokens or 20000)[0], "random tokens"
    else:
        ids = encode(tokenizer, text, arguments.max_tokens)
    result = evaluate_streaming(model, ids, **arguments.streaming, **options)
    print(f"{arguments.model}, {_dtype_of(model)}, {name}\n\n{streaming_table(result)}")
    facts = {"text": name, "text_digest": text.digest, "result": result.to_dict()}
    _save(arguments, model, "streaming", facts, streaming=result)
    return 0


def _tpot(arguments: argparse.Namespace) -> int:
    from hf_fuse.eval.decode import evaluate_decode, read_bandwidth
    from hf_fuse.eval.environment import UsageError
    from hf_fuse.eval.loading import prompts
    from hf_fuse.eval.report import decode_table, sweep_table

    text, model, tokenizer, options = _prepare(arguments)
    positions, wanted = _positions(model), max(arguments.prompt_length) + arguments.new_tokens
    if wanted > positions:
        raise UsageError(
            f"--prompt-length plus --new-tokens is {wanted}, over the model's {positions} positions"
        )
    device = _device_of(model)
    results: list[Any] = []
    bandwidth = read_bandwidth(device)
    for length in arguments.prompt_length:
        for batch_size in arguments.batch_size:
            result = evaluate_decode(
                model,
                prompts(tokenizer, text, batch_size, length).to(device),
                new_tokens=arguments.new_tokens,
                repeats=arguments.repeats,
                static_compile=arguments.compiled,
                sample=arguments.sample,
                read_bandwidth=bandwidth,
                **options,
            )
            results.append(result)
    head = f"{arguments.model}, {_dtype_of(model)}\n\n"
    facts: dict[str, Any] = {} if bandwidth is None else {"read_bytes_per_s": bandwidth}
    if len(results) == 1:
        print(f"{head}{decode_table(result)}")
        facts["result"] = result.to_dict()
        _save(arguments, model, "decode", facts, decodes={_short(arguments): result})
    else:
        print(f"{head}{sweep_table(results)}")
        facts["results"] = [r.to_dict() for r in results]
        _save(arguments, model, "decode sweep", facts, sweep=results)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from hf_fuse.eval.demo import run_demo

    rows = run_demo(
        device=arguments.device,
        dtype=arguments.dtype,
        backend=arguments.backend,
        json_path=arguments.json,
        png_path=arguments.png,
        html_path=arguments.html,
        arguments=arguments.given,
    )
    return 0 if all(row.same_answers for row in rows) else 1


def _doctor(arguments: argparse.Namespace) -> int:
    from hf_fuse import jit

    checks = jit.doctor()
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'ok' if check.ok else 'NO'}  {check.name.ljust(width)}  {check.detail}")
        if check.fix:
            print(f"    {' ' * width}  {check.fix}")
    return 0 if any(check.ok for check in checks if check.name == "cpu kernels") else 1


def _supported(arguments: argparse.Namespace) -> int:
    import hf_fuse

    print("\n".join(sorted(hf_fuse.supported())))
    return 0


def _kernels(arguments: argparse.Namespace) -> int:
    from hf_fuse.eval.kernels import run
    from hf_fuse.eval.report import prepare_outputs

    prepare_outputs(arguments.json, arguments.html)
    run(arguments.only, arguments.given, arguments.json, arguments.html)
    return 0


def _step(arguments: argparse.Namespace) -> int:
    from hf_fuse.eval.environment import UsageError
    from hf_fuse.eval.loading import check_patchable, load_model
    from hf_fuse.eval.report import prepare_outputs
    from hf_fuse.eval.step import ROOM, measure_step, step_table

    prepare_outputs(arguments.json, arguments.html)
    model, _ = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    positions = _positions(model)
    if arguments.context + ROOM > positions:
        raise UsageError(
            f"--context must be at most {positions - ROOM}, {ROOM} below the model's positions, "
            f"got {arguments.context}"
        )
    check_patchable(model, backend=arguments.backend, verify=False)
    result = measure_step(
        model,
        batch_size=arguments.batch_size,
        context=arguments.context,
        backend=arguments.backend,
    )
    print(f"{arguments.model}, {_dtype_of(model)}, {step_table(result)}")
    _save(arguments, model, "step", result.to_dict())
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from hf_fuse.eval.environment import UsageError
    from hf_fuse.eval.pages import load
    from hf_fuse.eval.report import write_html

    if Path(arguments.html).resolve() in [Path(result).resolve() for result in arguments.results]:
        raise UsageError(f"--html {arguments.html} would replace a result that it is made from")
    write_html(arguments.html, [load(path) for path in arguments.results])
    return 0


def _lm_eval(given: Sequence[str]) -> int:
    from hf_fuse.eval.environment import require

    require("lm_eval", "lm-eval", "hf-fuse lm-eval")
    from hf_fuse.eval import harness

    return harness.main(given)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is one --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="hf-fuse", description="Evaluate hf_fuse on a transformers model.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    ppl = _command(commands, "ppl", _ppl, "perplexity, unpatched and patched, on the same windows")
    _model_options(ppl)
    _count(ppl, "--context", None, "tokens a window reads; default the model's, at most 1024")
    _count(ppl, "--stride", None, "tokens a window moves; default half the context")
    _count(ppl, "--batch-size", 4, "windows a forward pass")
    _count(ppl, "--max-tokens", None, "use only the first N tokens of the text")
    ppl.add_argument(
        "--through", choices=("forward", "decode"), default="forward",
        help="how the patched model reads: at once, or token by token by the decode engine",
    )  # fmt: skip
    ppl.add_argument(
        "--streaming", type=_stream, metavar="sinks=4,window=256",
        help="one long text token by token, with attention sinks and with a plain window",
    )  # fmt: skip
    ppl.add_argument("--no-reference", action="store_true", help="skip the fp32 reference")

    kernels = _command(commands, "kernels", _kernels, "each op against its ceiling and its peers")
    kernels.add_argument(
        "--json", metavar="FILE", type=not_empty, help="write the results with their provenance"
    )
    _html_option(kernels)
    kernels.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")

    tpot = _command(commands, "tpot", _tpot, "time to first token and time per output token")
    _model_options(tpot, " or shape:NAME, random weights")
    _counts(tpot, "--prompt-length", 128, "tokens a row; several for a sweep")
    _count(tpot, "--new-tokens", 128, "tokens to generate a row", least=2)
    _counts(tpot, "--batch-size", 1, "rows; several for a sweep")
    _count(tpot, "--repeats", 3, "timed turns a variant")
    tpot.add_argument(
        "--compiled", action="store_true", help="also transformers' static cache, compiled (GPU)"
    )
    tpot.add_argument(
        "--sample", action="store_true",
        help="also the patched model with temperature 0.8, top-k 50, top-p 0.95",
    )  # fmt: skip

    step = _command(commands, "step", _step, "one decoding step, kernel by kernel")
    _model_argument(step, " or shape:NAME, random weights")
    _count(step, "--batch-size", 1, "rows")
    _count(step, "--context", 128, "tokens before the step")
    _device_options(step, dtype="auto", json=None)
    step.set_defaults(png=None)

    demo = _command(commands, "demo", _demo, "both, over the three tiny models, in one table")
    _run_options(demo, dtype="float32", json="results/demo.json", png="results/demo.png")
    report = _command(commands, "report", _report, "one HTML page of results that --json saved")
    report.add_argument("results", metavar="RESULT.json", nargs="+", help="of any command")
    report.add_argument("--html", metavar="FILE", required=True, help="the page to write")
    commands.add_parser("lm-eval", help="lm-eval's tasks on the patched model, or on both sides")
    _command(commands, "doctor", _doctor, "what is on this machine, and how to mend what is not")
    _command(commands, "supported", _supported, "the architectures that hf_fuse knows")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _model_argument(parser: argparse.ArgumentParser, more: str = "") -> None:
    tiny = "tiny-llama, tiny-gpt_neox, tiny-gpt2"
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=not_empty,
        help=f"a folder, a hub name, or one of {tiny}{more}",
    )


def _model_options(parser: argparse.ArgumentParser, more: str = "") -> None:
    _model_argument(parser, more)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--text", metavar="FILE", type=not_empty, help="a UTF-8 text; default Python's own manual"
    )
    source.add_argument(
        "--dataset", metavar="NAME", type=not_empty, help="of the hub, owner/name[:config]"
    )
    parser.add_argument("--ops", metavar="A,B", help="fuse only these ops, for example add_norm")
    _run_options(parser, dtype="auto", json=None, png=None)


def _run_options(
    parser: argparse.ArgumentParser, *, dtype: str, json: str | None, png: str | None
) -> None:
    _device_options(parser, dtype=dtype, json=json)
    parser.add_argument(
        "--png", metavar="FILE", type=not_empty, default=png, help=f"save a picture; default {png}"
    )


def _device_options(parser: argparse.ArgumentParser, *, dtype: str, json: str | None) -> None:
    parser.add_argument("--dtype", choices=_DTYPES, default=dtype, help=f"default {dtype}")
    parser.add_argument(
        "--device", type=not_empty, help="cpu, cuda or cuda:N; default cuda where there is one"
    )
    parser.add_argument("--backend", choices=_BACKENDS, default="auto", help="default auto")
    parser.add_argument(
        "--json", metavar="FILE", type=not_empty, default=json, help=f"save numbers; default {json}"
    )
    _html_option(parser)


def _html_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--html", metavar="FILE", type=not_empty, help="save a page with plots, one file"
    )


def _count(
    parser: argparse.ArgumentParser, option: str, default: int | None, text: str, least: int = 1
) -> None:
    def count(value: str) -> int:
        return _whole_number(value, least)

    shown = text if default is None else f"{text}; default {default}"
    parser.add_argument(option, type=count, default=default, metavar="N", help=shown)


def _counts(parser: argparse.ArgumentParser, option: str, default: int, text: str) -> None:
    def counts(values: str) -> list[int]:
        return [_whole_number(value, 1) for value in values.split(",")]

    shown = f"{text}: 1,2,4; default {default}"
    parser.add_argument(option, type=counts, default=[default], metavar="N", help=shown)


def not_empty(value: str) -> str:
    """A name or a file as an option's value: an unset variable of a script is not one."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return value


def _stream(value: str) -> dict[str, int]:
    """sinks=N,window=N."""
    given = dict(part.split("=", 1) for part in value.split(",") if "=" in part)
    if len(given) != value.count(",") + 1 or set(given) != {"sinks", "window"}:
        raise argparse.ArgumentTypeError(f"{value!r} is not sinks=N,window=N")
    least = {"sinks": 0, "window": 1}
    return {name: _whole_number(number, least[name]) for name, number in given.items()}


def _whole_number(value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from {least} up")
    return int(value)


def _prepare(arguments: argparse.Namespace) -> tuple[Text, Any, Any, dict[str, Any]]:
    """The text, the model, its tokenizer, and the options for `hf_fuse.patched`.

    Everything that can be wrong is found here, before the long work: the patch is tried, verified.
    """
    from hf_fuse.eval.environment import require
    from hf_fuse.eval.loading import check_patchable, load_model
    from hf_fuse.eval.report import prepare_outputs

    if arguments.png:
        require("matplotlib", "eval", "--png")
    prepare_outputs(arguments.json, arguments.png, arguments.html)
    text = _text(arguments)
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    options: dict[str, Any] = {"backend": arguments.backend}
    if arguments.ops:
        options["ops"] = {op.strip() for op in arguments.ops.split(",") if op.strip()}
    check_patchable(model, **options)
    return text, model, tokenizer, options


def _text(arguments: argparse.Namespace) -> Text:
    from hf_fuse.eval.text import dataset_text, file_text, pydoc_text

    if arguments.text:
        return file_text(arguments.text)
    return dataset_text(arguments.dataset) if arguments.dataset else pydoc_text("held-out")


def _save(
    arguments: argparse.Namespace,
    model: Any,
    kind: str,
    facts: dict[str, Any],
    **drawings: Any,
) -> None:
    from hf_fuse.eval.report import write_png, write_result

    payload = {
        "model": _short(arguments),
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": _dtype_of(model),
        **facts,
    }
    write_result(
        kind, payload, device=_device_of(model), arguments=arguments.given,
        json_path=arguments.json, html_path=arguments.html,
    )  # fmt: skip
    if arguments.png:
        write_png(arguments.png, **drawings)


def _positions(model: Any) -> int:
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


def _device_of(model: Any) -> Any:
    return next(model.parameters()).device


def _dtype_of(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _short(arguments: argparse.Namespace) -> str:
    from hf_fuse.eval.environment import without_folder

    return without_folder(arguments.model)


def _is_usage_error(error: ValueError) -> bool:
    from hf_fuse.eval.environment import UsageError

    return isinstance(error, UsageError)


def _is_out_of_memory(error: Exception) -> bool:
    from hf_fuse.decode.engine import out_of_memory

    return isinstance(error, MemoryError) or out_of_memory(error)


if __name__ == "__main__":
    sys.exit(main())
