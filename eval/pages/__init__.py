"""Results as one HTML page: `--html FILE` of every evaluation, `hf-fuse report RESULT.json ...`.

A page is made from the JSON documents that `--json` saves and from nothing else, so that a saved
result gives the page that its run gave.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_fuse.eval.environment import UsageError
from hf_fuse.eval.pages.answers import lm_eval, perplexity
from hf_fuse.eval.pages.decoding import decode, sweep
from hf_fuse.eval.pages.kernels import ops, step
from hf_fuse.eval.pages.parts import Document, Markup, model_of, page, table, tag, together
from hf_fuse.eval.pages.streaming import streaming

# The kinds of results in the page's order: heading and content. The demo is two of them.
SECTIONS: dict[str, tuple[str, Callable[[Sequence[Document]], Markup]]] = {
    "decode": ("Decoding", decode),
    "decode sweep": ("Decoding over batches and prompts", sweep),
    "perplexity": ("Perplexity and KL", perplexity),
    "streaming": ("Streaming", streaming),
    "lm-eval": ("lm-eval", lm_eval),
    "step": ("A decoding step, kernel by kernel", step),
    "kernels": ("Ops", ops),
}


def load(path: str | Path) -> dict[str, Any]:
    """A result that `--json` saved. Raises UsageError for what is none, or not whole."""
    try:
        # NaN, which Python's json takes and JSON does not know, is null in what we save.
        found = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON") from error
    known = sorted(("demo", *SECTIONS))
    kind = found.get("kind") if isinstance(found, dict) else None
    if kind not in known:
        raise UsageError(f"{path} is no result of hf-fuse, whose kinds are {', '.join(known)}")
    try:
        render([found])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"{path} is not a whole {kind} result ({reason})") from error
    return found


def render(documents: Sequence[Document]) -> str:
    """One page of all results, a section for each kind."""
    single = [part for document in documents for part in _parts(document)]
    sections = []
    for kind, (heading, content) in SECTIONS.items():
        found = [document for document in single if document["kind"] == kind]
        if found:
            sections.append((kind.replace(" ", "-"), heading, content(found)))
    sections.append(("environment", "Environment", _environment(documents)))
    models = list(dict.fromkeys(model_of(d) for d in single if "model" in d))
    named = f": {models[0]}" if len(models) == 1 else ""
    devices = ", ".join(dict.fromkeys(d["device"] for d in documents))
    days = sorted({d["date"][:10] for d in documents})
    return page(
        f"hf_fuse evaluation{named}",
        f"{devices} · {' to '.join(days[:: len(days) - 1 or 1])}",
        sections,
    )


def _parts(document: Document) -> Iterator[Document]:
    """The demo is a perplexity and a decoding result of each of its models."""
    if document["kind"] != "demo":
        yield document
        return
    for row in document["rows"]:
        shared = {"model": row["model"], "parameters": row["parameters"]}
        for kind in ("perplexity", "decode"):
            yield {**document, **shared, "kind": kind, "result": row[kind]}


def _environment(documents: Sequence[Document]) -> Markup:
    """Each environment with the commands that ran in it."""
    runs: dict[tuple[str, str, str], list[list[str]]] = {}
    for d in documents:
        versions = ", ".join(f"{name} {version}" for name, version in d["versions"].items())
        where = (d["device"], d["platform"], versions)
        runs.setdefault(where, []).append([d["date"], d["command"]])
    parts = []
    for (device, system, versions), rows in runs.items():
        parts += [tag("h3", device), tag("p", f"{system}; {versions}", class_="soft")]
        parts.append(table(f"Commands on {device}", ["date", "command"], sorted(rows), words=True))
    return together(*parts)
