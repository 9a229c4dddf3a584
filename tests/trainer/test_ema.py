"""The average of the parameters: what it is, that training does not notice it, and that it survives a run's end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dryvine.comm import local
from dryvine.trainer import journal
from dryvine.trainer.config import Config
from dryvine.trainer.ema import Ema
from dryvine.trainer.fp8.weights import WeightCache
from dryvine.trainer.ramps import points
from dryvine.trainer.step import evaluate, evaluate_average, train_step
from tests.support.rig import go, rig_of, train_on

Tiny = Callable[..., Config]
Averages = dict[tuple[str, int], NDArray[np.float32]]
TIMES = (
    "checkpoint_stall_ms",
    "mbytes_inside_nodes",  # a validation's are in the next row: a run that stopped there has them in none
    "seconds",
    "slowest_rank_ms",
    "tokens_per_second",
    "bubble",
    "exposed_comm_ms",
    "exposed_zero_ms",
    "exposed_comm_share",
)
HIGH = ("optim.ema=0.75", "optim.lr=1e-2")  # so that a few steps move it, and away from the weights


def run(config: Config) -> list[dict[str, float | None]]:
    local.run(train_on, config.parallel.world, config, deadline=100)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in journal.read(config.run.folder)]


def named(config: Config, name: str, **run: object) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name, **run})})


def test_it_is_the_average_of_the_masters() -> None:
    torch.manual_seed(0)
    masters = [torch.randn(40), torch.randn(7)]
    ema, wanted = Ema(masters, 0.9), [m.double() for m in masters]
    for _ in range(20):
        ema.before_update()
        for master in masters:
            master.add_(torch.randn_like(master))
        ema.after_update()
        wanted = [0.9 * w + 0.1 * m.double() for w, m in zip(wanted, masters, strict=True)]
    for average, want in zip(ema.averages, wanted, strict=True):
        torch.testing.assert_close(average.double(), want, rtol=1e-6, atol=1e-6)


def test_the_masters_may_change_while_it_is_blended() -> None:
    """The thread must see the masters of its own step, however late it runs."""
    master = torch.zeros(1 << 20)
    ema = Ema([master], 0.5)
    for value in (1.0, 2.0):
        ema.before_update()
        master.fill_(value)
        ema.after_update()
        master.fill_(99.0)
    assert ema.averages[0].unique().tolist() == [1.25]


def test_an_error_in_the_thread_is_raised_by_the_next_who_waits() -> None:
    ema = Ema([torch.zeros(3)], 0.5)
    ema._averages[0] = torch.zeros(4)
    ema.after_update()
    with pytest.raises(RuntimeError, match="size"):
        ema.join()
    ema.join()


def test_training_has_the_same_bits_with_and_without(tinier: Tiny) -> None:
    without, having = rig_of(tinier("optim.lr=1e-2")), rig_of(tinier(*HIGH))
    losses = go(without, 3)
    for point, loss in zip(points(having.config.batch, having.config.data.seq_len), losses, strict=False):
        played = train_step(having, point).played
        assert sum(float(one) for of in played.losses.values() for one in of) == loss
        assert evaluate_average(having) != evaluate(having).loss
    for one, other in zip(without.optimizer.pieces, having.optimizer.pieces, strict=True):
        assert torch.equal(one.master, other.master), one.name


@pytest.mark.long
def test_validation_uses_the_average_and_puts_the_weights_back(tinier: Tiny) -> None:
    """With FP8, whose copies of weights must be dropped both times."""
    rig = rig_of(tinier(*HIGH, "run.dtype=bf16", "fp8.preset=deepseek_v3"))
    go(rig, 3)
    ema = rig.optimizer.ema
    assert ema
    weights, loss = [p.clone() for _, p in rig.model.named_parameters()], evaluate(rig).loss
    averaged = evaluate_average(rig)
    for before, (name, after) in zip(weights, rig.model.named_parameters(), strict=True):
        assert torch.equal(before, after), name
    assert evaluate(rig).loss == loss
    for master, average in zip(ema.masters, ema.averages, strict=True):
        master.copy_(average)
    rig.publish()
    assert evaluate(rig).loss == averaged
    assert averaged != loss
    weight = next(w for n, w in rig.model.named_parameters() if n.endswith("attention.o.weight"))
    assert rig.fp8
    fresh = WeightCache(rig.config.fp8).fprop(weight)
    assert torch.equal(rig.fp8.cache.fprop(weight).dequantize(), fresh.dequantize())


def _averages(rank: int, config: Config) -> tuple[Averages, list[float | None]]:
    rig = rig_of(config)
    losses = []
    for point in islice(points(config.batch, config.data.seq_len), 3):
        train_step(rig, point)
        losses.append(evaluate_average(rig))
    return {place: of["ema"].numpy().copy() for place, of in rig.optimizer.state().items()}, losses


def test_every_layout_has_the_same_average(tinier: Tiny) -> None:
    alone, many = (
        local.run(_averages, config.parallel.world, config, deadline=100)
        for config in (tinier(*HIGH), tinier(*HIGH, "parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"))
    )
    (whole, losses), seen = alone[0], 0
    for part, theirs in many:
        assert theirs == pytest.approx(losses, rel=1e-5)
        for (name, start), values in part.items():
            wanted = whole[name, 0][start : start + len(values)]
            # Adam's first steps divide rounding noise by its own size: compared as one vector, as `verify` does.
            assert np.linalg.norm(values - wanted) <= 1e-4 * np.linalg.norm(wanted), name
            seen += len(values)
    assert seen == sum(map(len, whole.values()))


@pytest.mark.long
def test_a_run_resumes_with_its_average_and_bf16_moments(tinier: Tiny) -> None:
    config = tinier(*HIGH, "optim.moments=bf16", "parallel.ep=2")
    whole = run(named(config, "whole"))
    run(named(config, "parts", steps=3))
    assert run(named(config, "parts")) == whole
    known = [row["val_loss_ema"] for row in whole]
    assert [value is not None for value in known] == [True, False, True, False, False, True]
    assert known[-1] != whole[-1]["val_loss"]


@pytest.mark.long
def test_another_layout_and_other_moments_read_the_same_checkpoint(tinier: Tiny) -> None:
    """FP32 moments become BF16 and the other way round; the average is the same numbers, cut elsewhere."""
    whole = run(named(tinier(*HIGH, "optim.moments=bf16"), "whole"))
    run(named(tinier(*HIGH, "optim.moments=fp32"), "parts", steps=3))
    moved = run(named(tinier(*HIGH, "optim.moments=bf16", "parallel.pp=2"), "parts", steps=5))
    moved = run(named(tinier(*HIGH, "optim.moments=fp32"), "parts"))
    for ours, theirs in zip(moved, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        if theirs["val_loss_ema"] is not None and ours["val_loss_ema"] is not None:
            assert ours["val_loss_ema"] == pytest.approx(theirs["val_loss_ema"], rel=1e-3)


@pytest.mark.long
def test_a_checkpoint_without_an_average_starts_one_and_says_so(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    train_on(0, named(tiny("optim.lr=1e-2"), "parts", steps=3))
    config = named(tiny("optim.lr=1e-2", "optim.ema=0.999999"), "parts")
    train_on(0, config)
    rows = journal.read(config.run.folder)
    assert "optim.ema starts from the weights of step 3" in " ".join(capsys.readouterr().out.split())
    assert rows[2]["val_loss_ema"] is None
    assert rows[5]["val_loss_ema"] == pytest.approx(rows[2]["val_loss"], rel=1e-4)  # only gate biases have moved
    assert rows[5]["val_loss"] < 0.9 * rows[2]["val_loss"]
