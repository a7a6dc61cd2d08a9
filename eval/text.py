"""Where evaluation text comes from: CPython's own manual, a file, or a dataset.

The manual is `pydoc_data.topics`, the text behind `help("topic")`. It ships with every CPython, so
the demo and the tests have real held-out English without a download. Its wording differs a little
between Python versions; the split does not, because the held-out topics are named here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_fuse.eval.environment import UsageError, require

# Every tenth topic of CPython 3.11's sorted list. Named, so that a Python with one topic more or
# less never trains on what another Python holds out.
HELD_OUT_TOPICS = (
    "assert", "bitwise", "comparisons", "else", "identifiers", "numbers", "slicings",
    "typesmapping",
)  # fmt: skip

Split = Literal["train", "held-out"]


class TextError(UsageError):
    """A text source that is not there or holds nothing; the message is one line."""


@dataclass(frozen=True)
class Text:
    """A named evaluation text; `digest` identifies its content in saved results."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def pydoc_text(split: Split) -> Text:
    """CPython's `pydoc_data.topics`, the training topics or the held-out ones, in sorted order.

    Topics quote each other: the training text leaves out every paragraph that a held-out topic also
    has, and its own repetitions.
    """
    from pydoc_data.topics import topics

    held_out = "\n\n".join(topics[name].strip() for name in HELD_OUT_TOPICS if name in topics)
    if _is_held_out(split):
        return Text("pydoc_data.topics (held-out)", held_out)
    seen = {_words(paragraph) for paragraph in held_out.split("\n\n")}
    kept: list[str] = []
    for name in sorted(set(topics) - set(HELD_OUT_TOPICS)):
        for paragraph in topics[name].strip().split("\n\n"):
            if _words(paragraph) not in seen:
                seen.add(_words(paragraph))
                kept.append(paragraph)
    return Text("pydoc_data.topics (train)", "\n\n".join(kept))


def file_text(path: str | Path, split: Split | None = None) -> Text:
    """A UTF-8 text file: all, or its first 90 % ("train") or last 10 % ("held-out").

    Raises TextError when the file cannot be read or holds nothing.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TextError(f"cannot read the text file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"the text file {path} is not UTF-8: {error.reason}") from error
    if split is not None:
        cut = len(text) * 9 // 10
        text = text[cut:] if _is_held_out(split) else text[:cut]
    if not text.strip():
        raise TextError(f"the text file {path} holds no text")
    return Text(path.name if split is None else f"{path.name} ({split})", text)


def dataset_text(name: str, max_characters: int = 4_000_000) -> Text:
    """The test split of a dataset of the hub, its rows joined by blank lines.

    Args:
        name: `owner/name`, or `owner/name:config`, for example
            `Salesforce/wikitext:wikitext-2-raw-v1`.
        max_characters: rows are read until there are this many.

    Raises:
        UsageError: without the `datasets` package, or (a TextError) when the dataset or a text
            column is not there.
    """
    datasets = require("datasets", "eval", "--dataset")
    path, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(path, config or None)
    except Exception as error:  # datasets raises what its many backends raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise TextError(f"cannot load the dataset {name}: {first}") from error
    rows = next((splits[s] for s in ("test", "validation", "train") if s in splits), None)
    if rows is None or "text" not in rows.column_names:
        raise TextError(f"the dataset {name} has no split with a column named text")
    parts: list[str] = []
    characters = 0
    for row in rows:
        if characters >= max_characters:
            break
        parts.append(row["text"])
        characters += len(row["text"])
    return Text(f"{name} ({rows.split})", "\n\n".join(part for part in parts if part.strip()))


def _words(paragraph: str) -> str:
    """The paragraph with its line breaks and indents removed, to compare it with another."""
    return " ".join(paragraph.split())


def _is_held_out(split: str) -> bool:
    if split not in ("train", "held-out"):
        raise ValueError(f"split must be 'train' or 'held-out', got {split!r}")
    return split == "held-out"
