"""Every figure of a step and every weight after it, against plain torch in FP64: what a comparison of two layouts
cannot see is what both do wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from dryvine.comm import local
from dryvine.trainer import journal
from dryvine.trainer.config import Config
from dryvine.trainer.data.splits import open_data
from dryvine.trainer.model.initialise import initialise
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import Rig
from dryvine.trainer.step import accumulate, evaluate, imbalances, train_step
from dryvine.trainer.tensors.weight import Weight
from tests.support import reference_model
from tests.support.rig import rig_of, train_on

Tiny = Callable[..., Config]
LAYOUTS = [
    (),
    ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"),
    ("parallel.dp=2", "parallel.microbatch_sequences=2"),
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["one process", "pp2 ep2", "dp2"])


class Truth:
    """Losses, gradients and expert loads of sequences, by the reference model in FP64."""

    def __init__(self, rig: Rig, tokens: Tensor) -> None:
        shape = rig.config.model
        masks: list[Tensor] = []
        chosen = reference_model._chosen

        def record(*given: Tensor) -> Tensor:
            masks.append(chosen(*given))  # type: ignore[arg-type]
            return masks[-1]

        self.params = {n: w.detach().double().requires_grad_() for n, w in rig.model.named_parameters()}
        biases = {name: bias.double() for name, bias in rig.model.buffers.items()}
        with mock.patch.object(reference_model, "_chosen", record):
            self.losses = reference_model.losses(self.params | biases, shape, tokens)
        self.loads = torch.stack([mask.flatten(0, 1).sum(0) for mask in masks])  # [layers, experts], forward order

    def sum(self, prefix: str) -> float:
        return float(sum(loss.detach() for name, loss in self.losses.items() if name.startswith(prefix)))

    def gradients(self) -> Mapping[str, Tensor]:
        torch.stack(list(self.losses.values())).sum().backward()
        return {name: p.grad for name, p in self.params.items() if p.grad is not None}


def norm_of(grads: Mapping[str, Tensor]) -> float:
    return float(torch.cat([grad.flatten() for grad in grads.values()]).norm())


def first_step(rig: Rig) -> Truth:
    return Truth(rig, torch.from_numpy(rig.data.train.sequences(0, rig.config.batch.sequences)))


def worst(loads: Tensor) -> float:
    return max(max(layer) * len(layer) / sum(layer) for layer in loads.tolist())


@layouts
def test_figures_are_those_of_plain_torch(tinier: Tiny, layout: tuple[str, ...]) -> None:
    config = tinier(*layout, "run.steps=2", "run.checkpoint_every=9", "run.eval_every=9", "model.balance_alpha=0.1")
    truth = first_step(rig_of(config.model_copy(update={"parallel": tinier().parallel})))
    local.run(train_on, config.parallel.world, config, deadline=100)
    first, second = journal.read(config.run.folder)
    close = partial(pytest.approx, rel=1e-5)
    assert first["loss"] == close(truth.sum("loss"))
    assert first["mtp_loss"] == close(truth.sum("mtp."))
    assert first["balance_loss"] == close(truth.sum("balance."))
    assert first["grad_norm"] == close(norm_of(truth.gradients()))
    assert first["load_imbalance"] == close(worst(truth.loads))
    assert first["rank_imbalance"] == close(worst(truth.loads.unflatten(1, (config.parallel.ep, -1)).sum(-1)))
    assert [first["tokens"], second["tokens"]] == [8 * 32, 2 * 8 * 32]
    assert [first["lr"], second["lr"]] == close([config.optim.lr / 2, config.optim.lr])
    assert first["tokens_per_second"] == close(8 * 32 / first["seconds"])
    assert first["val_loss"] == pytest.approx(5.77, abs=0.1)  # ln 320, which is what a model starts from
    assert second["val_loss"] != first["val_loss"]  # the last step is validated too


def test_a_step_is_clipped_adamw(tinier: Tiny) -> None:
    """Weights after two steps. (Adam's first steps divide rounding noise by its own size: compared in the L2 norm.)"""
    config = tinier("optim.lr=1e-2", "optim.clip=0.5")
    rig, other = rig_of(config), rig_of(config)
    params = {name: w.detach().double().requires_grad_() for name, w in rig.model.named_parameters()}
    kinds = [{"params": [p for p in params.values() if (p.dim() > 1) is decays], "weight_decay": decay}
             for decays, decay in ((True, 0.1), (False, 0.0))]  # fmt: skip
    adam = torch.optim.AdamW(kinds, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps)
    for _, point in zip(range(2), points(config.batch, config.data.seq_len), strict=False):
        with torch.no_grad():
            for name, weight in other.model.named_parameters():
                weight.copy_(params[name])
        for name, bias in other.model.buffers.items():
            bias.copy_(rig.model.buffers[name])
        truth = Truth(other, torch.from_numpy(rig.data.train.sequences(point.first, point.sequences)))
        for name, grad in truth.gradients().items():
            params[name].grad = grad
        for group in adam.param_groups:
            group["lr"] = config.optim.lr * (point.step + 1) / 2
        torch.nn.utils.clip_grad_norm_(params.values(), config.optim.clip)
        adam.step()
        assert train_step(rig, point).norm > config.optim.clip
    start = dict(rig_of(config).model.named_parameters())
    for name, weight in rig.model.named_parameters():
        moved = (params[name] - start[name].double()).norm()
        assert float((weight - params[name]).detach().norm() / moved.detach()) < 1e-2, name


def test_gate_biases_follow_the_load_of_the_whole_batch(tinier: Tiny) -> None:
    rig = rig_of(tinier("model.bias_gamma=0.25"))
    truth = first_step(rig)
    train_step(rig, next(points(rig.config.batch, rig.config.data.seq_len)))
    for bias, load in zip(rig.model.buffers.values(), truth.loads, strict=True):
        torch.testing.assert_close(bias, torch.sign(load.mean() - load).float() * 0.25)
    assert not any(load.any() for load in rig.model.loads.values())  # counted anew


def _evaluate(rank: int, config: Config) -> float:
    rig = rig_of(config)
    evaluate(rig)
    return evaluate(rig).loss


@layouts
def test_validation_is_the_mean_over_all_its_batches(tinier: Tiny, layout: tuple[str, ...]) -> None:
    """And the same each time: sequences 0 to 15 of the held-out split."""
    config = tinier(*layout, "run.eval_batches=2")
    rig = rig_of(config.model_copy(update={"parallel": tinier().parallel}))
    parts = [Truth(rig, torch.from_numpy(rig.data.val.sequences(n, 8))).sum("loss") for n in (0, 8)]
    assert parts[0] != pytest.approx(parts[1], rel=1e-4)
    losses = local.run(_evaluate, config.parallel.world, config, deadline=100)
    assert losses == pytest.approx([sum(parts) / 2] * len(losses), rel=1e-5)


def test_validation_counts_no_load_and_makes_no_gradient(tinier: Tiny) -> None:
    """Loads move the gate biases, and validation may not."""
    rig = rig_of(tinier())
    evaluate(rig)
    assert not any(load.any() for load in rig.model.loads.values())
    assert not any(bucket.grads.any() for bucket in rig.optimizer.zero.buckets)


def test_a_step_starts_from_zero_gradients(tinier: Tiny) -> None:
    rig = rig_of(tinier())
    made = []
    for _ in range(2):
        accumulate(rig, next(points(rig.config.batch, rig.config.data.seq_len)))
        made.append([bucket.grads.clone() for bucket in rig.optimizer.zero.buckets])
    for first, second in zip(*made, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6 * float(first.abs().max()))


def test_the_imbalance_is_that_of_the_worst_layer() -> None:
    assert imbalances(torch.tensor([[4, 0], [2, 2]]), 2) == (2.0, 2.0)
    assert imbalances(torch.tensor([[2, 2, 2, 2], [3, 1, 2, 2]]), 1) == (1.5, 1.0)


def test_a_rank_holds_neighbouring_experts() -> None:
    assert imbalances(torch.tensor([[3, 1, 2, 2, 2, 2]]), 2) == (1.5, 1.0)
    assert imbalances(torch.tensor([[3, 1, 2, 2, 2, 2]]), 3) == (1.5, 1.0)
    assert imbalances(torch.tensor([[3, 3, 0, 2, 2, 2]]), 3) == (1.5, 1.5)


def test_the_seed_reaches_the_order_of_the_data(tinier: Tiny) -> None:
    data = {seed: open_data(tinier(f"run.seed={seed}")) for seed in (0, 7)}
    assert data[7].train.order.seed == data[7].val.order.seed == 7
    assert (data[7].train.sequences(0, 1) != data[0].train.sequences(0, 1)).any()


def test_the_seed_reaches_the_weights(tinier: Tiny) -> None:
    drawn = {}
    for seed in (0, 7):
        config = tinier(f"run.seed={seed}")
        held = dict(rig_of(config).model.named_parameters())["embed.weight"]
        drawn[seed] = Weight(torch.empty_like(held))
        initialise("embed.weight", drawn[seed], seed, config.model.init_std, 0)
        assert torch.equal(held, drawn[seed])
    assert not torch.equal(drawn[0], drawn[7])
