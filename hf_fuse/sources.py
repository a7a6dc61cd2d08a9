"""Which classes of the installed transformers hf_fuse was written against, by their source.

`patches/fingerprints.json` holds the sha256 of every class that a patch replaces, as the releases
have it over which the tests ran. Another may be as good: `patch` then relies on its verification,
and the report says so. Once the tests run over a new release,
`python -m hf_fuse.sources transformers-5.24.0-py3-none-any.whl` adds it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from hf_fuse.patches import ARCHITECTURES
from hf_fuse.patches.architecture import Architecture

FILE = Path(inspect.getfile(Architecture)).with_name("fingerprints.json")


def unknown(architecture: Architecture, ops: Iterable[str]) -> tuple[str, ...]:
    """The names of the classes that a patch with `ops` replaces, whose source is not known."""
    wanted = set(ops)
    return tuple(
        cls.__name__
        for cls, op in _classes(architecture)
        if (op is None or op in wanted) and not _is_known(cls)
    )


def fingerprint(module_source: str, name: str) -> str | None:
    """sha256 of the class `name` in a module's source, without its decorators; None without one."""
    block = re.search(rf"^class {name}\b.*\n(?:[ \t)].*\n|\n)*", module_source, re.MULTILINE)
    return block and hashlib.sha256(block[0].rstrip().encode()).hexdigest()


@lru_cache
def _is_known(cls: type) -> bool:
    try:
        source = Path(inspect.getfile(cls)).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return False
    return fingerprint(source, cls.__name__) in _known().get(_key(cls), {})


@lru_cache
def _known() -> dict[str, dict[str, str]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def _classes(architecture: Architecture) -> Iterator[tuple[type, str | None]]:
    """With the op that replaces each; None for the backbone, whose forward runs the layers."""
    yield architecture.backbone, None
    for swap in architecture.swaps:
        if swap.original.__module__.startswith("transformers."):
            yield swap.original, swap.op


def _key(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def _add(wheels: Iterable[str]) -> None:
    """The classes of some releases to the file, each fingerprint with the first that has it."""
    known = _known() if FILE.exists() else {}
    classes = [cls for architecture in ARCHITECTURES for cls, _ in _classes(architecture)]
    for wheel in wheels:
        version = Path(wheel).name.split("-")[1]
        with zipfile.ZipFile(wheel) as files:
            for cls in classes:
                source = files.read(cls.__module__.replace(".", "/") + ".py").decode()
                found = fingerprint(source, cls.__name__)
                assert found is not None, f"{_key(cls)} is not in {wheel}"
                known.setdefault(_key(cls), {}).setdefault(found, version)
    text = json.dumps(known, indent=2, sort_keys=True)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    _add(sys.argv[1:])
