"""The measured timeline: one clock for all ranks, one pipeline, mean costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dryvine.comm import local
from dryvine.parallel.executor import Played, PlayedTimes
from dryvine.parallel.schedule.simulate import Timeline
from dryvine.parallel.schedule.table import build
from dryvine.trainer import timeline
from dryvine.trainer.config import Config
from dryvine.trainer.data.atomic import CannotWrite
from dryvine.trainer.rig import mesh_of
from dryvine.trainer.run_plan import make_plan

Tiny = Callable[..., Config]


def _measured(rank: int, config: Config) -> list[list[tuple[float, float]]] | None:
    """Slots of 1 s on every rank at once; clocks are 100 s apart, and the second data rank starts 50 s later."""
    plan = make_plan(config)
    mesh = mesh_of(plan, torch.device("cpu"))
    timeline.offset = lambda mesh: 100.0 * mesh.rank  # type: ignore[assignment]
    late = 50.0 * mesh.data_rank - 100.0 * rank
    slots = enumerate(plan.schedule.ranks[mesh.pp_rank])
    drawn = timeline.gather_timeline(
        plan.schedule,
        Played(read_times=lambda: PlayedTimes([(slot, late + i, late + i + 1) for i, slot in slots])),
        mesh,
    )
    return None if drawn is None else [[(cell.start, cell.end) for cell in row] for row in drawn.cells]


def test_clocks_are_aligned_and_the_first_pipeline_is_drawn(tiny: Tiny) -> None:
    first, *others = local.run(_measured, 4, tiny("parallel.pp=2", "parallel.dp=2"), deadline=100)
    assert others == [None] * 3
    for row in first:
        np.testing.assert_allclose(row, [(1e3 * i, 1e3 * (i + 1)) for i in range(len(row))], atol=1e-6)


def test_costs_are_means_of_each_kind_of_slot(tmp_path: Path) -> None:
    schedule = build("dualpipe", 2, 4)
    cost = {"F": 1.0, "B": 4.0, "I": 2.0, "W": 3.0, "BF": 4.5}
    rows = []
    for slots in schedule.ranks:
        now, row = 0.0, []
        for number, slot in enumerate(slots):
            # Half of the slots are slower than the mean, half are faster.
            length = cost["".join(sorted(op.kind for op in slot))] * (1.5 if number % 2 else 0.5)
            row.append((now, now + length))
            now += length
        rows.append(row)
    drawn = timeline.simulated.measured(schedule, rows)
    found = timeline.slot_costs(drawn)
    sums: dict[str, list[float]] = {}
    for slots, row in zip(schedule.ranks, rows, strict=True):
        for slot, (start, end) in zip(slots, row, strict=True):
            sums.setdefault("".join(sorted(op.kind for op in slot)), []).append(end - start)
    assert pytest.approx(sum(sums["F"]) / len(sums["F"])) == found.F
    assert found.pairs["BF"] == pytest.approx(sum(sums["BF"]) / len(sums["BF"]))
    both = timeline.write(tmp_path / "timeline.html", drawn)
    assert [one.label for one in both] == ["measured", "simulated at the measured mean costs, ms"]
    assert isinstance(both[1], Timeline)
    with pytest.raises(CannotWrite, match=r"timeline.html: No such file"):  # ends a run in a line
        timeline.write(tmp_path / "gone" / "timeline.html", drawn)
    assert f"F {found.F:.1f}" in (tmp_path / "timeline.html").read_text()
