"""Objectives of RL written out in plain formulas, and answers to try them on."""

from __future__ import annotations

import torch
from torch import Tensor

from dryvine.trainer.rl.choices import LossChoices
from dryvine.trainer.rl.losses import Tokens, objective, shares, token_losses

LENGTHS = (3, 7, 1, 12, 5, 9)


def draw(seed: int, lengths: tuple[int, ...] = LENGTHS, spread: float = 0.5) -> tuple[list[Tensor], list[Tokens]]:
    """Log-probabilities, as leaves, and what else is known of each answer; shares not yet filled in."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda n, scale: torch.randn(n, generator=generator) * scale  # noqa: E731
    logprobs, tokens = [], []
    for i, n in enumerate(lengths):
        base = -normal(n, 1.0).abs() - 0.1
        logprobs.append((base + normal(n, spread)).requires_grad_())
        old = base.clone()
        worth = normal(1, 1.0).expand(n)
        tokens.append(
            Tokens(worth, old, old + normal(n, 0.2), base + normal(n, 0.3), torch.ones(n), torch.full((n,), i))
        )
    return logprobs, tokens


def with_shares(choices: LossChoices, tokens: list[Tokens], max_tokens: int = 16) -> list[Tokens]:
    parts = shares([len(one.old) for one in tokens], choices.aggregate, max_tokens)
    return [one._replace(share=torch.full_like(one.old, part)) for one, part in zip(tokens, parts, strict=True)]


def loss_of(choices: LossChoices, logprobs: Tensor, tokens: Tokens) -> Tensor:
    return objective(token_losses(choices, logprobs, tokens), tokens.share)


def by_hand(choices: LossChoices, logprobs: list[Tensor], tokens: list[Tokens], max_tokens: int = 16) -> Tensor:
    """The same in plain formulas, an answer and a token at a time."""
    per_answer = []
    for logprob, known in zip(logprobs, tokens, strict=True):
        a = float(known.advantage[0])
        whole = torch.exp((logprob - known.old).mean())
        now = logprob.detach()
        apart = torch.exp((known.old - known.sampled).mean())
        stale = choices.stale_mask is not None and a < 0 and float((known.sampled - now).mean()) > choices.stale_mask
        losses = []
        for t in range(len(logprob)):
            r = whole if choices.ratio == "sequence" else torch.exp(logprob[t] - known.old[t])
            low, high = 1 - choices.clip_low, 1 + choices.clip_high
            if choices.clip == "cispo":
                loss = -min(max(r.item(), low), high) * a * logprob[t]
            elif choices.clip == "none":
                loss = -r * a
            else:
                loss = -torch.min(r * a, torch.clamp(r, low, high) * a)
                if choices.dual_clip and a < 0:
                    loss = torch.min(loss, torch.tensor(-choices.dual_clip * a))
            w = apart if choices.correction_level == "sequence" else torch.exp(known.old[t] - known.sampled[t])
            if choices.correction == "truncate":
                loss = loss * min(float(w), choices.correction_high)
            if choices.correction == "mask":
                loss = loss * (float(w) if choices.correction_low <= w <= choices.correction_high else 0.0)
            loss = loss * (0.0 if stale else 1.0)
            x = known.reference[t] - logprob[t]
            kl = {"k2": x**2 / 2, "k3": torch.exp(x) - x - 1, "k3_unbiased": (torch.exp(x) - x - 1) * r}
            losses.append(loss + choices.kl * kl[choices.kl_estimator])
        per_answer.append(torch.stack(losses))
    match choices.aggregate:
        case "sample_mean":
            return torch.stack([losses.mean() for losses in per_answer]).mean()
        case "token_mean":
            return torch.cat(per_answer).mean()
        case "token_sum":
            return torch.cat(per_answer).sum() / (len(per_answer) * max_tokens)
        case "sample_sum":
            return torch.stack([losses.sum() for losses in per_answer]).mean()


def packed(pairs: list[tuple[Tensor, Tokens]], padding: int = 0) -> tuple[Tensor, Tokens]:
    """One microbatch of these answers, with prompts' places between them that hold rubbish and have no share."""
    logprobs, parts = [], []
    for i, (logprob, known) in enumerate(pairs):
        rubbish = torch.full((padding,), 50.0)
        logprobs += [-rubbish, logprob]
        gap = Tokens(*[rubbish] * 4, torch.zeros(padding), torch.full((padding,), i))
        parts += [gap, known._replace(answer=torch.full_like(known.answer, i))]
    return torch.cat(logprobs), Tokens(*(torch.cat(column) for column in zip(*parts, strict=True)))
