"""The results of a sweep: as JSON, in a terminal, and as a page with plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dryvine.launch.plan.hardware import GIGA, Machine
from dryvine.launch.plan.summary import Rows, print_table
from dryvine.launch.plan.sweep import BEST, SweepRow

if TYPE_CHECKING:
    from rich.console import Console

HEADS = ("pp x dp x ep", "step, s", "tokens/s a GPU", "MFU", "bubble", "exposed", "GB", "")
LEGEND = "b: sequences a microbatch, r: recompute, t: of transposes too, o: optimizer in host memory"
LISTED = 400  # rows of a page's table


def cells(row: SweepRow, best: float) -> tuple[str, ...]:
    """A row of the table; the last cell says why it is not the best."""
    plan = row.plan
    size = f"{row.peak / GIGA:.1f}" if row.peak else f"over {row.least / GIGA:.0f}" if row.least else ""
    if plan is None:
        return layout_label(row), *[""] * (len(HEADS) - 3), size, row.reason
    slower = f"{row.seconds / best - 1:.1%} slower" if row.seconds > best else "best"
    return (
        layout_label(row),
        f"{plan.step_seconds:.4g}",
        f"{plan.tokens_per_second / plan.world:,.0f}",
        f"{plan.mfu[0]:.1%}",
        f"{plan.bubble_seconds / plan.step_seconds:.1%}",
        f"{plan.exposed_seconds / plan.step_seconds:.1%}",
        size,
        slower,
    )


def layout_label(row: SweepRow) -> str:
    """The candidate in a narrow column (`LEGEND`)."""
    c = row.candidate
    again = " rt" if "transposes" in c.recompute else " r" if c.recompute else ""
    return f"{c.pp}x{c.dp}x{c.ep} {c.schedule} b{c.microbatch}{again}{' o' if c.offload else ''}"


def why_not(rows: Sequence[SweepRow]) -> Rows:
    """(reason, count, example) of the rejected candidates, most frequent first."""
    found: dict[str, list[SweepRow]] = {}
    for row in rows:
        if row.reason:
            found.setdefault(_kind(row.reason), []).append(row)
    order = sorted(found.items(), key=lambda item: -len(item[1]))
    return [(kind, str(len(some)), f"{some[0].candidate}: {some[0].reason}") for kind, some in order]


def _kind(reason: str) -> str:
    kinds = {"does not fit": "do not fit", "slower": "are slower"}
    return next((kind for start, kind in kinds.items() if reason.startswith(start)), "are not legal")


def best_seconds(rows: Sequence[SweepRow]) -> float:
    return min((row.seconds for row in rows if row.fits), default=float("inf"))


def show_sweep(rows: Sequence[SweepRow], console: Console) -> None:
    """Print the best candidates, and why the others were rejected."""
    best, good = best_seconds(rows), [row for row in rows if row.fits]
    near = sorted((row for row in rows if row.least), key=lambda row: max(row.peak, row.least))
    if good:
        title, shown = "the best", good
    elif near:
        title, shown = "none fits; those that come nearest", near
    else:
        title, shown = "none is legal", []
    print_table(
        console, f"{title}, of {len(rows)} layouts ({LEGEND})", list(HEADS), [cells(r, best) for r in shown[:BEST]]
    )
    print_table(console, "the others", ["why", "layouts", "for example"], why_not(rows))


def sweep_figures(rows: Sequence[SweepRow]) -> list[dict[str, object]]:
    """For `--json`: every candidate, the best first; `peak_bytes` null where they were not counted."""
    return [
        {
            "pp": row.candidate.pp,
            "dp": row.candidate.dp,
            "ep": row.candidate.ep,
            "schedule": row.candidate.schedule,
            "microbatch_sequences": row.candidate.microbatch,
            "recompute": row.candidate.recompute,
            "offload": row.candidate.offload,
            "fits": row.fits,
            "reason": row.reason,
            "step_seconds": row.plan.step_seconds if row.plan else None,
            "peak_bytes": row.peak or None,
            "gpu_hours": row.plan.gpu_hours if row.plan else None,
        }
        for row in rows
    ]


def sweep_page(rows: Sequence[SweepRow], name: str, gpus: int, machine: Machine) -> str:
    from dryvine.launch.pages.page import page

    return page(f"Layouts of {name} on {gpus:,} x {machine.name}", _parts(rows, machine))


def _parts(rows: Sequence[SweepRow], machine: Machine) -> Iterator[str]:
    from dryvine.launch.pages import plots
    from dryvine.launch.pages.page import heading, paragraph, picture, table

    best, planned = best_seconds(rows), [row for row in rows if row.plan]
    counts = Counter(_kind(row.reason) if row.reason else "fit and are planned" for row in rows)
    yield paragraph(f"{len(rows)} layouts: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    yield heading("Time against memory")
    by_schedule: dict[str, list[tuple[float, float]]] = {}
    for row in planned:
        if row.plan:
            point = row.peak / GIGA, row.plan.step_seconds
            by_schedule.setdefault(row.candidate.schedule, []).append(point)
    usable = machine.usable_bytes / GIGA
    yield picture(plots.points(by_schedule, "GB on the fullest rank", "step, s", usable), "step time over peak memory")
    yield heading("The best, and where their steps go")
    yield paragraph(f"A bar for each row of the table, in its order. {LEGEND}.")
    parts = {f"{number + 1}": _seconds(row) for number, row in enumerate(r for r in rows[:BEST] if r.fits)}
    if parts:
        yield picture(plots.bars(parts, "s"), "seconds of a step by what they are spent on")
    yield table([*HEADS[:-1], "why"], [cells(row, best) for row in rows[:BEST]], text_last=True)
    yield heading("Why not the others")
    yield table(["why", "layouts", "for example"], why_not(rows), text_last=True)
    yield heading("All whose memory was counted")
    counted = [row for row in rows if row.peak]
    yield table([*HEADS[:-1], "why"], [cells(row, best) for row in counted[:LISTED]], text_last=True)


def _seconds(row: SweepRow) -> dict[str, float]:
    plan = row.plan
    assert plan is not None
    return {
        "arithmetic and hidden messages": plan.timeline.span - plan.bubble_seconds - plan.exposed_seconds,
        "exposed all-to-all": plan.exposed_seconds,
        "bubble": plan.bubble_seconds,
        "optimizer and gradients": plan.optimizer_seconds,
    }
