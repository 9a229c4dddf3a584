"""The schedules that have names. A new one is a file with a `Generator` and a line here: config, CLI, tests and
benchmarks take the names from this dict. Free of torch, so that a login node can check a config."""

from __future__ import annotations

from pathlib import Path

from dryvine.parallel.schedule.check import check
from dryvine.parallel.schedule.dualpipe import dualpipe, dualpipev
from dryvine.parallel.schedule.gpipe import gpipe
from dryvine.parallel.schedule.interleaved import interleaved
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.notation import from_csv
from dryvine.parallel.schedule.one_f_one_b import one_f_one_b
from dryvine.parallel.schedule.rules import Generator, ScheduleError, Sizes
from dryvine.parallel.schedule.zb1p import zb1p
from dryvine.parallel.schedule.zbv import zbv

SCHEDULES: dict[str, Generator] = {
    "gpipe": gpipe,
    "one_f_one_b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "zbv": zbv,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}
ALIASES = {"1f1b": "one_f_one_b"}
FILE = "file:"


def build(name: str, pp: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The schedule `name`, or that in `file:PATH.csv`, for `pp` ranks and `microbatches` a step.

    `chunks` is the number of stages per rank; 1 means the schedule's own (2 for the V shapes). Raises ScheduleError,
    which states the rule and the nearest legal sizes.
    """
    if name.startswith(FILE):
        return _from_file(name.removeprefix(FILE), pp, microbatches)
    generator, sizes = _find(name, pp, microbatches, chunks)
    if problem := generator.explain(name, sizes):
        raise ScheduleError(problem)
    return generator.make(sizes)


def legal(name: str, pp: int, microbatches: int, chunks: int = 1) -> str | None:
    """None if `build` would succeed and the schedule can run, else why not. Cheap for names; a file is read."""
    try:
        if name.startswith(FILE):
            check(build(name, pp, microbatches, chunks))
            return None
        generator, sizes = _find(name, pp, microbatches, chunks)
    except ScheduleError as error:
        return str(error)
    return generator.explain(name, sizes)


def load(path: str) -> Schedule:
    """The schedule in a CSV file (see `notation`), unchecked."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ScheduleError(f"schedule file {path}: {error.strerror}") from error
    return from_csv(text, path)


def _find(name: str, pp: int, microbatches: int, chunks: int) -> tuple[Generator, Sizes]:
    generator = SCHEDULES.get(ALIASES.get(name, name))
    if generator is None:
        raise ScheduleError(f"no schedule is called {name!r}; there are {', '.join(SCHEDULES)}, or file:PATH.csv")
    return generator, Sizes(pp, microbatches, max(chunks, generator.chunks) if chunks >= 1 else chunks)


def _from_file(path: str, pp: int, microbatches: int) -> Schedule:
    schedule = load(path)
    has = (len(schedule.ranks), schedule.microbatches)
    if has != (pp, microbatches):
        fix = f"set pp={has[0]}, microbatches={has[1]}, or change the file"
        raise ScheduleError(
            f"schedule file {path} is for {has[0]} ranks and {has[1]} microbatches, not {pp} and {microbatches}; {fix}"
        )
    return schedule
