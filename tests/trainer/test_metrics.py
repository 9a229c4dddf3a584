"""Figures over ranks: which are summed, which are means, and which are the worst rank's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dryvine.comm import local
from dryvine.parallel.executor import Played, PlayedTimes
from dryvine.parallel.schedule.ir import Op
from dryvine.trainer.config import Config
from dryvine.trainer.metrics import metrics_row, reduce_figures
from dryvine.trainer.ramps import points
from dryvine.trainer.step import Balance, StepOutcome
from tests.support.rig import rig_of

Tiny = Callable[..., Config]


def _row(rank: int, config: Config) -> tuple[dict[str, Any], bool]:
    """Rank 0 ran two slots back to back in 4 s, rank 1 a pair in 1 s and stood still for another."""
    rig = rig_of(config)
    f0, f1, b = Op("F", 0, 0), Op("F", 0, 1), Op("B", 0, 0)
    timelines = [[((f0,), 10.0, 13.0), ((f1,), 13.0, 14.0)], [((f0, b), 20.0, 21.0)]]
    played = Played(
        losses={
            "loss": [torch.tensor(8.0), torch.tensor(24.0 + rank)],
            "mtp.0": [torch.tensor(1.0)],
            "balance.layers.3": [torch.tensor(0.5)],
            "balance.mtp.0": [torch.tensor(0.25)],
        },
        started=(10.0, 20.0)[rank],
        ended=(14.0, 22.0)[rank],
        read_times=lambda: PlayedTimes(timelines[rank], exposed=(0.1, 0.3)[rank]),
    )
    rig.dispatcher.meter.add(("self", "intra", "inter"), (9, 3, rank), 500_000)
    point = next(points(config.batch, config.data.seq_len))
    figures = reduce_figures(rig, played, seconds=(5.0, 8.0)[rank], stop=rank == 1)
    again = reduce_figures(rig, played, seconds=1.0, stop=False)
    assert not again.stop
    assert again.sums.bytes_inside_nodes == again.sums.bytes_between_nodes == 0  # counted anew
    row = metrics_row(rig, point, StepOutcome(played, 3.0, Balance(1.5, 1.25)), figures)
    return vars(row), figures.stop


def test_each_figure_is_reduced_as_its_name_says(tiny: Tiny) -> None:
    config = tiny("parallel.ep=2")
    (row, stop), other = local.run(_row, 2, config, deadline=100)
    assert (row, stop) == other
    assert stop  # one rank was asked
    assert row["loss"] == (8 + 24 + 8 + 25) / 16
    assert row["mtp_loss"] == 2 / 16
    assert row["balance_loss"] == 1.5 / 16
    assert row["bubble"] == 0.5  # rank 1's
    assert row["overlapped_share"] == pytest.approx(1 / 3)
    assert row["seconds"] == 8.0
    assert row["tokens_per_second"] == 16 * 32 / 8
    assert row["exposed_comm_ms"] == pytest.approx(200)
    assert row["exposed_comm_share"] == pytest.approx(0.2 / 8)
    assert row["slowest_rank_ms"] == pytest.approx(1e3 * (4 - (4 + 2) / 2))
    assert row["mbytes_inside_nodes"] == pytest.approx(3.0)
    assert row["mbytes_between_nodes"] == pytest.approx(0.5)
    assert (row["grad_norm"], row["load_imbalance"], row["rank_imbalance"]) == (3.0, 1.5, 1.25)
    assert (row["step"], row["tokens"]) == (1, 16 * 32)


def test_what_a_run_does_not_have_is_null(tiny: Tiny) -> None:
    config = tiny("model.mtp_depth=0", "model.balance_alpha=0", "parallel.overlap=off")
    rig, loss = rig_of(config), torch.tensor(1.0)
    slot = (Op("F", 0, 0), Op("B", 0, 1))
    played = Played({"loss": [loss]}, ended=1.0, read_times=lambda: PlayedTimes([(slot, 0.0, 1.0)]))
    figures = reduce_figures(rig, played, 1.0, stop=False)
    point = next(points(config.batch, config.data.seq_len))
    row = metrics_row(rig, point, StepOutcome(played, 1.0, Balance(1.0, 1.0)), figures)
    assert (row.mtp_loss, row.balance_loss, row.fp8_bad_tiles, row.fp8_floored_share) == (None, None, None, None)
    assert (row.val_loss, row.val_loss_ema, row.skipped, row.overlapped_share) == (None, None, 0, 0.0)


def test_tiles_of_fp8_are_counted_in_the_steps_that_count_them(tiny: Tiny) -> None:
    from dryvine.trainer.step import train_step

    small = ("model.layers=2", "batch.sequences=2")
    rig = rig_of(tiny(*small, "run.dtype=bf16", "fp8.preset=deepseek_v3", "fp8.guard_every=2"))
    rows = []
    for _, point in zip(range(3), points(rig.config.batch, rig.config.data.seq_len), strict=False):
        outcome = train_step(rig, point)
        rows.append(metrics_row(rig, point, outcome, reduce_figures(rig, outcome.played, 1.0, stop=False)))
    assert [row.fp8_bad_tiles for row in rows] == [0, None, 0]
    assert [row.fp8_floored_share is None for row in rows] == [False, True, False]
    assert rows[0].fp8_floored_share is not None
    assert 0 < rows[0].fp8_floored_share < 1
