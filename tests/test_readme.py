"""The README and the pages of docs/ say what the committed results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_fuse.eval import readme

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda path: path.stem)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert readme.rewritten(text) == text


@pytest.mark.parametrize("path", sorted(readme.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_a_result_says_where_it_comes_from(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert all(result[key] for key in ("date", "device", "command"))
    assert {"python", "torch", "transformers", "hf_fuse"} <= set(result["versions"])


def test_the_six_lines_of_the_first_screen_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, with a tiny model in place of the one from the hub."""
    from hf_fuse.eval.loading import tiny_models

    code = README.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) == 6
    tiny = next(path for name, path in tiny_models().items() if "neox" in name)
    namespace: dict[str, object] = {}
    exec(code.replace("EleutherAI/pythia-160m", str(tiny)), namespace)
    assert not namespace["hf_fuse"].is_patched(namespace["model"])  # type: ignore[attr-defined]
