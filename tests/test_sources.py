"""The fingerprints of what a patch replaces, and what is said of a class that has another."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from models import PLAIN, Case, cases

import hf_fuse
from hf_fuse import sources
from hf_fuse.patches import ARCHITECTURES

each_case = cases(PLAIN)


@pytest.fixture(autouse=True)
def _forget() -> None:
    sources._is_known.cache_clear()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.model_type)
def test_the_installed_release_is_known(architecture: sources.Architecture) -> None:
    assert sources.unknown(architecture, architecture.ops) == ()
    known = json.loads(sources.FILE.read_text())
    for cls, _ in sources._classes(architecture):
        assert set(known[sources._key(cls)].values()) <= {"5.17.0", "5.23.0", "5.24.0"}
        source = inspect.getsource(cls)
        bare = source[source.index(f"class {cls.__name__}") :]
        whole = Path(inspect.getfile(cls)).read_text()
        assert sources.fingerprint(whole, cls.__name__) == sources.fingerprint(bare, cls.__name__)


def test_a_class_changes_with_its_body_and_not_with_its_neighbours() -> None:
    source = (
        "@one(\n    1\n)\nclass A(B):\n    x = 1\n\n    def f(self):\n        return 2\n\n\n"
        "class AB:\n    y = 1\n"
    )
    first = sources.fingerprint(source, "A")
    assert first is not None
    assert sources.fingerprint(source.replace("y = 1", "y = 2"), "A") == first
    assert sources.fingerprint(source.replace("return 2", "return 3"), "A") != first
    assert sources.fingerprint(source, "C") is None


@pytest.mark.parametrize("verify", [True, False])
@each_case
def test_the_report_names_what_is_not_known(
    case: Case, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.build()
    assert hf_fuse.report(hf_fuse.patch(model)).unknown_sources == ()
    monkeypatch.setattr(sources, "_known", dict)
    sources._is_known.cache_clear()
    hf_fuse.unpatch(model)
    report = hf_fuse.report(hf_fuse.patch(model, ops={"add_norm"}, verify=verify))
    replaced = {m.original for m in report.modules if "Norm" not in m.original}
    assert replaced <= set(report.unknown_sources)
    assert not any("Attention" in name for name in report.unknown_sources)
    assert "not the source hf_fuse was tested over" in str(report)
    assert (report.verified == "not asked for") == (not verify)
