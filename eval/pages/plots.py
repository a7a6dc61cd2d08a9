"""Plots in SVG: bars and lines, each value with its name as a title.

They are laid out in percent of their width, not scaled to it, so that text keeps its size on a
phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hf_fuse.eval.pages.parts import Markup, number, tag, together

ROW, LINES = 36, 200  # heights in pixels: of a bar with its label, of a plot of lines
LEFT, RIGHT = 12.0, 97.0  # percent of the width between which lines are drawn


def plots(*figures: Markup | None) -> Markup:
    """Side by side where there is room."""
    return tag("div", together(*figures), class_="plots")


@dataclass(frozen=True)
class Bar:
    """One bar: `shown` is its value with the unit, `kind` a class of report.css.

    spread: from where to where a thin line goes, such as p10 and p90.
    mark: a tick at a value to compare with, and its name.
    """

    label: str
    value: float | None
    shown: str
    kind: str = "patched"
    spread: tuple[float, float] | None = None
    mark: tuple[float, str] | None = None


def bars(title: str, given: Sequence[Bar], limit: tuple[float, str] | None = None) -> Markup | None:
    """A plot of bars from zero, a dashed line at `limit` (value, name). None without values."""
    rows = [bar for bar in given if bar.value is not None]
    ends = [end for bar in rows for end in (bar.value, *(bar.spread or ()), *_at(bar.mark))]
    most = max((end for end in (*ends, *_at(limit)) if end is not None), default=0.0)
    if not most > 0:
        return None

    def x(value: float) -> str:
        return f"{99 * value / most:.2f}%"

    drawn = []
    if limit is not None:
        bottom = ROW * len(rows)
        line = tag("line", class_="limit", x1=x(limit[0]), x2=x(limit[0]), y1=0, y2=bottom + 4)
        # The name goes to the side where there is room.
        side = "end" if limit[0] > most / 2 else "start"
        name = tag("text", limit[1], x=x(limit[0]), y=bottom + 16, text_anchor=side)
        drawn.append(tag("g", tag("title", limit[1]), line, name))
    for place, bar in enumerate(rows):
        top = place * ROW
        spread, mark = bar.spread, bar.mark
        said = f"{bar.label}: {bar.shown}" + (f"; {mark[1]}" if mark else "")
        drawn.append(
            tag(
                "g",
                tag("title", said),
                tag("text", bar.label, x=0, y=top + 13),
                tag("text", bar.shown, class_="value", x="100%", y=top + 13, text_anchor="end"),
                tag("rect", class_=bar.kind, x=0, y=top + 19, width=x(bar.value or 0), height=10),
                spread
                and tag(
                    "line",
                    class_="spread", x1=x(spread[0]), x2=x(spread[1]), y1=top + 24, y2=top + 24,
                ),
                mark
                and tag(
                    "line",
                    class_="mark", x1=x(mark[0]), x2=x(mark[0]), y1=top + 16, y2=top + 32,
                ),
            )
        )  # fmt: skip
    return _figure(title, ROW * len(rows) + (22 if limit else 0), drawn)


@dataclass(frozen=True)
class Series:
    """One line of a plot; `kind` is a class of report.css."""

    label: str
    values: Sequence[float | None]
    kind: str


def lines(title: str, labels: Sequence[str], given: Sequence[Series], unit: str) -> Markup | None:
    """Lines over `labels` on a logarithmic axis. None without values."""
    series = [s for s in given if any(s.values)]
    values = [value for s in series for value in s.values if value]
    if not values:
        return None
    ticks = _ticks(min(values), max(values))
    low, high = math.log(ticks[0]), math.log(ticks[-1])
    step = (RIGHT - LEFT) / max(1, len(labels) - 1)

    def x(place: int) -> str:
        return f"{LEFT + step * place:.2f}%"

    def y(value: float) -> str:
        return f"{10 + LINES * (1 - (math.log(value) - low) / (high - low)):.1f}"

    drawn = []
    for tick in ticks:
        across = {"x1": f"{LEFT}%", "x2": f"{RIGHT}%", "y1": y(tick), "y2": y(tick)}
        name = {"x": f"{LEFT - 2}%", "y": y(tick), "dy": 4, "text_anchor": "end"}
        drawn += [tag("line", class_="grid", **across), tag("text", f"{tick:g}", **name)]
    for place, label in enumerate(labels):
        drawn.append(tag("text", label, x=x(place), y=LINES + 30, text_anchor="middle"))
    for s in series:
        points = [(x(i), y(value)) for i, value in enumerate(s.values) if value]
        for (x1, y1), (x2, y2) in pairwise(points):
            drawn.append(tag("line", class_=f"series {s.kind}", x1=x1, y1=y1, x2=x2, y2=y2))
        for i, value in enumerate(s.values):
            if value:
                said = tag("title", f"{s.label}, {labels[i]}: {number(value)} {unit}")
                drawn.append(tag("circle", said, class_=s.kind, cx=x(i), cy=y(value), r=3.5))
    return _figure(title, LINES + 38, drawn, _legend(series))


def _figure(title: str, height: int, drawn: list[Markup], legend: Markup | None = None) -> Markup:
    plot = tag("svg", together(*drawn), role="img", aria_label=title, height=height)
    return tag("figure", tag("figcaption", title), plot, legend)


def _legend(series: Sequence[Series]) -> Markup:
    def sample(kind: str) -> Markup:
        stroke = tag("line", class_=f"series {kind}", x1=0, x2=22, y1=5, y2=5)
        dot = tag("circle", class_=kind, cx=11, cy=5, r=3.5)
        return tag("svg", stroke, dot, height=10, aria_hidden="true")

    return tag("ul", *(tag("li", sample(s.kind), s.label) for s in series), class_="legend")


def _at(named: tuple[float, str] | None) -> tuple[float, ...]:
    return named[:1] if named else ()


def _ticks(least: float, most: float) -> list[float]:
    """1, 2, 5, 10 and so on, from at most `least` to at least `most`."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    steps = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    below = max(step for step in steps if step <= least * (1 + 1e-9))
    above = min(step for step in steps if step >= most * (1 - 1e-9))
    kept = [step for step in steps if below <= step <= above]
    return kept if len(kept) > 1 else [below, 2 * below]
