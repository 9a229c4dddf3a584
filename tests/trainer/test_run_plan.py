"""A run is planned once: one schedule per batch size, checked before anything else happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from dryvine.comm.copy_wire import Line
from dryvine.parallel.flow_control import slots_by_line
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.rules import Sizes
from dryvine.parallel.schedule.table import SCHEDULES
from dryvine.trainer import run_plan
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.run_plan import make_plan
from tests.support.rig import train_on

Tiny = Callable[..., Config]
RAMP = ("batch.ramp_from=8", "batch.ramp_increment=4", "batch.ramp_tokens=300")


def test_a_run_builds_a_schedule_per_batch_size_and_no_more(tiny: Tiny) -> None:
    """From the config to the last step, with a ramp, validation, a timeline and a resumed run in between."""
    built = []
    generator = SCHEDULES["one_f_one_b"]

    def make(sizes: Sizes) -> Schedule:
        built.append(sizes.microbatches)
        return generator.make(sizes)

    config = tiny(*RAMP, "run.steps=3", "run.timeline_step=2")
    with mock.patch.dict(SCHEDULES, one_f_one_b=generator._replace(make=make)):
        train_on(0, config)
    assert built == [8, 12, 16]


def test_a_plan_has_the_microbatches_of_every_size(tiny: Tiny) -> None:
    plan = make_plan(tiny(*RAMP, "parallel.dp=2", "parallel.microbatch_sequences=2"))
    assert {n: program.schedule.microbatches for n, program in plan.training.items()} == {8: 2, 12: 3, 16: 4}
    assert plan.schedule.microbatches == plan.validation.schedule.microbatches == 4
    assert {op.kind for op in plan.validation.schedule.ops(0)} == {"F"}


def test_every_size_of_a_ramp_is_checked(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"batch\.sequences = 7 is not a multiple of .* = 2; try 6 or 8"):
        make_plan(tiny("parallel.ep=2", "batch.ramp_from=7", "batch.ramp_increment=3", "batch.ramp_tokens=300"))
    dualpipe = ("parallel.pp=2", "parallel.schedule=dualpipe")
    with pytest.raises(ConfigError, match=r"dualpipe cannot run .*microbatches=2.*batch\.sequences 2 / 1\)"):
        make_plan(tiny(*dualpipe, "batch.ramp_from=2", "batch.ramp_increment=2", "batch.ramp_tokens=300"))


def test_each_rank_gets_the_blocks_of_its_stages(tiny: Tiny) -> None:
    plan = make_plan(tiny("parallel.pp=2", "parallel.schedule=dualpipev"))
    assert len(plan.blocks) == 4
    assert plan.blocks_of(0) == {0: plan.blocks[0], 3: plan.blocks[3]}
    assert plan.blocks_of(1) == {1: plan.blocks[1], 2: plan.blocks[2]}
    assert plan.blocks[3][-2:] == ("head", "mtp.0")


def test_messages_have_room_in_validation_too(tiny: Tiny) -> None:
    """1F1B posts one forward at a time to rank 1 in training, and two at once in validation; one more is filled."""
    plan = make_plan(tiny("parallel.pp=2"))
    down = Line(0, 1, (0, "down"))
    assert slots_by_line(plan.training.values())[down] == 2
    assert slots_by_line(plan.programs)[down] == 3


def test_blocks_are_shared_out_by_what_they_cost(tiny: Tiny) -> None:
    """A head and MTP over 100,000 words cost more than all layers together."""
    plan = make_plan(tiny("parallel.pp=2", "model.vocab=100000"))
    assert plan.blocks == (("embed", *(f"layers.{i}" for i in range(6))), ("head", "mtp.0"))


def test_a_schedule_of_the_users_own_is_checked(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1\n")
    with pytest.raises(ConfigError, match=r"parallel\.schedule: .*mine\.csv: rank 1, slot 2: 1F1 has no backward"):
        make_plan(tiny("parallel.pp=2", "batch.sequences=2", f'parallel.schedule="file:{tmp_path}/mine.csv"'))


def test_the_file_is_named_with_what_is_wrong_in_its_layout(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"tiny\.toml: batch\.sequences = 17 is not a multiple"):
        run_plan.load_plan("tests/tiny.toml", ("parallel.ep=2", "batch.sequences=17"))
