"""Schedules over steps and tokens: learning rate, batch size and loss weights. The `[optim]` and `[batch]` tables.

Both are pure functions of the step, so a resumed run needs no state except its step number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running mean


class Segment(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A segment of the learning-rate schedule: `length` units (optim.plan_unit) long, ending at `to` times optim.lr."""

    shape: Literal["linear", "cosine", "constant"]
    length: Positive
    to: Annotated[float, Field(ge=0)]


class Change(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A new value for a key of the model table, in steps that begin after at least so many tokens."""

    after: Positive
    to: Annotated[float, Field(ge=0)]


class OptimConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The defaults are DeepSeek-V3's (arXiv 2412.19437, section 4.2). After the last segment the rate is constant."""

    lr: Annotated[float, Field(gt=0)] = 2.2e-4
    plan: tuple[Segment, ...] = (Segment(shape="linear", length=2000, to=1.0),)
    plan_unit: Literal["steps", "tokens"] = "steps"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    moments: Literal["fp32", "bf16"] = "fp32"  # the published run has BF16, with FP32 masters
    sums: Literal["fp32", "bf16"] = "fp32"  # dtype in which gradients are sent to their owner, which adds in FP32
    offload: Literal["none", "cpu"] = "none"  # "cpu": masters and moments in host memory, updated there
    ema: Decay = 0.0  # decay of an average of the parameters, kept on the CPU; 0: none
    # Late changes of model.mtp_weight and model.bias_gamma; V3: 0.1 after 10T tokens, and 0 after 14.3T.
    mtp_weight_plan: tuple[Change, ...] = ()
    bias_gamma_plan: tuple[Change, ...] = ()
    # Nonfinite steps in a row that end a run. One is bad data or a flipped bit; three, on other data each, are bad
    # weights.
    skips: Positive = 3

    @model_validator(mode="after")
    def _changes_differ(self) -> OptimConfig:
        for name in ("mtp_weight_plan", "bias_gamma_plan"):
            tokens = [change.after for change in getattr(self, name)]
            if len(set(tokens)) < len(tokens):
                raise ValueError(f"{name} has two changes after the same tokens; leave one out")
        return self

    @model_validator(mode="after")
    def _moments_can_decay(self) -> OptimConfig:
        # Half a unit in the last place of BF16 is at most 2^-8 of a value: a smaller decay is rounded away, and the
        # moment never shrinks.
        if self.moments == "bf16" and 1 - max(self.betas) < 2**-8:
            raise ValueError(
                f"moments = 'bf16' cannot decay by 1 - {max(self.betas)}, which is under half a unit of BF16; "
                f"set betas of at most 0.996, or moments = 'fp32'"
            )
        return self


RAMP_SIZES = 1000


class BatchConfig(BaseModel, frozen=True, extra="forbid"):
    """Sequences in a step; with a ramp, from `ramp_from` up in steps of `ramp_increment`, over `ramp_tokens` tokens."""

    sequences: Positive
    ramp_from: Positive | None = None
    ramp_increment: Positive = 1
    ramp_tokens: Positive | None = None

    @model_validator(mode="after")
    def _ramp_fits(self) -> BatchConfig:
        if (self.ramp_from is None) != (self.ramp_tokens is None):
            raise ValueError("a ramp needs both ramp_from and ramp_tokens")
        if self.ramp_from is not None and (
            self.ramp_from > self.sequences or (self.sequences - self.ramp_from) % self.ramp_increment
        ):
            raise ValueError("ramp_from plus a whole number of ramp_increment must give sequences")
        if self.ramp_from is not None and (self.sequences - self.ramp_from) // self.ramp_increment >= RAMP_SIZES:
            raise ValueError(f"a ramp of more than {RAMP_SIZES} sizes, each of which is planned: raise ramp_increment")
        return self

    def sizes(self) -> list[int]:
        """All batch sizes of the run, in sequences, ascending."""
        first = self.sequences if self.ramp_from is None else self.ramp_from
        return list(range(first, self.sequences + 1, self.ramp_increment))

    def at(self, tokens: int) -> int:
        """The batch size of the step that begins after `tokens` tokens."""
        sizes = self.sizes()
        if self.ramp_tokens is None:
            return sizes[-1]
        return sizes[min(len(sizes) - 1, tokens * len(sizes) // self.ramp_tokens)]


class Point(NamedTuple):
    """The position of a step in the run. Steps and sequences are counted from 0."""

    step: int
    first: int  # number of its first sequence
    sequences: int  # in this step
    seq_len: int
    passed_over: int = 0  # sequences that were skipped before it (`spikes`)

    @property
    def data_first(self) -> int:
        """The number of the first sequence that it reads."""
        return self.first + self.passed_over

    @property
    def tokens_before(self) -> int:
        return self.first * self.seq_len

    @property
    def tokens(self) -> int:
        """In this step."""
        return self.sequences * self.seq_len


def points(batch: BatchConfig, seq_len: int) -> Iterator[Point]:
    """Step 0, 1, 2, ... without end."""
    step = first = 0
    while True:
        sequences = batch.at(first * seq_len)
        yield Point(step, first, sequences, seq_len)
        step, first = step + 1, first + sequences


def sequences_before(batch: BatchConfig, seq_len: int, step: int) -> int:
    """The number of sequences of all steps before this one."""
    return next(islice(points(batch, seq_len), step, None)).first


def learning_rate(config: OptimConfig, point: Point) -> float:
    """The rate of a step. Segments follow each other, each from where the last one ended, the first from 0; a
    segment's last step has its full `to`."""
    position = point.step + 1 if config.plan_unit == "steps" else point.tokens_before + point.tokens
    share = 0.0  # of config.lr, at the end of the segments before
    for segment in config.plan:
        if position <= segment.length:
            return config.lr * _blend(segment, share, position / segment.length)
        share, position = segment.to, position - segment.length
    return config.lr * share


def changed(value: float, plan: Iterable[Change], point: Point) -> float:
    """`value` at a step, after the changes of `plan`, which may be in any order."""
    past = [change for change in plan if change.after <= point.tokens_before]
    return max(past, key=lambda change: change.after).to if past else value


def gradient_scale(point: Point) -> float:
    """The loss scale of a step, undone by the update: the largest power of two not above its number of tokens.

    The loss is a mean over all tokens, so unscaled gradients of a token would be 1/tokens in size, which is below the
    floor of FP8's scales (1e-4) at any practical batch size. A power of two changes no mantissa bit of BF16 or FP32.
    """
    return float(1 << point.tokens.bit_length() - 1)


def _blend(segment: Segment, start: float, progress: float) -> float:
    """The share of optim.lr after `progress` (0 to 1) of a segment that starts at `start`."""
    if segment.shape == "constant":
        return segment.to
    weight = progress if segment.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (segment.to - start) * weight
