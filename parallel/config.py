"""How a run is spread over ranks: the `[parallel]` table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

Positive = Annotated[int, Field(ge=1)]


class ParallelConfig(BaseModel, frozen=True, extra="forbid"):
    """Ranks are pp x dp x ep; expert-parallel ranks are data-parallel for everything but the routed experts."""

    pp: Positive = 1
    dp: Positive = 1
    ep: Positive = 1
    schedule: str = "one_f_one_b"  # a name in SCHEDULES, or file:PATH.csv
    chunks: Positive = 1  # stages per rank, for schedules that take a choice
    microbatch_sequences: Positive = 1
    overlap: Literal["on", "off"] = "on"
    graphs: Literal["auto", "on", "off"] = "auto"  # replay ops as CUDA graphs; auto: where a run can

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.ep
