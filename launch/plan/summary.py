"""A plan in figures (`--json`) and in tables (the terminal, and the rows of the page)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dryvine.launch.plan.hardware import GIGA
from dryvine.launch.plan.memory import RankMemory
from dryvine.launch.plan.plan import DAY, Plan

if TYPE_CHECKING:
    from rich.console import Console

Rows = list[tuple[str, ...]]
SLOTS = {
    "F": "forwards alone",
    "B": "backwards alone",
    "I": "backwards for inputs alone",
    "W": "weight gradients alone",
    "BF": "pairs of a forward and a backward",
}


def figures(plan: Plan) -> dict[str, object]:
    """What `--json` writes. Units are in the names; `peak_bytes` is the fullest rank's."""
    causal, noncausal = plan.mfu
    of_run: dict[str, float | None] = {
        "token_budget": plan.token_budget,
        "run_seconds": plan.run_seconds,
        "gpu_hours": plan.gpu_hours,
        "cost_dollars": plan.dollars,
    }
    if plan.config.rl:  # an update is not such a step
        of_run = dict.fromkeys(of_run)
    return {
        "name": plan.config.run.name,
        "hardware": plan.machine.name,
        "times_from": plan.source,
        "world": plan.world,
        "step_seconds": plan.step_seconds,
        "tokens_per_day": plan.tokens_per_day,
        "tokens_per_second_per_gpu": plan.tokens_per_second / plan.world,
        **of_run,
        "dollars_per_gpu_hour": plan.machine.dollars,
        "bubble_seconds": plan.bubble_seconds,
        "exposed_comm_seconds": plan.exposed_seconds,
        "overlapped_share": plan.overlapped_share,
        "optimizer_seconds": plan.optimizer_seconds,
        "slots": {kinds: {"count": t.slots, "seconds": t.seconds} for kinds, t in plan.by_kind.items()},
        "mfu": causal,
        "mfu_noncausal": noncausal,
        "peak_bytes": plan.fullest.total,
        "usable_bytes": plan.machine.usable_bytes,
        "fits": plan.fits,
        "dispatcher": plan.sent.name,
        "dispatch_bytes": dict(plan.dispatch_bytes),
        "gradient_bytes": dict(plan.sharding.bytes),
        "phase_seconds": {kind: {p: t._asdict() for p, t in phases.items()} for kind, phases in plan.times.items()},
        "ranks": [
            {"rank": r.rank, "bytes": r.total, "by_kind": r.kinds, "host_bytes": r.on_host, "host_by_kind": r.host}
            for r in plan.ranks
        ],
    }


def headline(plan: Plan) -> list[str]:
    """The run, the step, the cost, and the memory of host and GPU: a line each."""
    c, p, causal, whole = plan.config, plan.config.parallel, *plan.mfu
    tokens = f"{p.microbatch_sequences * c.data.seq_len:,}"
    recipe = "FP8" if c.fp8.fp8 else c.run.dtype.upper()
    lines = [
        f"{c.run.name} on {plan.world:,} x {plan.machine.name}: pp {p.pp} x dp {p.dp} x ep {p.ep}, {p.schedule}, "
        f"{plan.run.schedule.microbatches} microbatches of {tokens} tokens, {recipe}, "
        f"dispatcher {plan.sent.name}; times from {plan.source}",
        f"step: {plan.step_seconds:.4g} s, {plan.tokens_per_second / plan.world:,.0f} tokens/s a GPU, "
        f"{large(plan.tokens_per_day)} tokens a day, MFU {causal:.1%} causal, {whole:.1%} with attention's masked half",
        _whole_run(plan),
    ]
    fullest, usable = plan.fullest, plan.machine.usable_bytes / GIGA
    most = f"{fullest.total / GIGA:.1f} GB on pipeline rank {fullest.rank} of {p.pp}"
    reserved = f"{usable:.1f} GB ({plan.machine.memory_gb:g} less {plan.machine.reserved_gb:g} for CUDA and NCCL)"
    on_host, has = max(rank.on_host for rank in plan.ranks) / GIGA, plan.machine.host.memory_gb
    kinds = [
        ("optim.offload", c.optim.offload == "cpu"),
        ("optim.ema", bool(c.optim.ema)),
        ("run.buddy_every", bool(c.run.buddy_every)),
    ]
    of = ", ".join(["a buffer of checkpoints", *(name for name, on in kinds if on)])
    host_fits, gpu_fits = on_host <= has, fullest.total <= plan.machine.usable_bytes
    lines.append(f"host memory: {_fits(host_fits)}: {on_host:.3g} GB a GPU with {of}, of {has:g} GB")
    return [*lines, f"memory: {_fits(gpu_fits)}: {most}, of {reserved}"]


def _whole_run(plan: Plan) -> str:
    if plan.config.rl:
        return (
            "run: not planned; an update of [rl] is as many such steps as its answers fill, and sampling comes before"
        )
    return (
        f"run: {large(plan.token_budget)} tokens in {plan.run_seconds / DAY:,.1f} days, {large(plan.gpu_hours)} GPU "
        f"hours, ${plan.dollars:,.0f} at ${plan.machine.dollars:g} an hour"
    )


def _fits(it_does: bool) -> str:
    return "fits" if it_does else "DOES NOT FIT"


def large(number: float) -> str:
    """12.3K, 4.56M, 7.89B or 1.23T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


STEP_HEADS = ["", "seconds", "share", "slots", "ms each"]


def step_rows(plan: Plan) -> Rows:
    """Where a step's seconds go (`STEP_HEADS`): for one pipeline rank, for the mean of all, and for the optimizer."""
    step = plan.step_seconds

    def line(name: str, time: float) -> tuple[str, ...]:
        return name, f"{time:.4g}", f"{time / step:.1%}", "", ""

    slots = sorted(plan.by_kind.items(), key=lambda item: -item[1].seconds)
    return [
        *((*line(_slot_name(kinds), t.seconds)[:3], f"{t.slots:.4g}", f"{1e3 * t.each:.4g}") for kinds, t in slots),
        line("bubble, as scheduled", plan.bubble_seconds),
        line("gradients summed over copies, not hidden", plan.sharding.sums.exposed),
        line("AdamW", plan.sharding.update_seconds),
        line("new weights to all copies, not hidden", plan.sharding.gathers.exposed),
        line("step", step),
        line("of it exposed all-to-all", plan.exposed_seconds),
        line("sums of gradients, hidden and not", plan.sharding.sums.seconds),
        line("new weights to all copies, hidden and not", plan.sharding.gathers.seconds),
        ("forwards that run in a pair", "", f"{plan.overlapped_share:.1%}", "", ""),
        ("waits for a slower rank, checkpoints, validation", "not planned", "", "", ""),
    ]


def _slot_name(kinds: str) -> str:
    return SLOTS.get(kinds, f"pairs of {' and '.join(kinds)}")


def groups(ranks: Sequence[RankMemory]) -> Iterator[tuple[str, RankMemory]]:
    """Ranks of equal memory: their numbers as text and one of them, the fullest group first."""
    alike: dict[tuple[tuple[str, int], ...], list[RankMemory]] = {}
    for rank in ranks:
        alike.setdefault(tuple(rank.kinds.items()), []).append(rank)
    for same in sorted(alike.values(), key=lambda same: -same[0].total):
        numbers = [rank.rank for rank in same]
        whole = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
        yield (f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers))), same[0]


def memory_rows(plan: Plan) -> tuple[list[str], Rows]:
    """Column heads, and GB by kind: a column for each group of equal ranks."""
    columns = list(groups(plan.ranks))
    kinds = list(dict.fromkeys(kind for _, rank in columns for kind in rank.kinds))
    rows = [(kind, *(f"{rank.kinds.get(kind, 0) / GIGA:.3g}" for _, rank in columns)) for kind in kinds]
    rows.append(("all", *(f"{rank.total / GIGA:.3g}" for _, rank in columns)))
    on_host = dict.fromkeys(kind for _, rank in columns for kind in rank.host)
    for kind in on_host:
        rows.append((f"in host memory: {kind}", *(f"{rank.host[kind] / GIGA:.3g}" for _, rank in columns)))
    return [f"rank {numbers}" for numbers, _ in columns], rows


def byte_rows(plan: Plan) -> Rows:
    """GB that a rank sends in a step, by link class."""
    every = {"expert all-to-all": plan.dispatch_bytes, "gradients and weights": plan.sharding.bytes}
    return [
        (name, *(f"{sent[link] / GIGA:.4g}" for link in ("intra", "inter"))) for name, sent in every.items()
    ]  # fmt: skip


def phase_rows(plan: Plan) -> Rows:
    """Milliseconds of F, I and W of every phase, when it has the device to itself."""
    rows = [
        (f"{kind}: {phase}", *(f"{1e3 * t:.3g}" for t in times))
        for kind, phases in plan.times.items()
        for phase, times in phases.items()
    ]
    sent = plan.prices.messages
    rows.append(
        ("all-to-alls of a layer: dispatch", f"{1e3 * sent.dispatch:.3g}", f"{1e3 * sent.dispatch_backward:.3g}", "")
    )
    rows.append(
        ("all-to-alls of a layer: combine", f"{1e3 * sent.combine:.3g}", f"{1e3 * sent.combine_backward:.3g}", "")
    )
    return rows


def show(plan: Plan, console: Console) -> None:
    """Print the whole plan."""
    for line in headline(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    heads, kinds = memory_rows(plan)
    intra, inter = plan.machine.intra.kind, plan.machine.inter.kind
    print_table(console, "where a step goes", STEP_HEADS, step_rows(plan))
    print_table(console, "memory, GB", ["", *heads], kinds)
    print_table(
        console,
        "GB that a rank sends in a step",
        ["", f"inside nodes ({intra})", f"between nodes ({inter})"],
        byte_rows(plan),
    )
    print_table(console, "ms of a microbatch, alone", ["", "F", "I", "W"], phase_rows(plan))


def print_table(console: Console, title: str, heads: list[str], rows: Rows) -> None:
    """Print a table with the first column left-aligned and numbers right-aligned."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
