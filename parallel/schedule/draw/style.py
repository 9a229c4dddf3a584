"""How ops differ, the same in every picture: one hue per direction, light for F and dark for B, hatched for W.

Lightness and hatching carry the kind, so that the pictures can be read in grey; hue carries the direction only: the
route in DualPipe, the first or second stage of a rank in a V, the chunk in interleaved schedules.
"""

from __future__ import annotations

from typing import NamedTuple

from dryvine.parallel.schedule.ir import Op, Schedule


class Hue(NamedTuple):
    """Fills from light to dark, as #rrggbb. Text is dark on the first two and white on the others."""

    weight: str
    forward: str
    inputs: str
    backward: str


HUES = (
    Hue("#dbeafe", "#93c5fd", "#3479ee", "#1e40af"),  # blue
    Hue("#ffedd5", "#fdba74", "#d2620d", "#94310f"),  # orange
    Hue("#ccfbf1", "#5eead4", "#0f766e", "#134e4a"),  # teal
    Hue("#fae8ff", "#e9a8fb", "#a21caf", "#701a75"),  # magenta
)
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs only", "W": "weight gradients"}


def fill(kind: str, hue: int) -> str:
    return dict(zip("WFIB", HUES[hue % len(HUES)], strict=True))[kind]


def ink(kind: str) -> str:
    return "#ffffff" if kind in "IB" else "#0f172a"


def passes(schedule: Schedule) -> dict[tuple[int, int], int]:
    """(route, stage) -> how many earlier stages of that route its rank holds: 0 on the way down a V, 1 back."""
    return {
        (r, stage): route[:stage].count(rank)
        for r, route in enumerate(schedule.routes)
        for stage, rank in enumerate(route)
    }


def hues(schedule: Schedule) -> dict[tuple[int, int], int]:
    """(route, stage) -> hue number."""
    directions = {(route, stage): (route, number) for (route, stage), number in passes(schedule).items()}
    order = sorted(set(directions.values()))
    return {at: order.index(direction) for at, direction in directions.items()}


def hue_names(schedule: Schedule) -> list[str]:
    """What each hue stands for, in words for the legend."""
    by_hue: dict[int, list[tuple[int, int]]] = {}
    for route_and_stage, hue in hues(schedule).items():
        by_hue.setdefault(hue, []).append(route_and_stage)
    if len(by_hue) == 1:
        return [""]
    if len(schedule.routes) == len(by_hue):
        return [f"ranks {route[0]} \N{RIGHTWARDS ARROW} {route[-1]}" for route in schedule.routes]
    stages = [sorted(stage for _, stage in members) for members in by_hue.values()]
    return [f"stages {own[0]}\N{EN DASH}{own[-1]}" for own in stages]


def label(op: Op, passes: dict[tuple[int, int], int]) -> str:
    """Kind and microbatch, and a letter for the pass where a rank meets the microbatch more than once: F3, B12b."""
    letter = "abcdefgh"[passes[op.route, op.stage] % 8] if any(passes.values()) else ""
    return f"{op.kind}{op.microbatch}{letter}"
