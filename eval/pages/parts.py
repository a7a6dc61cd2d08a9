"""What the HTML reports are made of: elements, tables, what all sections show, the page.

A page is one file without script, and its policy forbids it any request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_fuse.reporting import FusedModule, Report

Document = Mapping[str, Any]  # a result, as its JSON has it

STYLE = Path(__file__).resolve().with_name("report.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_VOID = {"meta"}


class Markup(str):
    """HTML that is escaped already."""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. What is no Markup is escaped; a child or an attribute that is None is left out.

    `class_` is the attribute class, and an underscore inside a name is a hyphen.
    """
    given = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(
        child if isinstance(child, Markup) else escape(str(child))
        for child in children
        if child is not None
    )
    return Markup(f"<{name}{given}>" + ("" if name in _VOID else f"{inner}</{name}>"))


def together(*parts: Markup | None) -> Markup:
    """Parts one after another."""
    return Markup("\n".join(part for part in parts if part is not None))


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """Fixed point; a dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}f}{unit and f' {unit}'}"


def small(value: float | None) -> str:
    """For what may be nearly nothing, such as a divergence."""
    return "–" if value is None else f"{value:.2e}"


def times(over: float | None, unit: str = "") -> object:
    """How often ours goes into the other's time; a loss is marked."""
    shown = number(over, 2, unit)
    return tag("span", shown, class_="loss") if over is not None and over < 1 else shown


def ratio(over: float | None, under: float | None) -> float | None:
    """None where either is missing."""
    return over / under if over is not None and under else None


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[object]], *, words: bool = False
) -> Markup:
    """The first column to the left, numbers to the right; all to the left with `words`. Wider than
    the page it scrolls by itself.
    """
    titles = tag("tr", *(tag("th", title, scope="col") for title in head))
    lines = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    whole = tag("table", tag("thead", titles), tag("tbody", *lines), aria_label=caption)
    kind = "table words" if words else "table"
    return tag("div", whole, class_=kind, role="region", tabindex=0, aria_label=caption)


def tiles(facts: Sequence[tuple[str, object]]) -> Markup:
    """The few figures that matter, each with its name."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", fact)) for name, fact in facts))


def model_of(document: Document) -> str:
    """The model's name; that of a shape without its prefix."""
    return str(document["model"]).removeprefix("shape:")


def heading(document: Document, run: object = None) -> Markup:
    """The model, and below it what it is and how it was run."""
    facts = [
        "random weights" if str(document["model"]).startswith("shape:") else None,
        f"{document['parameters'] / 1e6:,.1f} M parameters" if "parameters" in document else None,
        document.get("dtype"),
        document["device"],
        run,
    ]
    shown = " · ".join(str(fact) for fact in facts if fact)
    return together(tag("h3", model_of(document)), tag("p", shown, class_="soft"))


def patch_report(report: Mapping[str, Any] | None) -> Markup | None:
    """What `hf_fuse.report` printed, open where something was left alone or did not come about."""
    if report is None:
        return None
    modules = tuple(FusedModule(**module) for module in report["modules"])
    made = Report(**{**report, "modules": modules})
    notable = made.skipped or made.left_to_transformers or made.failures or made.unknown_sources
    summary = f"Patch report: {made.model}, {len(modules)} modules"
    return tag("details", tag("summary", summary), tag("pre", made), open="" if notable else None)


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str, Markup]]) -> str:
    """A document of sections: (id, heading, content)."""
    links = [tag("a", heading, href=f"#{name}") for name, heading, _ in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup("\n" + STYLE.read_text(encoding="utf-8"))),
    )
    top = tag("header", tag("h1", title), tag("p", subtitle, class_="soft"), tag("nav", *links))
    main = [
        tag("section", tag("h2", heading), content, id=name) for name, heading, content in sections
    ]
    body = tag("body", together(top, tag("main", together(*main))))
    return f"<!DOCTYPE html>\n{tag('html', together(head, body), lang='en')}\n"
