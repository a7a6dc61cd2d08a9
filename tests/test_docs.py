"""The pages of docs/ say what is so: their code runs, their links lead somewhere, their commands
parse, and the files, names and messages they mention are there.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from hf_fuse import cli, jit
from hf_fuse.eval.environment import UsageError
from hf_fuse.eval.readme import ROOT, SECTIONS

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
RUNS = re.compile(r"<!-- (runs|prints) -->\n```\w+\n(.*?)```", re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = ("csrc", "docs", "eval", "hf_fuse", "patches", "tests", ".ci")
PATH = re.compile(rf"(?<![\w./~-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*<>-]*[\w*>/]")
FILE = re.compile(r"[\w-]+\.(?:py|cu|cuh|h|cpp|json|svg|toml|yml)")
NAME = re.compile(r"(?<![\w.])hf_fuse(?:\.\w+)+")
MESSAGES = {"message", "reason", "the report says"}  # tables whose first column is quoted


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fences(text: str, *languages: str) -> Iterator[str]:
    return (body for _, language, body in FENCE.findall(text) if language in languages)


def prose(text: str) -> str:
    return FENCE.sub("", text)


# Links and anchors


def anchors(text: str) -> set[str]:
    """Of the headings, where the site and a forge's rendering agree on them."""
    found = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading).lower() for heading in found]
    of_site = {re.sub(r"[- ]+", "-", p.encode("ascii", "ignore").decode().strip()) for p in plain}
    return {p.replace(" ", "-") for p in plain} & of_site


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in LINK.findall(prose(text)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(text_of(there))):
            broken.append(target)
    return broken


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, text_of(page)) == []


def test_every_page_is_linked_from_the_first() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).name for target in LINK.findall(text_of(index))}
    assert linked == {page.name for page in DOCS} - {"index.md"}


# Commands


def commands(text: str) -> list[str]:
    """Every command shown, without comments and what surrounds it. One that prose only names,
    `hf-fuse step`, is asked for its help.
    """
    blocks = [line for body in fences(text, "sh") for line in body.splitlines()]
    spans = [
        f"{code} --help" if re.fullmatch("hf-fuse [a-z-]+", code) else code
        for code in CODE.findall(prose(text))
    ]
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in (*blocks, *spans)]
    return [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line) for line in lines]


def parses(command: str) -> bool:
    """By the real parser, without running it."""
    arguments = shlex.split(command)[1:]
    try:
        if arguments[0] == "lm-eval":
            harness = pytest.importorskip("hf_fuse.eval.harness")
            own, rest = harness._own_parser().parse_known_args(arguments[1:])
            harness._their_arguments(own, rest)
        else:
            cli._parser().parse_args(arguments)
    except SystemExit as end:
        return not end.code
    except UsageError:
        return False
    return True


def shown(text: str) -> list[str]:
    return [command for command in commands(text) if command.startswith("hf-fuse ")]


@each_page
def test_commands_parse(page: Path) -> None:
    assert [command for command in shown(text_of(page)) if not parses(command)] == []


@each_page
def test_targets_and_modules_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands(text_of(page)):
        words = command.split()
        if words[:1] == ["make"]:
            assert targets.issuperset(w for w in words[1:] if re.fullmatch("[a-z-]+", w)), command
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), command


# Files and names


@cache
def all_files() -> frozenset[str]:
    folders = [ROOT / folder for folder in FOLDERS]
    return frozenset(p.name for folder in folders for p in folder.rglob("*")) | frozenset(
        p.name for p in ROOT.iterdir()
    )


def missing_files(text: str) -> list[str]:
    """Paths in the repository, with `*` or `<...>` for what varies, and files named in code."""
    without_links = LINK.sub("", text)
    paths = [re.sub(r"<\w+>", "*", path) for path in PATH.findall(without_links)]
    missing = [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]
    named = [code for code in CODE.findall(without_links) if FILE.fullmatch(code)]
    return missing + [name for name in named if name not in all_files()]


def missing_names(text: str) -> list[str]:
    """Modules of the package, and what is in them."""
    return [name for name in NAME.findall(text) if not is_there(name)]


def is_there(name: str) -> bool:
    parent, _, last = name.rpartition(".")
    try:
        if importlib.util.find_spec(name):
            return True
    except ModuleNotFoundError:
        return False
    return hasattr(importlib.import_module(parent), last)


@each_page
def test_files_and_names_are_there(page: Path) -> None:
    assert missing_files(text_of(page)) == []
    assert missing_names(text_of(page)) == []


# Messages


@cache
def literals() -> str:
    """Every string of the sources, f-strings as their parts with … between, one a line."""
    found: list[str] = []
    for folder in ("hf_fuse", "patches", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(
                            str(v.value) if isinstance(v, ast.Constant) else "…"
                            for v in node.values
                        )
                    )
    return "\n".join(re.sub(r"\s+", " ", text) for text in found)


def unknown_messages(text: str) -> list[str]:
    """Of what the tables quote, what the sources do not say."""
    unknown = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = table.strip().splitlines()
        if head.split("|")[1].strip() in MESSAGES:
            quoted = [message for row in rows for message in CODE.findall(row.split("|")[1])]
            unknown += [
                message
                for message in quoted
                if any(part.strip() not in literals() for part in re.split("…|`", message))
            ]
    return unknown


@each_page
def test_messages_are_those_of_the_sources(page: Path) -> None:
    assert unknown_messages(text_of(page)) == []


def test_troubleshooting_knows_the_doctors_lines_and_the_variables() -> None:
    text = text_of(ROOT / "docs" / "troubleshooting.md")
    cells = set(CODE.findall(text))
    lines = {check.name for check in jit.doctor(build=False)} | {"nvcc", "cuda kernels"}
    assert lines <= cells
    assert jit.__doc__
    variables = set(re.findall(r"HF_FUSE_\w+", jit.__doc__)) | {"HF_FUSE_AUTO"}
    assert variables == set(re.findall(r"HF_FUSE_\w+", text))


# Figures


@pytest.mark.parametrize(
    "page", [p for p in DOCS if p.stem != "architecture"], ids=lambda p: p.stem
)
def test_figures_stand_in_tables_made_from_results(page: Path) -> None:
    text = prose(text_of(page))
    for name in SECTIONS:
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", "", text, flags=re.DOTALL)
    assert re.findall(r"\d[\d.,]* ?(?:ms|µs|×|TB/s|GB/s|tokens/s)(?!\w)", text) == []


# Code


def test_the_quick_start_runs() -> None:
    """Block after block in one namespace; what the page says a block prints is what it prints, but
    for the last digits of an error.
    """
    blocks = RUNS.findall(text_of(ROOT / "docs" / "quickstart.md"))
    assert [kind for kind, _ in blocks].count("runs") >= 5
    namespace: dict[str, object] = {}
    printed = ""
    for kind, body in blocks:
        if kind == "prints":
            assert same(printed) == same(body)
            continue
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(body, "docs/quickstart.md", "exec"), namespace)
        printed = out.getvalue()


def same(text: str) -> list[str]:
    text = re.sub(r"relative difference \S+", "relative difference", text)
    return [line.rstrip() for line in text.strip().splitlines()]


@each_page
def test_python_is_python(page: Path) -> None:
    for body in fences(text_of(page), "python"):
        compile(body, page.name, "exec")


def test_the_site_builds_without_a_warning_and_asks_for_nothing(tmp_path: Path) -> None:
    """Nothing from another host: no font, script, style or picture."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = [*tmp_path.rglob("*.html")]
    assert {page.stem for page in DOCS} <= {page.stem for page in pages}
    asked = r"""<(?:link|script|img|iframe|source)\b[^>]*\b(?:href|src)=["']?(?:https?:)?//"""
    assert [page.name for page in pages if re.search(asked, text_of(page))] == []
    styles = [*tmp_path.rglob("*.css")]
    loads = r"(?:@import\s|url\()\s*[\"']?(?:https?:)?//"
    assert [style.name for style in styles if re.search(loads, text_of(style))] == []


def test_what_is_wrong_is_found() -> None:
    page = ROOT / "docs" / "index.md"
    wrong = "[a](nowhere.md) [b](quickstart.md#no-such-heading) [c](quickstart.md#install)"
    assert broken_links(page, wrong) == ["nowhere.md", "quickstart.md#no-such-heading"]
    assert missing_files("`csrc/cuda/no_such.cu` `no_such.py` `patches/<model_type>.py`") == [
        "csrc/cuda/no_such.cu",
        "no_such.py",
    ]
    assert missing_names("`hf_fuse.patch` `hf_fuse.mend` `hf_fuse.no.such`") == [
        "hf_fuse.mend",
        "hf_fuse.no.such",
    ]
    table = "| reason | |\n| --- | --- |\n| `no maximum length`, `no luck at all` | `-` |\n"
    assert unknown_messages(table) == ["no luck at all"]
    assert shown("```sh\nHF_FUSE_VERBOSE=1 hf-fuse doctor --now  # why\n```") == [
        "hf-fuse doctor --now"
    ]
    assert not parses("hf-fuse doctor --now")
    assert not parses("hf-fuse mend --help")
    assert parses(*shown("by `hf-fuse step`"))
