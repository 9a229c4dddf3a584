"""A plan as an HTML page: the figures, where a step goes, memory by rank, the schedule as it would run."""

from __future__ import annotations

from collections.abc import Iterator

from dryvine.launch.pages import plots
from dryvine.launch.pages.page import cards, heading, page, paragraph, picture, table
from dryvine.launch.plan.hardware import GIGA
from dryvine.launch.plan.plan import DAY, Plan
from dryvine.launch.plan.summary import (
    STEP_HEADS,
    byte_rows,
    groups,
    headline,
    large,
    memory_rows,
    phase_rows,
    step_rows,
)
from dryvine.parallel.schedule.draw.svg import svg


def plan_page(plan: Plan) -> str:
    return page(f"Plan of {plan.config.run.name}", _parts(plan))


def _parts(plan: Plan) -> Iterator[str]:
    first, _, run, host, memory = headline(plan)
    yield paragraph(first)
    if plan.config.rl:
        yield paragraph(run)
    for line in (memory, host):
        yield paragraph(line, "bad" if "DOES NOT FIT" in line else "good")
    yield cards(
        {
            "a step": f"{plan.step_seconds:.4g} s",
            "tokens/s a GPU": f"{plan.tokens_per_second / plan.world:,.0f}",
            "tokens a day": large(plan.tokens_per_day),
            "MFU, causal": f"{plan.mfu[0]:.1%}",
        }
        | ({} if plan.config.rl else _of_run(plan))
    )
    yield heading("Where a step goes")
    yield table(STEP_HEADS, step_rows(plan))
    yield heading("Memory of pipeline ranks")
    bars = {f"rank {numbers}": {k: b / GIGA for k, b in rank.kinds.items()} for numbers, rank in groups(plan.ranks)}
    usable = plan.machine.usable_bytes / GIGA
    yield picture(plots.bars(bars, "GB", usable, f"usable: {usable:.0f} GB"), "memory by kind of each pipeline rank")
    heads, rows = memory_rows(plan)
    yield table(["GB", *heads], rows)
    yield heading("Bytes that a rank sends in a step")
    yield table(["GB", plan.machine.intra.kind, plan.machine.inter.kind], byte_rows(plan))
    yield heading("A microbatch in each kind of block, alone, ms")
    yield table(["", "F", "I", "W"], phase_rows(plan))
    yield heading("The schedule, at these costs")
    yield picture(svg(plan.timeline), "what each pipeline rank runs when")


def _of_run(plan: Plan) -> dict[str, str]:
    return {
        "the run": f"{plan.run_seconds / DAY:,.1f} days",
        "GPU hours": large(plan.gpu_hours),
        f"at ${plan.machine.dollars:g} an hour": f"${plan.dollars:,.0f}",
    }
