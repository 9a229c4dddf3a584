"""What pictures and pages of a run show: a title, and the figures of metrics.jsonl below it."""

from __future__ import annotations

PANELS: dict[str, tuple[str, ...]] = {
    "reward": ("reward", "correct", "score.format"),
    "held out": ("eval_pass_1", "eval_greedy", "eval_pass_k"),
    "answer length, tokens": ("length", "longest"),
    "entropy, nats": ("entropy",),
    "sampler and trainer": ("mismatch_k3", "mismatch_logprob", "reference_k3"),
    "shares": ("zero_variance", "clip_fraction", "route_mismatch", "overlong", "unscored"),
}
LOGARITHMIC = ("sampler and trainer",)
