"""A step with gradients that are not finite changes nothing, and says which rank, layer and tensor they came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dryvine.comm import local
from dryvine.trainer import journal, loop
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.config import Config
from dryvine.trainer.nonfinite import Blame, Diverged, NonfiniteStep, blame, diverged_line
from dryvine.trainer.ramps import Point, points
from dryvine.trainer.rig import Rig
from dryvine.trainer.step import accumulate, train_step
from tests.support.rig import rig_of, train_on

Tiny = Callable[..., Config]
State = dict[tuple[str, int], dict[str, NDArray[np.float32]]]
EXPERT = "layers.1.experts.down"
ON = {1: (), 2: ("parallel.ep=2",)}
BAD = 1  # the step, counted from 0, in which the last rank's share of EXPERT goes bad


def poison(rig: Rig) -> None:
    """From now on, the first element of this rank's gradient of EXPERT is NaN when the backward has ended."""
    zero = rig.optimizer.zero
    reduce, gradient = zero.reduce, dict(rig.model.named_parameters())[EXPERT].main_grad

    def bad() -> None:
        gradient.view(-1)[0] = float("nan")
        reduce()

    zero.reduce = bad  # type: ignore[method-assign]


def cure(rig: Rig) -> None:
    del rig.optimizer.zero.reduce


def _steps(rank: int, config: Config, mode: str) -> tuple[State, dict[str, Any], NonfiniteStep | None]:
    """Three steps, of which BAD is poisoned, or has its update left out by hand."""
    rig = rig_of(config)
    found = None
    for point in islice(points(config.batch, config.data.seq_len), 3):
        if point.step == BAD and mode == "left out":
            accumulate(rig, point)
            rig.model.reset_loads()
        elif point.step == BAD and rank == rig.mesh.size - 1:
            poison(rig)
            found = _one(rig, point)
            cure(rig)
        else:
            found = _one(rig, point) or found
    state = {place: {k: v.numpy() for k, v in fields.items()} for place, fields in rig.optimizer.state().items()}
    return state, {name: bias.numpy() for name, bias in rig.model.buffers.items()}, found


def _one(rig: Rig, point: Point) -> NonfiniteStep | None:
    result = train_step(rig, point)
    return None if result.finite else blame(point, result.played, rig.optimizer.zero, rig.mesh)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_step_is_a_step_left_out(tinier: Tiny, ranks: int) -> None:
    config = tinier(*ON[ranks])
    poisoned = local.run(_steps, ranks, config, "poisoned", deadline=100)
    left_out = local.run(_steps, ranks, config, "left out", deadline=100)
    for (state, biases, found), (wanted, wanted_biases, _) in zip(poisoned, left_out, strict=True):
        assert found == NonfiniteStep(BAD + 1, 8, 8, {ranks - 1: Blame([], [], [EXPERT], [])})
        np.testing.assert_equal(state, wanted)
        np.testing.assert_equal(biases, wanted_biases)
        assert all(fields["step"] == 2 for fields in state.values())


def _bad_weight(rank: int, config: Config) -> tuple[str, set[str]]:
    rig = rig_of(config)
    point = next(points(config.batch, config.data.seq_len))
    if rank == 1:
        with torch.no_grad():
            dict(rig.model.named_parameters())[EXPERT][0, 0, 0] = float("nan")
    found = _one(rig, point)
    assert found
    return str(found), {loss for blame in found.ranks.values() for loss in blame.losses}


def test_a_bad_weight_is_named_before_the_gradients_that_it_spoils(tinier: Tiny) -> None:
    """A NaN in an expert is in the loss of every microbatch whose tokens choose it, and in nearly every gradient."""
    (said, losses), other = local.run(_bad_weight, 2, tinier("parallel.ep=2"), deadline=100)
    assert (said, losses) == other
    assert said.startswith("step 1 (sequences 0 to 7) skipped, gradients not finite: rank 0: balance.layers.2 of micro")
    assert f"rank 1: weight {EXPERT}, balance.layers.2 of microbatches " in said  # the next gate after the expert
    assert any(loss.startswith("loss of microbatches ") for loss in losses)


def _overflow(rank: int, config: Config) -> NonfiniteStep | None:
    rig = rig_of(config)
    reduce = rig.optimizer.zero.reduce

    def huge() -> None:
        dict(rig.model.named_parameters())["head.weight"].main_grad.fill_(3e38)
        reduce()

    rig.optimizer.zero.reduce = huge  # type: ignore[method-assign]
    return _one(rig, next(points(config.batch, config.data.seq_len)))


def test_a_sum_of_finite_gradients_that_overflows_is_named(tinier: Tiny) -> None:
    # Without overlap the sums begin in `reduce`.
    for found in local.run(_overflow, 2, tinier("parallel.ep=2", "parallel.overlap=off"), deadline=100):
        assert [blame.sums for blame in found.ranks.values()] == [["head.weight"]] * len(found.ranks)
        assert found.ranks


def _run(rank: int, config: Config, bad: tuple[int, ...]) -> str:
    """`loop.train` with the steps in `bad` poisoned on the last rank; what it raised."""
    one = loop.train_step

    def step(rig: Rig, point: Point) -> Any:
        if point.step in bad and rank == rig.mesh.size - 1:
            poison(rig)
        out = one(rig, point)
        if "reduce" in vars(rig.optimizer.zero):
            cure(rig)
        return out

    loop.train_step = step  # type: ignore[assignment]
    try:
        train_on(rank, config)
    except Diverged as error:
        return str(error)
    return ""


def test_the_run_goes_on_and_its_folder_tells(tinier: Tiny) -> None:
    config = tinier("parallel.ep=2")
    assert local.run(_run, 2, config, (1, 2, 4), deadline=100) == ["", ""]
    rows = journal.read(config.run.folder)
    assert [row["skipped"] for row in rows] == [0, 1, 2, 0, 1, 0]
    assert [row["grad_norm"] is None for row in rows] == [False, True, True, False, True, False]
    lines = [json.loads(line) for line in (config.run.folder / "skipped.jsonl").read_text().splitlines()]
    assert [(line["step"], line["first"], line["sequences"]) for line in lines] == [
        (2, 8, 8),
        (3, 16, 8),
        (5, 32, 8),
    ]
    assert all(line["ranks"].keys() == {"1"} and line["ranks"]["1"]["gradients"] == [EXPERT] for line in lines)
    strict = json.JSONDecoder(parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for line in (config.run.folder / "metrics.jsonl").read_text().splitlines():
        strict.decode(line)


def test_several_in_a_row_end_the_run_in_one_line_and_save_nothing(tinier: Tiny) -> None:
    config = tinier("parallel.ep=2", "run.checkpoint_every=1", "run.keep_checkpoints=9", "optim.skips=2")
    said = local.run(_run, 2, config, (1, 3, 4), deadline=100)
    assert said[0] == said[1]
    assert said[0].startswith("2 steps in a row were skipped, nothing after step 3 is in the weights")
    assert f"rank 1: gradient {EXPERT}" in said[0]
    assert "\n" not in said[0]
    saved = sorted(path.name for path in (config.run.folder / "checkpoints").iterdir())
    assert saved[-1] == "step-00000004"  # the first of the two, with the weights of step 3
    assert [row["skipped"] for row in journal.read(config.run.folder)] == [0, 1, 0, 1, 2]


def test_a_long_list_is_cut_in_the_line_and_whole_in_the_file() -> None:
    long = NonfiniteStep(7, 96, 16, {3: Blame([], [], [f"layers.{i}.gate.weight" for i in range(9)], [])})
    assert str(long).endswith("rank 3: gradient layers.0.gate.weight, gradient layers.1.gate.weight, gradient "
                              "layers.2.gate.weight and 6 more")  # fmt: skip
    assert str(long) in diverged_line([long])


@pytest.mark.parametrize("what", ["embed.weight", "layers.1.experts.down"])
def test_a_weight_that_goes_bad_is_never_saved_and_the_sound_checkpoint_stays(tinier: Tiny, what: str) -> None:
    """After step 1, with a save due at 2. A row of the embedding that no text reads spoils no gradient, and no step is
    skipped; an expert spoils them all."""
    small = ("model.layers=2", "batch.sequences=2", "run.eval_every=9")
    config = tinier(*small, "run.steps=4", "run.checkpoint_every=1", "run.keep_checkpoints=1")
    one = loop.train_step

    def step(rig: Rig, point: Point) -> Any:
        outcome = one(rig, point)
        if point.step == 1:
            (piece,) = (piece for piece in rig.optimizer.pieces if piece.name == what)
            piece.master[-1] = float("nan")
            rig.publish()
        return outcome

    with mock.patch.object(loop, "train_step", step), pytest.raises(Diverged, match=rf"rank 0: {what} \(master\)"):
        train_on(0, config)
    assert [run_folder.step_of(path) for path in run_folder.complete(config.run.folder)] == [1]
    train_on(0, config)
    assert [row["step"] for row in journal.read(config.run.folder)] == [1, 2, 3, 4]
    assert run_folder.step_of(run_folder.complete(config.run.folder)[-1]) == 4
