"""Alarms on a rollout's figures: a policy that collapses does so within tens of updates, long before anybody looks at a
plot. The bounds are in `config.Alarms`.

Every rank sees the same figures and so raises the same alarms. The state of the alarms (the best reward, how many
rollouts in a row were over a bound) is a tensor that checkpoints store, so a resumed run continues the same counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dryvine.trainer.rl.config import Alarms

WINDOW = 8  # rollouts in the running mean of the reward
Figures = Mapping[str, float | None]


class AlarmMemory:
    """`state`, FP32: how many rollouts had a reward (one of which nothing could be scored has none), how many in a row
    had an alarm (with or without a reward), the best mean reward, and the last WINDOW rewards."""

    def __init__(self, alarms: Alarms) -> None:
        self.alarms, self.state = alarms, torch.zeros(3 + WINDOW, dtype=torch.float32)

    def check(self, figures: Figures) -> list[str]:
        """Update the state with a rollout's figures. Returns one line for each bound that is crossed."""
        found = _over(self.alarms, figures)
        if (reward := figures["reward"]) is not None:  # None: nothing could be scored, which is no reward of 0
            found += self._dropped(reward)
        self.state[1] = self.state[1] + 1 if found else 0
        return found

    @property
    def stops(self) -> bool:
        """Whether the alarms end the run now."""
        return self.alarms.action == "stop" and float(self.state[1]) >= self.alarms.patience

    def _dropped(self, reward: float) -> list[str]:
        seen = int(self.state[0])
        self.state[3 + seen % WINDOW] = reward
        self.state[0] = seen + 1
        if seen + 1 < WINDOW:
            return []
        mean, best = float(self.state[3:].mean()), float(self.state[2])
        self.state[2] = max(mean, best)
        kept = 1 - self.alarms.reward_drop
        if best <= 0 or mean >= kept * best:
            return []
        return [f"reward: its mean over {WINDOW} rollouts is {mean:.3g}, and was {best:.3g}; lower optim.lr"]


def _over(alarms: Alarms, figures: Figures) -> list[str]:
    entropy = figures.get("entropy")
    lines = [
        _above("mismatch_k3", figures.get("mismatch_k3"), alarms.mismatch_k3, "sampler and trainer disagree"),
        _above("mismatch_logprob", figures.get("mismatch_logprob"), alarms.mismatch_logprob, "on a token"),
        _above("route_mismatch", figures.get("route_mismatch"), alarms.route_mismatch, 'set rl.replay = "rollout"'),
        _above("clip_fraction", figures.get("clip_fraction"), alarms.clip_fraction, "lower optim.lr or rl.minibatches"),
        _above("entropy", entropy, alarms.entropy_above, "answers become noise; lower optim.lr"),
        _above("zero_variance", figures.get("zero_variance"), alarms.zero_variance, "questions too easy or too hard"),
        _above("unscored", figures.get("unscored"), alarms.unscored, "verifiers fail"),
    ]
    if entropy is not None and entropy < alarms.entropy_below:
        lines.append(f"entropy: {entropy:.3g} is under {alarms.entropy_below:g}: one answer is left; lower optim.lr")
    return [line for line in lines if line]


def _above(name: str, value: float | None, bound: float, why: str) -> str:
    return f"{name}: {value:.3g} is over {bound:g}: {why}" if value is not None and not value <= bound else ""
