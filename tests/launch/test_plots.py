"""Plots of pages: what a reader takes from a colour, a gap, a tick."""

from __future__ import annotations

import re

from dryvine.launch.pages import plots
from dryvine.launch.pages.plots import Curve
from dryvine.launch.plan import memory


def test_no_two_kinds_of_memory_share_a_colour() -> None:
    kinds = [value for name, value in vars(memory).items() if name.isupper() and isinstance(value, str)]
    assert len(kinds) > 11
    drawn = plots.bars({"rank 0": dict.fromkeys(kinds, 1.0)}, "GB")
    legend = drawn[drawn.index('id="legend_1"') :]
    colours = re.findall(r"fill: (#[0-9a-f]{6})", legend)
    assert len(set(colours)) == len(kinds)


def test_a_curve_is_interrupted_where_a_figure_was_not_finite() -> None:
    y = [5.0, 4.0, None, 3.0, 2.0]
    whole, gap = (plots.lines({"loss": Curve(range(5), y, gaps=gaps)}, "step", "loss") for gaps in (False, True))
    starts = [max(path.count("M ") for path in re.findall(r' d="([^"]*)"', drawn)) for drawn in (whole, gap)]
    assert starts == [1, 2]


def test_many_layers_have_few_ticks() -> None:
    loads = [[float(layer + expert) for expert in range(4)] for layer in range(58)]
    drawn = plots.heat(loads, "expert", "layer", "load")
    ticks = set(re.findall(r'id="(ytick_\d+)"', drawn[: drawn.index('id="axes_2"')]))
    assert 3 < len(ticks) < 15
