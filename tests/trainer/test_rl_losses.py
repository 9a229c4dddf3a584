"""Objectives: against formulas written out here answer by answer, in any split, and the published settings."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dryvine.trainer.config import Config, ConfigError, load
from dryvine.trainer.rl.choices import LossChoices
from dryvine.trainer.rl.losses import Tokens, advantages, k3, token_losses
from dryvine.trainer.rl.presets import PRESETS
from tests.support.rl_losses import by_hand, draw, loss_of, packed, with_shares

Tiny = Callable[..., Config]
CHOICES = {
    "grpo": LossChoices(kl=0.04),
    "dr_grpo": LossChoices(baseline="group_mean", aggregate="token_sum"),
    "dapo": LossChoices(clip_high=0.28, aggregate="token_mean"),
    "gspo": LossChoices(ratio="sequence", clip_low=3e-2, clip_high=4e-2),
    "cispo": LossChoices(clip="cispo", clip_low=1.0, clip_high=0.3, aggregate="token_mean"),
    "dual": LossChoices(dual_clip=1.5, clip_high=0.28, aggregate="sample_sum"),
    "plain": LossChoices(clip="none", kl=0.1, kl_estimator="k2"),
    "unbiased": LossChoices(kl=0.1, kl_estimator="k3_unbiased", correction="truncate", correction_high=1.1),
    "masked": LossChoices(correction="mask", correction_level="sequence", correction_low=0.8, correction_high=1.2),
    "stale": LossChoices(stale_mask=0.05),
}


@pytest.mark.parametrize("name", CHOICES)
def test_an_objective_is_its_formula(name: str) -> None:
    choices = CHOICES[name]
    logprobs, tokens = draw(1)
    loss = loss_of(choices, *packed(list(zip(logprobs, with_shares(choices, tokens), strict=True))))
    expected = by_hand(choices, logprobs, tokens)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = torch.autograd.grad(loss, logprobs), torch.autograd.grad(expected, logprobs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(CHOICES)),
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 7), max_size=4),
    padding=st.integers(0, 3),
)
def test_any_split_gives_the_same_gradient(
    name: str, seed: int, lengths: list[int], cuts: list[int], padding: int
) -> None:
    """Answers in any order, in any number of microbatches, on any rank, between any prompts."""
    choices = CHOICES[name]
    logprobs, tokens = draw(seed, tuple(lengths))
    pairs = list(zip(logprobs, with_shares(choices, tokens), strict=True))
    (whole,) = [torch.autograd.grad(loss_of(choices, *packed(pairs)), logprobs)]
    shuffled = [pairs[i] for i in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()]
    bounds = sorted({0, len(pairs), *(cut for cut in cuts if cut < len(pairs))})
    sums = [torch.zeros_like(g) for g in whole]
    for start, stop in pairwise(bounds):
        part = loss_of(choices, *packed(shuffled[start:stop], padding))
        grads = torch.autograd.grad(part, logprobs, allow_unused=True)
        sums = [total if grad is None else total + grad for total, grad in zip(sums, grads, strict=True)]
    for one, other in zip(whole, sums, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_mean_in_each_microbatch_would_be_seen() -> None:
    """What the test above is for: shares of each part by itself give another gradient."""
    choices = CHOICES["dapo"]
    logprobs, tokens = draw(3)
    whole = torch.autograd.grad(
        loss_of(choices, *packed(list(zip(logprobs, with_shares(choices, tokens), strict=True)))), logprobs
    )
    halves = [
        loss_of(choices, *packed(list(zip(logprobs[part], with_shares(choices, tokens[part]), strict=True)))) / 2
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert not torch.allclose(torch.autograd.grad(sum(halves), logprobs)[0], whole[0], rtol=1e-2)


def test_the_clip_takes_gradients_away_where_it_should() -> None:
    """A ratio above the bound with a positive advantage, one below it with a negative one; and no others."""
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0])
    worth = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    zeros = torch.zeros(5)
    logprobs = ratios.log().requires_grad_()
    tokens = Tokens(worth, zeros, zeros, zeros, torch.ones(5), torch.arange(5))
    terms = token_losses(LossChoices(), logprobs, tokens)
    assert terms.clipped.tolist() == [True, False, False, True, False]
    (grad,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    assert (grad == 0).tolist() == terms.clipped.tolist()


# -- advantages


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("group_mean", [[0.75, -0.25, -0.25, -0.25], [0.5, 0.0, -0.5, 0.0]]),
        ("leave_one_out", [[1.0, -1 / 3, -1 / 3, -1 / 3], [0.75, 0.0, -0.75, 0.0]]),
        ("group_std", [[0.75 / 0.5001, *[-0.25 / 0.5001] * 3], [0.5 / 0.5001, 0.0, -0.5 / 0.5001, 0.0]]),
    ],
)
def test_advantages_leave_out_what_could_not_be_scored(baseline: Any, expected: list[list[float]]) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, math.nan]])
    torch.testing.assert_close(advantages(rewards, baseline), torch.tensor(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("baseline", ["group_std", "group_mean", "leave_one_out", "batch_std"])
def test_groups_that_teach_nothing_have_no_advantage(baseline: Any) -> None:
    """All alike; one scored; none scored."""
    nan = math.nan
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, nan, nan], [nan, nan, nan], [0.0, 1.0, nan]])
    found = advantages(rewards, baseline)
    assert not found[:3].any()
    assert found[3, 1] > 0 > found[3, 0]
    assert found[3, 2] == 0


def test_the_batch_shares_a_standard_deviation() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.2, 0.0]])
    std = rewards.std() + 1e-4
    expected = torch.tensor([[0.5, -0.5], [0.1, -0.1]]) / std
    torch.testing.assert_close(advantages(rewards, "batch_std"), expected, rtol=1e-5, atol=1e-7)


def test_k3_is_a_divergence_in_the_mean() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    mean = float((p * k3(p.log() - q.log())).sum())
    assert mean == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)
    assert float(k3(torch.linspace(-3, 3, 50)).min()) >= 0


# -- settings

CHAT = ('rl.chat.tokenizer="t.json"', 'data.mask="document"')


def test_r1_zero_is_the_table_in_nature(tmp_path: Path) -> None:
    """Methods, DeepSeek-R1-Zero: the figures as printed; no dual clip, a single inner epoch."""
    tables = tomllib.loads((Path(__file__).parents[1] / "tiny.toml").read_text())
    del tables["optim"]
    (tmp_path / "zero.toml").write_text(tomli_w.dumps(tables))
    config = load(tmp_path / "zero.toml", ('rl.preset="r1_zero"', *CHAT))
    rl = config.rl
    assert rl is not None
    assert config.optim.lr == 3e-6
    assert (rl.loss.kl, rl.loss.kl_estimator, rl.loss.kl_place) == (0.001, "k3", "loss")
    assert (rl.questions, rl.samples, rl.questions * rl.samples) == (32, 16, 512)
    assert rl.minibatches * 512 == 8192
    assert (rl.loss.clip_low, rl.loss.clip_high, rl.loss.dual_clip, rl.loss.clip) == (10.0, 10.0, None, "ppo")
    assert (rl.reference_every, rl.epochs, rl.temperature, rl.max_tokens) == (400, 1, 1.0, 32768)
    assert (rl.loss.baseline, rl.loss.ratio, rl.loss.aggregate) == ("group_std", "token", "sample_mean")
    assert (rl.loss.correction, rl.dynamic, rl.overlong) == ("none", False, "keep")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_config_and_gives_way_to_what_is_set(tiny: Tiny, preset: str) -> None:
    config = tiny(f'rl.preset="{preset}"', "rl.samples=5", "rl.loss.clip_high=0.5", "optim.lr=0.25", *CHAT)
    assert config.rl is not None
    assert (config.rl.samples, config.rl.loss.clip_high, config.optim.lr) == (5, 0.5, 0.25)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('rl.preset="ppo"', "rl.preset: input should be"),
        ("rl.loss.clip_hihg=1", "rl.loss.clip_hihg: unknown key; did you mean clip_high"),
        ("rl.samples=1", "nothing to compare an answer with"),
        ('rl.loss.correction="truncate"', 'needs old = "trainer"'),
        ('rl.loss.kl_place="reward"', None),
        ("rl.loss.correction_low=3", "not below correction_high"),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny: Tiny, override: str, said: str | None) -> None:
    if said is None:
        assert tiny(override, *CHAT).rl is not None
        return
    with pytest.raises(ConfigError, match=said):
        tiny(override, *CHAT)
