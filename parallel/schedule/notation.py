"""A schedule as a text that people write: the compute-only CSV of torch.distributed.pipelining, one row per rank.

    2F0                  forward of stage 2, microbatch 0; B, I and W likewise
    (2F3;5B1)OVERLAP_F_B a pair; torch knows only F_B, here any two kinds: OVERLAP_F_F, OVERLAP_I_W, ...
    (blank)              nothing

Numbers count from 0. The notation has no routes: a microbatch's route is where its stages stand, so it is read off the
rows. That keeps files exchangeable with torch's, and costs one inference here instead of a header in every file.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import cast

from dryvine.parallel.schedule.ir import Kind, Op, Schedule, Slot
from dryvine.parallel.schedule.rules import ScheduleError, opposite, straight, vee

_OP = re.compile(r"(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"\(([^;]*);([^;]*)\)OVERLAP_([FBIW])_([FBIW])")

Routes = tuple[tuple[int, ...], ...]


def op_text(op: Op) -> str:
    return f"{op.stage}{op.kind}{op.microbatch}"


def slot_text(slot: Slot) -> str:
    if len(slot) == 1:
        return op_text(slot[0])
    return f"({';'.join(map(op_text, slot))})OVERLAP_{'_'.join(op.kind for op in slot)}"


def to_csv(schedule: Schedule) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([slot_text(slot) for slot in slots] for slots in schedule.ranks)
    return out.getvalue()


def from_csv(text: str, name: str = "file") -> Schedule:
    """Read a schedule; raises ScheduleError at a cell that cannot be read. What the cells say is for `check`."""
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    ranks = [[_slot(cell, name, rank, column) for column, cell in enumerate(row)] for rank, row in enumerate(rows)]
    filled = tuple(tuple(slot for slot in slots if slot) for slots in ranks)
    ops = [(rank, op) for rank, slots in enumerate(filled) for slot in slots for op in slot]
    if not ops:
        raise ScheduleError(f"{name}: no op found; a row holds one rank's cells, such as 0F0,0F1,0B0,0B1")
    routes, route_of = _routes(ops, len(rows))
    routed = tuple(tuple(tuple(op._replace(route=route_of[op.microbatch]) for op in s) for s in r) for r in filled)
    return Schedule(name, 1 + max(op.microbatch for _, op in ops), routes, routed)


def _slot(cell: str, name: str, rank: int, column: int) -> Slot:
    text = cell.strip()
    pair = _PAIR.fullmatch(text)
    parts = [pair[1].strip(), pair[2].strip()] if pair else [text] if text else []
    found = [_OP.fullmatch(part) for part in parts]
    kinds = [m[2] for m in found if m]
    if len(kinds) < len(parts) or (pair and kinds != [pair[3], pair[4]]):
        form = "2F0 (stage, F|B|I|W, microbatch) or (2F3;5B1)OVERLAP_F_B"
        raise ScheduleError(f"{name}: row {rank + 1}, cell {column + 1}: cannot read {text!r}; write {form}")
    return tuple(Op(cast(Kind, m[2]), int(m[1]), int(m[3])) for m in found if m)


def _routes(ops: Iterable[tuple[int, Op]], pp: int) -> tuple[Routes, dict[int, int]]:
    """The routes in use, and each microbatch's. An op that stands on a wrong rank must not bend them, so the layouts
    of the named schedules come first: one of them is taken unless none fits and the rows agree on another."""
    where: dict[int, Counter[tuple[int, int]]] = defaultdict(Counter)  # microbatch -> (stage, rank) -> ops there
    for rank, op in ops:
        where[op.microbatch][op.stage, rank] += 1
    stages = 1 + max(stage for seen in where.values() for stage, _ in seen)
    total = sum(seen.total() for seen in where.values())
    layouts = [(routes, *_assign(routes, where)) for routes in _known(stages, pp)]
    if all(fit < total for _, _, fit in layouts):
        paths = tuple(dict.fromkeys(_path(seen, stages) for _, seen in sorted(where.items())))
        own = (paths, *_assign(paths, where))
        if own[2] == total or not layouts:
            return own[:2]
    routes, route_of, _ = max(layouts, key=lambda layout: layout[2])
    return routes, route_of


def _known(stages: int, pp: int) -> list[Routes]:
    if stages == pp:
        return [straight(pp), opposite(pp)]
    if stages % pp:
        return []
    loop = (tuple(s % pp for s in range(stages)),)
    return [vee(pp), loop] if stages == 2 * pp else [loop]


def _assign(routes: Routes, where: dict[int, Counter[tuple[int, int]]]) -> tuple[dict[int, int], int]:
    """Each microbatch's best route, and how many ops then stand where they should."""

    def fit(microbatch: int, route: Sequence[int]) -> int:
        return sum(n for (stage, rank), n in where[microbatch].items() if route[stage] == rank)

    best = {m: max(range(len(routes)), key=lambda r: fit(m, routes[r])) for m in where}
    return best, sum(fit(m, routes[r]) for m, r in best.items())


def _path(seen: Counter[tuple[int, int]], stages: int) -> tuple[int, ...]:
    """Where most ops of each stage stand; rank 0 for a stage that has none."""
    rank_of = dict.fromkeys(range(stages), 0)
    rank_of.update(place for place, _ in reversed(seen.most_common()))
    return tuple(rank_of.values())
