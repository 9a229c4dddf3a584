"""Evaluation on held-out questions: greedy accuracy, and pass@1 and pass@k of sampled answers.

Intervals are 95%, over questions, since those are what a repeated evaluation would draw anew: normal for pass@1 (a mean
of shares), Wilson's for greedy and pass@k (each question is right or wrong, and there may be few). Questions and seeds
are the same every time, so two evaluations differ by the policy alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dryvine.trainer.rl.groups import Group

Z = 1.96


@dataclass(frozen=True)
class Evaluation:
    """Shares of held-out questions or answers; `*_low` and `*_high` are the ends of intervals."""

    greedy: float
    greedy_low: float
    greedy_high: float
    pass_1: float
    pass_1_low: float
    pass_1_high: float
    pass_k: float  # with k = rl.eval_samples
    pass_k_low: float
    pass_k_high: float
    scores: dict[str, float]  # mean of each verifier over sampled answers

    def figures(self) -> dict[str, float]:
        """The evaluation as columns of metrics.jsonl."""
        named = {f"eval_{name}": value for name, value in vars(self).items() if name != "scores"}
        return named | {f"eval_score.{name}": value for name, value in self.scores.items()}


def evaluation(greedy: Sequence[Group], sampled: Sequence[Group]) -> Evaluation:
    """From groups of one greedy answer and groups of k sampled answers to the same questions."""
    right = [group.answers[0].correct for group in greedy]
    shares = [statistics.fmean(answer.correct for answer in group.answers) for group in sampled]
    some = [share > 0 for share in shares]
    answers = [answer for group in sampled for answer in group.answers]
    names = answers[0].verdicts
    scores = {name: statistics.fmean(answer.verdicts[name].score or 0.0 for answer in answers) for name in names}
    return Evaluation(*_share(right), *_mean(shares), *_share(some), scores=scores)


def _mean(values: Sequence[float]) -> tuple[float, float, float]:
    mean = statistics.fmean(values)
    half = Z * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def _share(right: Sequence[bool]) -> tuple[float, float, float]:
    """A share with its Wilson interval."""
    share, spread = statistics.fmean(right), Z * Z / len(right)
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / len(right) + spread / (4 * len(right))) / (1 + spread)
    return share, middle - half, middle + half
