"""The comparison of two layouts by itself: what it must not overlook."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dryvine.trainer.config import Config
from dryvine.trainer.deviations import Deviation, Run, assembled, deviations, table
from dryvine.trainer.ramps import points
from dryvine.trainer.step import accumulate
from dryvine.trainer.verify import alone, play
from tests.support.rig import go, rig_of

Tiny = Callable[..., Config]


def run(**changes: object) -> Run:
    tensors = {
        "layers.0.attention.o.weight": np.array([3.0, 4.0], np.float32),
        "layers.1.attention.o.weight": np.array([0.0, 0.0], np.float32),
        "head.weight": np.array([1.0], np.float32),
    }
    return replace(Run((5.0, 4.0), (1.0, 2.0), tensors, dict(tensors)), **changes)  # type: ignore[arg-type]


def by_kind(one: Run, many: Run) -> dict[str, Deviation]:
    return {deviation.kind: deviation for deviation in deviations(one, many)}


def test_equal_runs_do_not_deviate() -> None:
    assert [d.largest for d in deviations(run(), run())] == [0.0] * 6
    assert set(by_kind(run(), run())) == {
        "loss",
        "gradient norm",
        "gradient layers.N.attention.o.weight",
        "gradient head.weight",
        "weight layers.N.attention.o.weight",
        "weight head.weight",
    }


def test_deviations_are_relative_to_one_process_in_the_l2_norm() -> None:
    off = run().weights | {"layers.0.attention.o.weight": np.array([6.0, 8.0], np.float32)}
    found = by_kind(run(), run(weights=off, losses=(5.0, 5.0)))
    kind = "weight layers.N.attention.o.weight"
    assert found[kind] == Deviation(kind, 1.0, "layers.0.attention.o.weight")
    assert found["loss"] == Deviation("loss", 0.25, "step 2")
    assert not found["loss"].fine
    assert found["gradient head.weight"].fine


def test_where_one_process_has_zero_the_deviation_is_absolute() -> None:
    off = run().grads | {"layers.1.attention.o.weight": np.array([0.0, 0.25], np.float32)}
    assert by_kind(run(), run(grads=off))["gradient layers.N.attention.o.weight"].largest == 0.25


@pytest.mark.parametrize("first", [0, 1])
def test_a_nan_is_the_worst_and_never_fine(first: int) -> None:
    losses = [100.0, 100.0]
    losses[first] = math.nan
    worst = by_kind(run(), run(losses=tuple(losses)))["loss"]
    assert math.isnan(worst.largest)
    assert worst.where == f"step {first + 1}"
    assert not worst.fine


def test_a_layout_with_other_parameters_is_an_error() -> None:
    less = {name: values for name, values in run().grads.items() if name != "head.weight"}
    for one, many in ((run(), run(grads=less)), (run(grads=less), run()), (run(weights=less), run())):
        with pytest.raises(AssertionError, match=r"other parameters: \['head\.weight'\]"):
            deviations(one, many)


def test_pieces_must_cover_a_parameter_once() -> None:
    values = np.arange(6, dtype=np.float32)
    assert assembled([{("w", 4): values[4:]}, {("w", 0): values[:4]}])["w"].tolist() == values.tolist()
    for start in (3, 5):
        with pytest.raises(AssertionError, match="do not cover it once"):
            assembled([{("w", start): values[start:]}, {("w", 0): values[:4]}])


def test_what_is_played_are_the_true_gradients(tiny: Tiny) -> None:
    """Not those that the update has clipped."""
    config = alone(tiny("parallel.ep=2", "run.dtype=bf16", "model.layers=2", "optim.clip=0.1"))
    assert (config.parallel.world, config.run.dtype) == (1, "fp32")
    played, rig = play(config, steps=1), rig_of(config)
    losses = accumulate(rig, next(points(config.batch, config.data.seq_len))).losses
    assert played.losses == (pytest.approx(sum(float(loss) for some in losses.values() for loss in some) / 16),)
    norm = np.linalg.norm(np.concatenate([grad.astype(np.float64) for grad in played.grads.values()]))
    assert played.norms == (pytest.approx(norm),)
    assert norm > config.optim.clip


def test_what_is_played_are_whole_steps(tiny: Tiny) -> None:
    """With the weights that training has after them, gate biases that steer the routing included."""
    config = alone(tiny("model.layers=2", "model.bias_gamma=0.5", "batch.sequences=4"))
    weights, rig = play(config, steps=3).weights, rig_of(config)
    go(rig, 3)
    assert {piece.name for piece in rig.optimizer.pieces} == set(weights)
    for piece in rig.optimizer.pieces:
        np.testing.assert_array_equal(weights[piece.name], piece.master.numpy())


def test_two_runs_of_one_layout_may_not_differ_at_all() -> None:
    off = run().weights | {"head.weight": np.array([1 + 2**-20], np.float32)}
    found = {d.kind: d.fine for d in deviations(run(), run(weights=off), tolerance=0.0)}
    assert [kind for kind, fine in found.items() if not fine] == ["weight head.weight"]


def test_the_table_names_the_tensor_that_deviates() -> None:
    off = run().weights | {"layers.0.attention.o.weight": np.array([3.0, 4.5], np.float32)}
    columns = [list(column.cells) for column in table(deviations(run(), run(weights=off)), "title").columns]
    assert columns[0] == ["loss", "gradient norm", "head.weight", "layers.N.attention.o.weight"]
    assert columns[1] == ["[green]0.0e+00[/]"] * 4
    assert columns[2] == ["", "", "[green]0.0e+00[/]", "[bold red]1.0e-01 in layers.0.attention.o.weight[/]"]
