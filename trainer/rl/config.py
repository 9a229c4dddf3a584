"""The `[rl]` table: reinforcement learning with verified rewards. Imports no torch.

An update uses `questions` x `samples` answers. A rollout samples the answers of `minibatches` updates at once, from the
current weights, and uses each answer `epochs` times. `run.steps` counts updates; the last rollout is completed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from dryvine.trainer.rl.chat_config import ChatConfig
from dryvine.trainer.rl.choices import LossChoices
from dryvine.trainer.rl.presets import PresetName

Positive = Annotated[int, Field(ge=1, strict=True)]
Share = Annotated[float, Field(ge=0, le=1)]
CORE_TOKENS = 2  # times a row's length: most tokens that attention gets of it, a shared prompt with each answer
MOST_ANSWERS = 1 << 20  # of a rollout, whose tokens every rank holds in memory


class Alarms(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Bounds on a rollout's figures. Crossing one prints a line and writes it to alarms.jsonl; with `action` "stop",
    `patience` such rollouts in a row save a checkpoint and end the run with exit code 3."""

    action: Literal["warn", "stop"] = "warn"
    patience: Positive = 3
    mismatch_k3: Annotated[float, Field(gt=0)] = 1e-2  # mean k3 of trainer against sampler, before an update
    mismatch_logprob: Annotated[float, Field(gt=0)] = 5.0  # largest |difference of log-probabilities|
    route_mismatch: Share = 0.25  # share of expert choices, over tokens and layers, in which the trainer differs
    clip_fraction: Share = 0.5
    entropy_below: Annotated[float, Field(ge=0)] = 0.01  # nats
    entropy_above: Annotated[float, Field(gt=0)] = 4.0  # nats
    zero_variance: Share = 0.9  # groups whose answers all have the same reward
    reward_drop: Share = 0.5  # of the best reward seen (a running mean over 8 rollouts), lost
    unscored: Share = 0.1  # answers that no verifier could score

    @model_validator(mode="after")
    def _entropy_has_room(self) -> Alarms:
        if self.entropy_below >= self.entropy_above:
            raise ValueError(
                f"entropy_below = {self.entropy_below} is not less than entropy_above = {self.entropy_above}"
            )
        return self


class RLConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """`preset` is applied first, then the other keys override it (`presets.py`)."""

    preset: PresetName = "grpo"
    loss: LossChoices = LossChoices()
    task: dict[str, object] = Field(
        description="name: a name of trainer/rl/tasks; the other keys are its own", default={"name": "countdown"}
    )
    chat: ChatConfig  # how a problem becomes tokens, and an answer's tokens text
    questions: Positive = 32  # of an update
    samples: Positive = 16  # answers to each
    minibatches: Positive = 1  # updates of a rollout
    epochs: Annotated[Positive, Field(le=1000)] = 1
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    max_tokens: Positive = 1024  # of an answer
    ahead: bool = False  # sample the next rollout while this one is learnt from, by the weights of before (ahead.py)
    # Probabilities that ratios are taken to: those that the sampler reported, or the trainer's own for the same
    # weights, for one forward pass more.
    old: Literal["rollout", "trainer"] = "rollout"
    # Experts that an update's tokens go to: those of the rollout (R3), of the trainer's own pass before the first
    # update (R2), or whatever the gate chooses now.
    replay: Literal["rollout", "trainer", "off"] = "rollout"
    # Updates after which the reference policy becomes the newest, at the end of a rollout; 0: it stays the first.
    reference_every: Annotated[int, Field(ge=0)] = 0
    dynamic: bool = False  # groups of equal rewards are left out, and others sampled in their place ...
    refills: Annotated[int, Field(ge=0)] = 3  # ... at most so often in a rollout
    # Answers that ran out of tokens: as others, without a share in the loss, or with a penalty that grows over the last
    # `overlong_buffer` tokens to 1 (DAPO, equation 13).
    overlong: Literal["keep", "mask", "penalty"] = "keep"
    overlong_buffer: Positive = 1
    # A file for right answers, as conversations: the run writes it instead of learning (rejection sampling).
    harvest: Annotated[str, Field(min_length=1)] | None = None
    harvest_per_question: Positive = 4
    evaluate_only: bool = False  # only evaluate the held-out questions; no updates
    eval_problems: Positive = 64  # held out; run.eval_every says when
    eval_samples: Annotated[Positive, Field(le=1 << 16)] = 16  # to each, for pass@1 and pass@16
    alarms: Alarms = Alarms()

    @model_validator(mode="after")
    def _fits(self) -> RLConfig:
        if self.samples < 2:
            raise ValueError("samples = 1 leaves nothing to compare an answer with; set 2 or more")
        if self.loss.correction != "none" and self.old == "rollout":
            raise ValueError('loss.correction compares the trainer with the sampler: it needs old = "trainer"')
        if (answers := self.questions * self.samples * self.minibatches) > MOST_ANSWERS:
            raise ValueError(
                f"questions x samples x minibatches = {answers:,} answers of one rollout are more than {MOST_ANSWERS:,}"
            )
        if self.harvest and self.evaluate_only:
            raise ValueError("harvest and evaluate_only are two runs: leave one of them out")
        if self.overlong == "penalty" and self.overlong_buffer > self.max_tokens:
            raise ValueError(f"overlong_buffer = {self.overlong_buffer} is more than max_tokens = {self.max_tokens}")
        return self

    @property
    def updates(self) -> int:
        """Updates that one rollout provides answers for."""
        return self.minibatches * self.epochs
