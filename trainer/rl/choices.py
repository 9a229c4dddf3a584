"""The choices that make a policy-gradient objective, one key each: the `[rl.loss]` table. Imports no torch.

Published methods differ in five or six independent decisions, and frameworks that have a class per method cannot mix
them. Here a method is a point in that space (`presets.py`), and a claim that one decision matters can be tried by one
override. Facts on each: DeepSeekMath (arXiv 2402.03300), DeepSeek-R1 (Nature 645, Methods), Dr. GRPO (2503.20783), DAPO
(2503.14476), GSPO (2507.18071), CISPO (2506.13585), TIS and masks (truncated importance sampling, IcePop),
DeepSeek-V3.2 (2512.02556).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

NotNegative = Annotated[float, Field(ge=0)]

Baseline = Literal["group_std", "group_mean", "leave_one_out", "batch_std"]
RatioLevel = Literal["token", "sequence"]
Clip = Literal["ppo", "cispo", "none"]
Aggregate = Literal["sample_mean", "token_mean", "token_sum", "sample_sum"]
Estimator = Literal["k1", "k2", "k3", "k3_unbiased"]
Correction = Literal["none", "truncate", "mask"]


class LossChoices(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Defaults are those of the preset `grpo`, without its KL term."""

    # What an answer's reward is compared with: the group's mean, over its standard deviation or not, the mean of the
    # other answers, or the group's mean over the batch's standard deviation.
    baseline: Baseline = "group_std"
    # The ratio of new to old policy: of each token, or the geometric mean over an answer (GSPO).
    ratio: RatioLevel = "token"
    # "ppo": the smaller of ratio and clipped ratio times the advantage; "cispo": the clipped ratio is a weight without
    # gradient; "none": the plain ratio.
    clip: Clip = "ppo"
    clip_low: NotNegative = 0.2  # ratios from 1 - clip_low ...
    clip_high: NotNegative = 0.2  # ... to 1 + clip_high
    dual_clip: Annotated[float, Field(gt=1)] | None = None  # upper bound of the ratio where the advantage is negative
    # How tokens become one number: the mean over each answer, then over answers ("sample_mean"); the mean over all
    # tokens of the update; their sum over answers x rl.max_tokens; or the sum over each answer, then the mean.
    aggregate: Aggregate = "sample_mean"
    kl: NotNegative = 0.0  # coefficient of the divergence from the reference policy; 0: no reference
    kl_estimator: Estimator = "k3"
    kl_place: Literal["loss", "reward"] = "loss"
    # Corrects for a sampler whose probabilities differ from the trainer's old ones (needs rl.old = "trainer"): weights
    # old / sampled, truncated at correction_high, or tokens outside of [low, high] masked.
    correction: Correction = "none"
    correction_level: RatioLevel = "token"
    correction_low: NotNegative = 0.0
    correction_high: Annotated[float, Field(gt=0)] = 2.0
    # Answers with a negative advantage whose policy has moved further than this, mean log(sampled / new), are left out.
    stale_mask: Annotated[float, Field(gt=0)] | None = None

    @property
    def has_kl_loss(self) -> bool:
        """Whether the divergence from the reference is a part of the loss, and not of rewards."""
        return self.kl > 0 and self.kl_place == "loss"

    @model_validator(mode="after")
    def _bounds_hold(self) -> LossChoices:
        if self.correction_low >= self.correction_high:
            raise ValueError(
                f"correction_low = {self.correction_low} is not below correction_high = {self.correction_high}"
            )
        if self.dual_clip is not None and self.clip != "ppo":
            raise ValueError(f"dual_clip bounds the ratio of clip = 'ppo', and clip = {self.clip!r}; leave it out")
        if self.kl_estimator == "k3_unbiased" and self.kl_place == "reward":
            raise ValueError("kl_estimator = 'k3_unbiased' needs the new policy's ratio; set kl_place = 'loss'")
        return self
