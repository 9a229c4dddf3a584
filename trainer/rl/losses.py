"""Policy-gradient objectives as pure functions of log-probabilities and per-token data.

`advantages` turns the rewards of groups into advantages; `shares` gives every token its weight in the update's mean,
computed once over the whole update; `token_losses` is the rest, and needs nothing but one microbatch. The objective is
sum(share * loss), so however an update is split into microbatches, ranks or packed rows, the gradients add up to the
same. Trainers that average within each microbatch weight short answers, or microbatches with few tokens, differently in
every split.

Legend: G groups, n answers of a group, N tokens of a microbatch; only the answers' tokens have a share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dryvine.trainer.rl.choices import Aggregate, Baseline, Clip, Estimator, LossChoices
from dryvine.trainer.tensors.context import Context
from dryvine.trainer.tensors.in_order import add_rows

EPS = 1e-4  # beside a standard deviation
MOST = 20.0  # of a log-ratio's size: e^20 is finite in every dtype


class Tokens(NamedTuple):
    """What is known of N tokens before an update begins, FP32 [N] each. Tokens without a share do not contribute, but
    must be finite too."""

    advantage: Tensor
    old: Tensor  # log-probability under the policy that ratios are taken to
    sampled: Tensor  # log-probability that the sampler drew it with
    reference: Tensor  # log-probability under the reference policy; zeros where there is none
    share: Tensor  # of the update's mean
    answer: Tensor  # int64: number of its answer in this microbatch, below N


class Terms(NamedTuple):
    """Per token, [N]."""

    loss: Tensor  # what is to be minimised, before shares
    ratio: Tensor  # of new to old policy, without gradient
    clipped: Tensor  # bool: the clip took away the gradient, or cut the weight


# -- rewards to advantages


def advantages(rewards_Gn: Tensor, baseline: Baseline) -> Tensor:
    """FP32 [G, n] from rewards [G, n], NaN where an answer could not be scored. Those get 0 and are in no mean; so is
    the only scored answer of a group, which has nothing to be compared with."""
    rewards = rewards_Gn.double()
    scored = ~rewards.isnan()
    counts_G1 = scored.sum(1, keepdim=True)
    found = BASELINES[baseline](rewards.nan_to_num(0.0), scored, counts_G1.clamp(min=1))
    return found.where(scored & (counts_G1 > 1), 0.0).float()


def _off_mean(rewards: Tensor, scored: Tensor, counts: Tensor) -> Tensor:
    return (rewards - rewards.sum(1, keepdim=True) / counts).where(scored, 0.0)


def _group_std(rewards: Tensor, scored: Tensor, counts: Tensor) -> Tensor:
    off = _off_mean(rewards, scored, counts)
    std = (off.square().sum(1, keepdim=True) / (counts - 1).clamp(min=1)).sqrt()
    return off / (std + EPS)


def _batch_std(rewards: Tensor, scored: Tensor, counts: Tensor) -> Tensor:
    every = rewards[scored]
    std = every.std() if every.numel() > 1 else torch.zeros(())
    return _off_mean(rewards, scored, counts) / (std + EPS)


def _leave_one_out(rewards: Tensor, scored: Tensor, counts: Tensor) -> Tensor:
    """r - mean of the others = (r - mean) n / (n - 1)."""
    return _off_mean(rewards, scored, counts) * counts / (counts - 1).clamp(min=1)


BASELINES: dict[Baseline, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "group_std": _group_std,
    "group_mean": _off_mean,
    "leave_one_out": _leave_one_out,
    "batch_std": _batch_std,
}


# -- shares of the mean


def shares(lengths: Sequence[int], aggregate: Aggregate, max_tokens: int) -> list[float]:
    """The weight in the mean of each token of an answer, for each answer of an update: `lengths` are the answers'
    tokens, at most `max_tokens`."""
    answers, tokens = max(1, len(lengths)), max(1, sum(lengths))
    match aggregate:
        case "sample_mean":
            return [1 / (answers * max(1, length)) for length in lengths]
        case "token_mean":
            return [1 / tokens for _ in lengths]
        case "token_sum":
            return [1 / (answers * max_tokens) for _ in lengths]
        case "sample_sum":
            return [1 / answers for _ in lengths]


# -- a microbatch


def token_losses(choices: LossChoices, logprobs: Tensor, tokens: Tokens) -> Terms:
    """The objective of every token. `logprobs` FP32 [N] are those of the policy being trained, with gradient."""
    counted = tokens.share > 0
    log_ratio = torch.where(counted, logprobs - tokens.old, 0.0)
    if choices.ratio == "sequence":
        log_ratio = answer_means(log_ratio, tokens.answer, counted)
    ratio = log_ratio.clamp(-MOST, MOST).exp()
    loss, clipped = CLIPS[choices.clip](choices, ratio, logprobs, tokens.advantage)
    loss = loss * _trusted(choices, logprobs, tokens, counted)
    if choices.has_kl_loss:
        loss = loss + choices.kl * divergence(choices.kl_estimator, logprobs, tokens.reference, ratio)
    return Terms(loss, ratio.detach(), clipped & counted)


def objective(terms: Terms, share: Tensor) -> Tensor:
    """The microbatch's contribution to the loss of its update."""
    return torch.where(share > 0, terms.loss * share, 0.0).sum()


def answer_means(values: Tensor, answer: Tensor, counted: Tensor) -> Tensor:
    """For each counted token, the mean of `values` over its answer, [N]; 0 elsewhere. An answer is never split over
    microbatches."""
    return _AnswerMeans.apply(values, answer, counted)


class _AnswerMeans(Function):
    """Autograd's own backward of an index adds by atomics. The means are a symmetric matrix times the values, so their
    backward is the same sums in the same order."""

    @staticmethod
    def forward(ctx: Context, values: Tensor, answer: Tensor, counted: Tensor) -> Tensor:
        ctx.save_for_backward(answer, counted)
        return _answer_means(values, answer, counted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dmeans: Tensor) -> tuple[Tensor, None, None]:
        return _answer_means(dmeans, *ctx.saved_tensors), None, None


def _answer_means(values: Tensor, answer: Tensor, counted: Tensor) -> Tensor:
    # As many sums as tokens: how many answers there are is on the device. Tokens that do not count add zeros, to
    # different sums: thousands of them in one would be added one by one.
    into = torch.where(counted, answer, torch.arange(len(answer), device=answer.device))
    sums, counts = torch.zeros_like(values), torch.zeros_like(values)
    add_rows(sums, into, torch.where(counted, values, 0.0))
    add_rows(counts, into, counted.to(values.dtype))
    return torch.where(counted, (sums / counts.clamp(min=1))[answer], 0.0)


def _ppo(choices: LossChoices, ratio: Tensor, _: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    inside = ratio.clamp(1 - choices.clip_low, 1 + choices.clip_high)
    gain, clipped = torch.minimum(ratio * advantage, inside * advantage), inside * advantage < ratio * advantage
    if choices.dual_clip is None:
        return -gain, clipped
    floor = choices.dual_clip * advantage
    sunk = (advantage < 0) & (gain < floor)
    return -torch.where(sunk, floor, gain), clipped | sunk


def _cispo(choices: LossChoices, ratio: Tensor, logprobs: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    weight = ratio.detach().clamp(1 - choices.clip_low, 1 + choices.clip_high)
    return -weight * advantage * logprobs, weight != ratio


def _plain(choices: LossChoices, ratio: Tensor, _: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    return -ratio * advantage, torch.zeros_like(ratio, dtype=torch.bool)


CLIPS: dict[Clip, Callable[[LossChoices, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "ppo": _ppo,
    "cispo": _cispo,
    "none": _plain,
}


def divergence(estimator: Estimator, logprobs: Tensor, reference: Tensor, ratio: Tensor) -> Tensor:
    """An estimate of the KL divergence from the reference policy by tokens that were sampled from the policy (k1 to k3:
    joschu.net/blog/kl-approx.html). As losses k1's gradient is 0 in the mean and k2's is the divergence's; k3's becomes
    unbiased with the ratio to the policy that sampled (DeepSeek-V3.2, section 3.1)."""
    log_ratio = (logprobs - reference).clamp(-MOST, MOST)
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return k3(log_ratio)
        case "k3_unbiased":
            return k3(log_ratio) * ratio


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-x) - 1 + x of x = log(sampling policy / other): never negative, and in the mean the KL divergence."""
    return torch.expm1(-log_ratio) + log_ratio


def _trusted(choices: LossChoices, logprobs: Tensor, tokens: Tokens, counted: Tensor) -> Tensor:
    """The factor on each token's policy term, without gradient: corrects for a sampler that is not the old policy, and
    masks stale answers."""
    weight = torch.ones_like(tokens.share)
    if choices.correction != "none":
        apart = torch.where(counted, tokens.old - tokens.sampled, 0.0)
        if choices.correction_level == "sequence":
            apart = answer_means(apart, tokens.answer, counted)
        weight = _corrected(choices, apart.clamp(-MOST, MOST).exp())
    if choices.stale_mask is not None:
        moved = answer_means(tokens.sampled - logprobs.detach(), tokens.answer, counted)
        weight = weight * ~((tokens.advantage < 0) & (moved > choices.stale_mask))
    return weight


def _corrected(choices: LossChoices, weight: Tensor) -> Tensor:
    if choices.correction == "truncate":
        return weight.clamp(max=choices.correction_high)
    inside = (weight >= choices.correction_low) & (weight <= choices.correction_high)
    return torch.where(inside, weight, 0.0)
