"""A loss that leaps: back to the newest checkpoint, past the data, and the same data after a restart."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from unittest import mock

import pytest

from dryvine.trainer import loop, spikes
from dryvine.trainer.config import Config
from dryvine.trainer.nonfinite import Diverged
from dryvine.trainer.ramps import Point, points
from dryvine.trainer.run_rows import read
from dryvine.trainer.spikes import Rollback, SpikeWatch, passing_over, rollbacks, write_down
from tests.support.rig import train_on

Tiny = Callable[..., Config]
FAST = ("model.layers=1", "batch.sequences=2", "run.eval_every=100", "run.spike_factor=3", "run.checkpoint_every=2")


def point(step: int) -> Point:
    return Point(step, 4 * step, 4, 32)


def test_a_spike_is_a_loss_of_so_many_medians_once_there_is_a_median() -> None:
    watch = SpikeWatch(2.0)
    assert not any(watch.see(point(n), 100.0 if n == 3 else 1.0) for n in range(spikes.WINDOW)), "too few to judge by"
    assert watch.see(point(20), 1.9) is None
    found = watch.see(point(21), 2.1)
    assert str(found) == "step 22 has loss 2.1, 2.1 times the usual 1"
    assert watch.see(point(22), float("nan")) is None
    assert watch.see(point(22), float("inf")) is None
    off = SpikeWatch(None)
    assert not any(off.see(point(n), 10.0**n) for n in range(40))


def test_steps_after_the_checkpoint_read_what_comes_after_the_spike(tiny: Tiny) -> None:
    config = tiny("batch.sequences=4")
    past = [Rollback(5, 9.0, 1.0, to_step=2, first=8, sequences=12), Rollback(4, 9.0, 1.0, 2, 20, 8)]
    config.run.folder.mkdir()
    for one in past:
        write_down(config.run.folder, one)
    every = points(config.batch, config.data.seq_len)
    steps = list(islice(passing_over(every, rollbacks(config.run.folder)), 4))
    assert [one.data_first for one in steps] == [0, 4, 28, 32]
    assert [one.first for one in steps] == [0, 4, 8, 12], "plans by tokens go on as they were"


def leaping(config: Config, bad: Callable[[Point], bool], window: int = 3) -> list[int]:
    """Train; losses of the steps that `bad` names are tenfold. Returns the first sequence of every step played."""
    real, read_first = loop.one_step, []

    def step(rig: object, at: Point, *more: object) -> loop.LoopStep:
        read_first.append(at.data_first)
        done = real(rig, at, *more)  # type: ignore[arg-type]
        row = done.row
        return loop.replace(done, row=loop.replace(row, loss=row.loss * 10)) if bad(at) else done

    with mock.patch.object(loop, "one_step", step), mock.patch.object(spikes, "WINDOW", window):
        train_on(0, config)
    return read_first


def test_a_run_goes_back_passes_over_the_data_and_says_so(tiny: Tiny) -> None:
    """Steps are played 1 to 6, of which 5 and 6 again, with the sequences after the spike's."""
    config = tiny(*FAST, "run.steps=7")
    played = leaping(config, lambda at: at.data_first == 10)  # the sixth, on its own data only
    assert played == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    (one,) = rollbacks(config.run.folder)
    assert (one.step, one.to_step, one.first, one.sequences) == (6, 4, 8, 4)
    rows = read(config.run.folder)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert rows[-1]["tokens"] == 7 * 2 * config.data.seq_len
    again = leaping(tiny(*FAST, "run.steps=8"), lambda at: False)
    assert again == [18], "a restart reads on behind what was passed over"


def test_spikes_from_the_same_checkpoint_again_and_again_end_the_run(tiny: Tiny) -> None:
    config = tiny(*FAST, "run.steps=7", "run.checkpoint_every=4")
    with pytest.raises(Diverged, match=r"as 2 times before after step 4; lower optim\.lr"):
        leaping(config, lambda at: at.step == 5, window=1)
    assert len(rollbacks(config.run.folder)) == 3


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tiny: Tiny) -> None:
    with pytest.raises(Diverged, match=r"no checkpoint to go back to: lower run\.checkpoint_every"):
        leaping(tiny(*FAST, "run.steps=7", "run.checkpoint_every=100"), lambda at: at.step == 5)
