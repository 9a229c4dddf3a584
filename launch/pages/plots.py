"""The plots of pages, drawn by matplotlib as SVG that keeps its text as text."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 9.0, 3.4  # inches, which pages scale to their width
COLOURS = (
    "#2563eb",
    "#d2620d",
    "#0f766e",
    "#a21caf",
    "#b42318",
    "#4d7c0f",
    "#64748b",
    "#ca8a04",
    "#0891b2",
    "#7c3aed",
    "#be185d",
    "#14532d",
    "#92400e",
    "#a3a3a3",
)


class Curve(NamedTuple):
    """Points of one curve; None where there is none, which with `gaps` interrupts it. `band`: the ends of an interval
    around each."""

    x: Sequence[float]
    y: Sequence[float | None]
    dashed: bool = False
    band: tuple[Sequence[float | None], Sequence[float | None]] | None = None
    gaps: bool = False


class Mark(NamedTuple):
    """A moment on the x axis, and what happened."""

    x: float
    text: str


def lines(curves: Mapping[str, Curve], x: str, y: str, marks: Sequence[Mark] = (), log: bool = False) -> str:
    """Curves over one x axis, by name."""
    figure, axes = _axes(x, y)
    for number, (name, curve) in enumerate(curves.items()):
        pairs = zip(curve.x, curve.y, strict=True)
        known = [(a, math.nan if b is None else b) for a, b in pairs if b is not None or curve.gaps]
        style = "--" if curve.dashed else "-"
        dots = "o" if len(known) < 40 else ""
        axes.plot(
            *zip(*known, strict=True) if known else ((), ()),
            style + dots,
            ms=3,
            lw=1.3,
            label=name,
            color=_colour(number),
        )
        if curve.band:
            _shade(axes, curve, _colour(number))
    for mark in marks:
        axes.axvline(mark.x, color="#64748b", lw=0.8, ls=":")
        axes.annotate(
            mark.text, (mark.x, 1.0), xycoords=("data", "axes fraction"), fontsize=8, rotation=90, va="top", ha="right"
        )
    if log:
        axes.set_yscale("log")
    if curves:
        _legend_below(axes, max(map(len, curves)))
    return _svg(figure)


def _shade(axes: Axes, curve: Curve, colour: str) -> None:
    low, high = curve.band or ((), ())
    known = [(x, a, b) for x, a, b in zip(curve.x, low, high, strict=True) if a is not None and b is not None]
    if known:
        x, bottom, top = zip(*known, strict=True)
        axes.fill_between(x, bottom, top, alpha=0.15, color=colour, lw=0)


def bars(groups: Mapping[str, Mapping[str, float]], y: str, limit: float | None = None, limit_name: str = "") -> str:
    """A stacked bar for each group, its parts by name; `limit` is a line that bars may not cross."""
    figure, axes = _axes("", y)
    kinds = list(dict.fromkeys(kind for parts in groups.values() for kind in parts))
    bottoms = [0.0] * len(groups)
    for number, kind in enumerate(kinds):
        heights = [parts.get(kind, 0.0) for parts in groups.values()]
        axes.bar(list(groups), heights, bottom=bottoms, label=kind, color=_colour(number), width=0.6)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    if limit is not None:
        axes.axhline(limit, color="#b42318", lw=1.2, ls="--", label=limit_name)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def points(groups: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, limit: float | None = None) -> str:
    """A dot for each pair, by group; `limit` is a vertical line."""
    figure, axes = _axes(x, y)
    for number, (name, pairs) in enumerate(groups.items()):
        if pairs:
            xs, ys = zip(*pairs, strict=True)
            axes.scatter(xs, ys, s=22, alpha=0.75, label=f"{name} ({len(pairs)})", color=_colour(number), lw=0)
    if limit is not None:
        axes.axvline(limit, color="#b42318", lw=1.2, ls="--", label="memory of a GPU")
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def heat(values: Sequence[Sequence[float]], x: str, y: str, says: str) -> str:
    """A map of rows of numbers, the first at the top."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(x, y)
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label=says)
    return _svg(figure)


def _axes(x: str, y: str) -> tuple[object, Axes]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend_below(axes: Axes, longest: int) -> None:
    """Under the plot, in as many columns as names of that length leave room for."""
    axes.figure.legend(frameon=False, fontsize=9, loc="outside lower left", ncols=max(1, 96 // (longest + 8)))


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _svg(figure: object) -> str:
    """The <svg> element alone, with names that differ from those of the page's other plots."""
    import matplotlib
    from matplotlib import pyplot

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None})  # type: ignore[attr-defined]
    pyplot.close(figure)  # type: ignore[arg-type]
    drawn = out.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawn))
