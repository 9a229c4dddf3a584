"""`dryvine schedule`: draws pipeline schedules, computes their costs, and checks those in files. Needs no GPU and no
torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.style import Style
from rich.text import Text

from dryvine.launch.files import write_file
from dryvine.parallel.schedule.check import check
from dryvine.parallel.schedule.costs import Costs
from dryvine.parallel.schedule.draw.formats import FORMATS
from dryvine.parallel.schedule.draw.html import as_html
from dryvine.parallel.schedule.draw.text import lines
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.search.search import Effort, Problem, in_one_measure, search
from dryvine.parallel.schedule.simulate import Timeline, simulate
from dryvine.parallel.schedule.table import FILE, SCHEDULES, build, legal, load

SEARCH = "search"
_NAMES = f"{', '.join(SCHEDULES)}, file:PATH.csv, or {SEARCH} for a better one; several are compared"


def schedule(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help=_NAMES)] = None,
    pp: Annotated[int | None, typer.Option(help="pipeline ranks")] = None,
    microbatches: Annotated[int | None, typer.Option(help="microbatches in a step, over all directions")] = None,
    chunks: Annotated[int, typer.Option(help="stages per rank; 1 = the schedule's own")] = 1,
    costs: Annotated[str, typer.Option(help="times, such as F=1,I=1,W=1,FB=2.4,P2P=0.1; COMM=0.33 prices pairs")] = "",
    file: Annotated[Path | None, typer.Option(help="a schedule of your own, as --format csv writes it")] = None,
    form: Annotated[str, typer.Option("--format", help=" | ".join(FORMATS))] = "text",
    out: Annotated[Path | None, typer.Option(help="write there instead of to the terminal")] = None,
    memory: Annotated[
        int | None, typer.Option(help="search: live chunks a rank may hold, else DualPipe's pp+1")
    ] = None,
    steps: Annotated[int, typer.Option(help="search: annealing steps; 200000 take about 20 s at pp 8")] = 200_000,
    exact: Annotated[float, typer.Option(help="search: seconds of OR-tools CP-SAT after it, for small sizes")] = 0.0,
) -> None:
    """Draw, check and price pipeline schedules."""
    try:
        prices, asked = Costs.parse(costs), list(names or [])
        listed = [load(str(file))] if file else []
        plain = [name for name in asked if name != SEARCH]
        listed += [_named(name, pp, microbatches, chunks, alone=len(plain) == 1) for name in plain]
        for each in listed:
            check(each)
        if SEARCH in asked:
            problem = Problem(*_sizes(SEARCH, pp, microbatches), prices, memory)
            listed.insert(0, _search(problem, Effort(steps, exact_seconds=exact)))
        if not listed:
            raise ScheduleError(f"name a schedule ({_NAMES}) or give --file PATH.csv")
        timelines = _timelines(listed, prices, shared=len(listed) > 1 or SEARCH in asked)
        if form == "text" and out is None and sys.stdout.isatty():
            _paint(timelines)
        else:
            _write(_render(form, timelines, costs), out)
    except ScheduleError as error:
        typer.echo(f"dryvine schedule: {error}", err=True)
        raise typer.Exit(2) from None


def _sizes(name: str, pp: int | None, microbatches: int | None) -> tuple[int, int]:
    if pp is None or microbatches is None:
        raise ScheduleError(f"{name} needs --pp and --microbatches, such as --pp 8 --microbatches 20")
    return pp, microbatches


def _named(name: str, pp: int | None, microbatches: int | None, chunks: int, alone: bool) -> Schedule:
    """A schedule by its name; sizes may be omitted for a file that contains them. In a comparison, `chunks` is passed
    only to schedules that support it."""
    if name.startswith(FILE) and pp is None and microbatches is None:
        return load(name.removeprefix(FILE))
    sizes = _sizes(name, pp, microbatches)
    return build(name, *sizes, chunks if alone or legal(name, *sizes, chunks) is None else 1)


def _search(problem: Problem, effort: Effort) -> Schedule:
    """Run the search. Prints to stderr its gain, and an upper bound of the gain of any schedule."""
    found = search(problem, effort)
    than = f"{found.named.schedule.name} {found.named.span:.5g}" if found.named else "no named schedule fits"
    typer.echo(f"search: span {found.timeline.span:.5g} ({than}), bound {found.bound:.5g}", err=True)
    return found.timeline.schedule


def _timelines(schedules: list[Schedule], costs: Costs, shared: bool) -> list[Timeline]:
    """Simulated timelines. `shared`: costs are those of a P-th of the model, so that all schedules run the same model;
    otherwise those of a stage."""
    return [in_one_measure(s, costs) if shared else simulate(s, costs) for s in schedules]


def _render(form: str, timelines: list[Timeline], costs: str) -> str:
    if form not in FORMATS:
        raise ScheduleError(f"no format is called {form!r}; there are {', '.join(FORMATS)}")
    if form == "html":
        price = costs or "F=1, I=1, W=1, a pair the sum of both"
        shared = "a P-th of the model (a chunk held is one stage's activations, so half as large in a V)"
        return as_html(timelines, f"costs of {shared if len(timelines) > 1 else 'a stage'}: {price}")
    return FORMATS[form](timelines)


def _write(drawing: str, out: Path | None) -> None:
    if out is None:
        typer.echo(drawing, nl=False)
        return
    write_file(out, drawing)
    typer.echo(f"wrote {out}", err=True)


def _paint(timelines: list[Timeline]) -> None:
    console = Console()
    for timeline in timelines:
        for line in lines(timeline, console.width):
            painted = [(p.text, Style(color=p.colours[1], bgcolor=p.colours[0]) if p.colours else "") for p in line]
            console.print(Text.assemble(*painted), no_wrap=True, crop=True)
