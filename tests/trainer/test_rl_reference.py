"""Updates of reinforcement learning against plain autograd in FP64, an answer at a time in one process: settings,
layouts and answers that are odd in several ways at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dryvine.comm import local
from dryvine.trainer.config import Config
from dryvine.trainer.deviations import Part, assembled
from dryvine.trainer.ramps import Point, learning_rate
from dryvine.trainer.rl.choices import LossChoices
from dryvine.trainer.rl.losses import Tokens
from dryvine.trainer.rl.passes import PassOptions, learn, score
from dryvine.trainer.rl.rows import Sample
from tests.support import reference_model
from tests.support.adamw import fp64_adamw
from tests.support.answers import MAX_TOKENS, ODD, bare, odd_answers
from tests.support.rl_losses import by_hand, with_shares

Tiny = Callable[..., Config]
TEMPERATURE = 0.7
REPLAY = PassOptions(TEMPERATURE, replay=True)


class Learnt(NamedTuple):
    """Of the last of some updates: gradient norm, loss, gradients at any scale; and the weights after all of them."""

    norm: float
    loss: float
    grads: Part
    weights: Part


def learnt_by(rank: int, config: Config, parts: list[list[Sample]], choices: LossChoices) -> Learnt:
    """For `local.run`: what a rank has of the updates from `parts`, one each."""
    rig = bare(config)
    for step, part in enumerate(parts):
        outcome = learn(rig, part, choices, REPLAY, step)
    grads = {(p.name, p.start): p.grad.numpy().copy() for p in rig.optimizer.pieces}
    weights = {(p.name, p.start): p.master.numpy().copy() for p in rig.optimizer.pieces}
    return Learnt(outcome.norm, outcome.loss, grads, weights)


def learnt_plainly(config: Config, parts: list[list[Sample]], choices: LossChoices) -> Learnt:
    """The same by the reference model."""
    rig = bare(config)
    state = {
        name: {"master": weight.detach().double().clone(), "step": torch.zeros(())}
        | {moment: torch.zeros(weight.shape, dtype=torch.float64) for moment in ("exp_avg", "exp_avg_sq")}
        for name, weight in rig.model.named_parameters()
    }
    for step, part in enumerate(parts):
        params = {name: one["master"].clone().requires_grad_() for name, one in state.items()}
        loss = loss_of(params, config, part, choices)
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        grads = {
            name: torch.zeros_like(params[name]) if grad is None else grad
            for name, grad in zip(params, found, strict=True)
        }
        norm = float(torch.cat([grad.flatten() for grad in grads.values()]).norm())
        clip, rate = min(1.0, config.optim.clip / norm), learning_rate(config.optim, Point(step, 0, 0, 0))
        for name, grad in grads.items():
            decay = config.optim.weight_decay if grad.dim() > 1 else 0.0
            state[name] |= fp64_adamw(state[name], grad * clip, rate, decay, config.optim)
            state[name]["step"] = torch.tensor(float(step + 1))
    weights = {(name, 0): one["master"].flatten().numpy() for name, one in state.items()}
    return Learnt(norm, float(loss.detach()), {(name, 0): g.flatten().numpy() for name, g in grads.items()}, weights)


def loss_of(params: dict[str, Tensor], config: Config, answers: list[Sample], choices: LossChoices) -> Tensor:
    logprobs, known = [], []
    for answer in answers:
        tokens = torch.cat((torch.tensor(answer.prompt), answer.tokens))
        whole = reference_model.logprobs(params, config.model, tokens, TEMPERATURE, answer.routes)
        logprobs.append(whole[len(answer.prompt) - 1 :])
        columns = (answer.old, answer.sampled, answer.reference)
        old, sampled, reference = (column.double() for column in columns if column is not None)
        known.append(
            Tokens(
                torch.full_like(old, answer.advantage), old, sampled, reference, torch.ones_like(old),
                torch.zeros_like(answer.tokens),
            )
        )  # fmt: skip
    return by_hand(choices, logprobs, with_shares(choices, known, MAX_TOKENS), MAX_TOKENS)


def check(found: Sequence[Learnt], plain: Learnt) -> None:
    for part in found:
        assert part.norm == pytest.approx(plain.norm, rel=1e-5)
        assert part.loss == pytest.approx(plain.loss, rel=1e-5, abs=1e-6)
    for which in ("grads", "weights"):
        ours, theirs = assembled([getattr(part, which) for part in found]), assembled([getattr(plain, which)])
        if which == "grads":  # those of an update are scaled by a power of two
            size = sum(float((g.astype("f8") ** 2).sum()) for g in ours.values()) ** 0.5
            ours = {name: grad * (plain.norm / size) for name, grad in ours.items()}
        for name, expected in theirs.items():
            apart = float(((ours[name] - expected) ** 2).sum() ** 0.5)
            assert apart <= 1e-5 * float((expected**2).sum() ** 0.5), (which, name, apart)


CHOICES = {
    "gspo": LossChoices(ratio="sequence", clip_low=0.3, clip_high=0.4),
    "gspo with all": LossChoices(
        ratio="sequence", clip_low=0.3, clip_high=0.4, aggregate="token_sum", kl=0.05, kl_estimator="k3_unbiased",
        correction="truncate", correction_level="sequence", correction_high=1.05, stale_mask=0.1,
    ),
    "cispo masked": LossChoices(
        clip="cispo", clip_low=1.0, clip_high=0.2, aggregate="token_mean", kl=0.1, kl_estimator="k2",
        correction="mask", correction_low=0.7, correction_high=1.3,
    ),
    "dual": LossChoices(dual_clip=1.2, clip_high=0.28, aggregate="sample_sum", stale_mask=0.05),
}  # fmt: skip
LAYOUTS = {
    "one process": (),
    "recompute": ("parallel.microbatch_sequences=2", "model.recompute=['norm','mla_up','swiglu']"),
    "layers again, mtp 2": ("model.recompute=['layer']", "model.mtp_depth=2", "parallel.microbatch_sequences=4"),
    "interleaved": ("parallel.schedule=interleaved", "parallel.chunks=3"),
    "a balance loss in pretraining": ("model.balance_alpha=0.1",),
    "dualpipev in passes": ("parallel.schedule=dualpipev", "batch.sequences=2"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("choices", CHOICES)
def test_updates_are_those_of_plain_autograd(tiny: Tiny, choices: str, layout: str) -> None:
    """Two updates, from seven answers each, of lengths from 1 to 64."""
    config = tiny(*ODD, *LAYOUTS[layout])
    answers = odd_answers(config)
    parts = [answers[::2], answers[1::2]]
    check([learnt_by(0, config, parts, CHOICES[choices])], learnt_plainly(config, parts, CHOICES[choices]))


@pytest.mark.parametrize(
    ("choices", "layout"),
    [
        ("gspo with all", ("parallel.dp=2", "model.recompute=['layer']", "parallel.microbatch_sequences=2")),
        ("cispo masked", ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "batch.sequences=8")),
        ("gspo", ("parallel.pp=2", "parallel.schedule=zbv", "model.mtp_depth=2")),
    ],
    ids=["dp2", "pp2 x ep2", "pp2 zbv"],
)
def test_updates_of_many_ranks_are_those_of_plain_autograd(tiny: Tiny, choices: str, layout: tuple[str, ...]) -> None:
    config = tiny(*ODD, *layout)
    answers = odd_answers(config)
    parts = [answers[::2], answers[1::2]]
    found = local.run(learnt_by, config.parallel.world, config, parts, CHOICES[choices])
    check(found, learnt_plainly(tiny(*ODD), parts, CHOICES[choices]))


def test_scores_are_those_of_plain_autograd(tiny: Tiny) -> None:
    """Log-probabilities of every answer, by its own experts and by those that the gates choose."""
    config = tiny(*ODD)
    rig, answers = bare(config), odd_answers(config)
    params = {n: w.detach().double() for n, w in rig.model.named_parameters()} | {
        n: b.double() for n, b in rig.model.buffers.items()
    }
    for replay in (True, False):
        for answer, scored in zip(answers, score(rig, answers, REPLAY._replace(replay=replay)), strict=True):
            tokens = torch.cat((torch.tensor(answer.prompt), answer.tokens))
            routes = answer.routes if replay else None
            plain = reference_model.logprobs(params, config.model, tokens, TEMPERATURE, routes)
            assert scored.old is not None
            torch.testing.assert_close(scored.old.double(), plain[len(answer.prompt) - 1 :], rtol=1e-5, atol=1e-5)
