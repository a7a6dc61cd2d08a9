"""The pages of the lm-eval task hf_fuse_text."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from hf_fuse.eval.text import file_text, pydoc_text

_PAGE = 4000  # characters, at least


def dataset(text: str | None = None, **metadata: Any) -> dict[str, Dataset]:
    """Whole paragraphs of the file `text`, or of what of Python's manual `hf-fuse ppl` scores."""
    source = file_text(text) if text else pydoc_text("held-out")
    pages = [""]
    for paragraph in source.text.split("\n\n"):
        if len(pages[-1]) > _PAGE:
            pages.append("")
        pages[-1] += paragraph + "\n\n"
    return {"test": Dataset.from_list([{"page": page} for page in pages])}
