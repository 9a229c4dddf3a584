"""Evaluation on held-out questions: greedy accuracy, and pass@1 and pass@k of sampled answers.

Intervals are those of `dryvine eval` (`intervals.py`), over questions. The same questions and seeds every time, so that
two evaluations differ by the policy alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dryvine.trainer.intervals import pass_at_k, share
from dryvine.trainer.rl.groups import Group, scores_by_verifier


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
    scores: dict[str, float]  # mean of each verifier over the sampled answers that it could score

    def figures(self) -> dict[str, float]:
        """The evaluation as columns of metrics.jsonl."""
        named = {f"eval_{name}": value for name, value in vars(self).items() if name != "scores"}
        return named | {f"eval_score.{name}": value for name, value in self.scores.items()}


def evaluation(greedy: Sequence[Group], sampled: Sequence[Group]) -> Evaluation:
    """From groups of one greedy answer and groups of k sampled answers to the same questions."""
    right = [group.answers[0].correct for group in greedy]
    counts, samples = [sum(answer.correct for answer in group.answers) for group in sampled], len(sampled[0].answers)
    passes = [pass_at_k(counts, samples, k) for k in (1, samples)]
    known = {name: [s for s in of if s is not None] for name, of in scores_by_verifier(sampled).items()}
    scores = {name: statistics.fmean(of) for name, of in known.items() if of}
    return Evaluation(*share(right), *passes[0], *passes[1], scores=scores)
