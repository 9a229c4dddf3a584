"""A rollout as a row of metrics.jsonl, and as samples to read."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from dryvine.trainer.rl.groups import Group, scores_by_verifier
from dryvine.trainer.rl.learner import RolloutOutcome
from dryvine.trainer.rl.passes import UpdateResult

READ = 4  # samples of a rollout that are kept to read

Row = dict[str, float | None]


def rollout_figures(outcome: RolloutOutcome) -> Row:
    """The row of metrics.jsonl without the step and the evaluation's columns. A figure that is not known is None."""
    groups = outcome.answers.groups
    answers = [answer for group in groups for answer in group.answers]
    lengths = [len(answer.completion.tokens) for answer in answers]
    tokens = sum(lengths)
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    every = len(groups) + outcome.answers.left_out
    idle = outcome.answers.left_out + sum(not group.teaches for group in groups)
    return {
        "reward": statistics.fmean(rewards) if rewards else None,
        "correct": statistics.fmean(answer.correct for answer in answers),
        **_scores(groups),
        "answers": len(answers),
        "answer_tokens": tokens,
        "length": statistics.fmean(lengths),
        "longest": max(lengths),
        "overlong": statistics.fmean(answer.overlong for answer in answers),
        "unscored": 1 - len(rewards) / len(answers),
        "zero_variance": min(1.0, idle / every),
        "refills": outcome.answers.refills,
        **_learnt(outcome.updates, outcome.has_reference),
        "tokens_per_second": tokens / outcome.seconds,
        **{f"seconds_{name}": value for name, value in outcome.parts.items()},
    }


def _scores(groups: Sequence[Group]) -> Row:
    """For each verifier, the mean over the answers it could score, and the share of those it could not."""
    row: Row = {}
    for name, scores in scores_by_verifier(groups).items():
        known = [score for score in scores if score is not None]
        row[f"score.{name}"] = statistics.fmean(known) if known else None
        row[f"unscored.{name}"] = 1 - len(known) / len(scores)
    return row


def _learnt(updates: Sequence[UpdateResult], has_reference: bool) -> Row:
    """Figures of all updates of a rollout; mismatches are those of the first, whose weights are the sampler's."""
    if not updates:
        return {}
    first, mean = updates[0], statistics.fmean
    return {
        "loss": mean(one.loss for one in updates),
        "grad_norm": mean(one.norm for one in updates),
        "mismatch_k3": first.sums.mean("k3"),
        "mismatch_logprob": first.largest_apart,
        "route_mismatch": first.other_routes,
        "reference_k3": mean(one.sums.mean("k3_reference") for one in updates) if has_reference else None,
        "clip_fraction": mean(one.sums.mean("clipped") for one in updates),
        "entropy": mean(one.sums.mean("entropy") for one in updates),
        "bubble": mean(one.bubble for one in updates),
    }


def sample_lines(outcome: RolloutOutcome, step: int) -> Iterator[dict[str, object]]:
    """Rows of samples.jsonl: answers spread over the rollout, with text, verdicts and advantage."""
    groups = outcome.answers.groups
    every = max(1, len(groups) // READ)
    for group, worth in list(zip(groups, outcome.advantages, strict=True))[::every][:READ]:
        answer = group.answers[0]
        yield {
            "step": step,
            "question": group.question.messages[-1]["content"],
            "answer": answer.text,
            "reward": answer.reward,
            "advantage": worth[0],
            "verdicts": {name: [verdict.score, verdict.why] for name, verdict in answer.verdicts.items()},
        }
